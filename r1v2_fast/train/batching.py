"""Micro-batches: an optimizer step's samples in several forwards, whose gradients add up to the whole step's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from r1v2_fast.data.collate import Sequence


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


def micro_batches(samples: list[S], budget: int | None) -> list[list[S]]:
    """Split by padded tokens, the longest samples first: where memory is short it shows at once.

    A sample that is longer than the budget goes alone. Without a budget all samples stay together, in their order.
    """
    if budget is None:
        return [samples]
    batches: list[list[S]] = []
    for sample in sorted(samples, key=lambda s: -padded_tokens([s])):
        if batches and padded_tokens([*batches[-1], sample]) <= budget:
            batches[-1].append(sample)
        else:
            batches.append([sample])
    return batches


def padded_tokens(samples: Iterable[Sample]) -> int:
    """Rows times columns of the batch that `data.collate` makes: prompts and responses are padded apart."""
    sequences = [sequence for sample in samples for sequence in sample.sequences]
    prompt = max(len(s.prompt_ids) for s in sequences)
    return len(sequences) * (prompt + max(len(s.response_ids) for s in sequences))
