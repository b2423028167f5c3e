"""Micro-batches: an optimizer step's samples in several forwards, whose gradients add up to the whole step's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from r1v2_fast.data.collate import Sequence
from r1v2_fast.models.packing import PromptKey, packed_tokens, prompt_key


class Sample(Protocol):
    @property
    def sequences(self) -> list[Sequence]:
        """What must stand in one forward: a response, or both sides of a pair."""


@dataclass(frozen=True)
class Single:
    """A sequence and nothing else."""

    sequence: Sequence

    @property
    def sequences(self) -> list[Sequence]:
        return [self.sequence]


S = TypeVar("S", bound=Sample)


def micro_batches(samples: list[S], budget: int | None, *, packed: bool) -> list[list[S]]:
    """Split by the tokens of a forward, the longest first: where memory is short it shows at once.

    packed   samples that share a prompt stay together where the budget lets them, and pay for it once
    A sample that is longer than the budget goes alone. Without a budget all samples stay together, in their order.
    """
    if budget is None:
        return [samples]
    return _packed(samples, budget) if packed else _padded(samples, budget)


def fullest(samples: list[S], budget: int | None, *, packed: bool) -> list[S]:
    """Those of `samples`, in their order, that fill one forward best: ragged ones of a step fill it where long groups do not."""
    if budget is None:
        return samples
    if not packed:
        return _padded(samples, budget)[0]
    part: list[S] = []
    prompts: set[PromptKey] = set()
    held = 0
    for sample in samples:
        own = {prompt_key(s): len(s.prompt_ids) for s in sample.sequences if prompt_key(s) not in prompts}
        more = sum(own.values()) + sum(len(s.response_ids) for s in sample.sequences)
        if not part or held + more <= budget:
            part.append(sample)
            prompts |= own.keys()
            held += more
    return part


def by_prompt(samples: list[S]) -> list[list[S]]:
    """Those that share their prompts together, in order of appearance."""
    groups: dict[tuple, list[S]] = {}
    for sample in samples:
        groups.setdefault(tuple(map(prompt_key, sample.sequences)), []).append(sample)
    return list(groups.values())


def tokens(samples: Iterable[Sample], *, packed: bool) -> int:
    """Tokens of one forward: packed, each prompt once; else rows times columns, prompts and responses padded apart."""
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    if packed:
        return packed_tokens(sequences)
    prompt = max(len(s.prompt_ids) for s in sequences)
    return len(sequences) * (prompt + max(len(s.response_ids) for s in sequences))


def _padded(samples: list[S], budget: int) -> list[list[S]]:
    batches: list[list[S]] = []
    for sample in sorted(samples, key=lambda s: -tokens([s], packed=False)):
        if batches and tokens([*batches[-1], sample], packed=False) <= budget:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def _packed(samples: list[S], budget: int) -> list[list[S]]:
    """First fit, the largest first, of groups; one larger than the budget falls into parts, each with its own prompt."""
    parts = [part for group in by_prompt(samples) for part in _parts(group, budget)]
    batches: list[tuple[int, list[S]]] = []
    for size, part in sorted(parts, key=lambda pair: -pair[0]):
        for index, (held, batch) in enumerate(batches):
            if held + size <= budget:
                batches[index] = (held + size, batch + part)
                break
        else:
            batches.append((size, part))
    return [batch for _, batch in batches]


def _parts(group: list[S], budget: int) -> list[tuple[int, list[S]]]:
    """(tokens, samples) of runs of `group` that fit."""
    parts: list[tuple[int, list[S]]] = []
    alone = {id(sample): tokens([sample], packed=True) for sample in group}
    prompts = sum({prompt_key(s): len(s.prompt_ids) for s in group[0].sequences}.values())
    for sample in sorted(group, key=lambda s: -alone[id(s)]):
        more = alone[id(sample)] - prompts
        if parts and parts[-1][0] + more <= budget:
            parts[-1] = (parts[-1][0] + more, [*parts[-1][1], sample])
        else:
            parts.append((alone[id(sample)], [sample]))
    return parts
