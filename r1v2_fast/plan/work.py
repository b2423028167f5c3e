"""What one GPU does in a step of a policy stage: responses sampled, rows of tokens trained on.

P prompt tokens, R response tokens, G responses a prompt. Every prompt and response is taken to be that long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from r1v2_fast import config

Kind = Literal["sdpa", "flex", "flash"]


@dataclass(frozen=True)
class Row:
    """One forward and backward: `groups` prompts, each with `sequences` responses."""

    groups: int
    sequences: int
    prompt: int
    response: int
    packed: bool = True

    @property
    def tokens(self) -> int:
        """Packed groups (P + sequences R); padded groups sequences (P + R)."""
        copies = 1 if self.packed else self.sequences
        return self.groups * (copies * self.prompt + self.sequences * self.response)

    @property
    def targets(self) -> int:
        """Response tokens, N."""
        return self.groups * self.sequences * self.response

    def pairs(self, kind: Kind) -> float:
        """Query-key pairs that attention computes.

        A prompt costs P^2 / 2, and a response R (P + R / 2): it sees its prompt and itself. SDPA computes a group's
        responses together under a mask, sequences R (P + sequences R). Padded, a sequence costs (P + R)^2 / 2.
        """
        behind = self.sequences * self.response
        if not self.packed:
            return self.groups * self.sequences * (self.prompt + self.response) ** 2 / 2
        if kind == "sdpa":
            return self.groups * (self.prompt**2 / 2 + behind * (self.prompt + behind))
        return self.groups * (self.prompt**2 / 2 + behind * (self.prompt + self.response / 2))

    def mask(self, kind: Kind) -> int:
        """Elements of the masks that SDPA keeps for one layer's backward; the others keep none."""
        behind = self.sequences * self.response
        return self.groups * behind * (self.prompt + behind) if self.packed and kind == "sdpa" else 0


@dataclass(frozen=True)
class Work:
    """A stage's step on one GPU."""

    stage: str
    prompts: int
    """Of this GPU: the step's, dealt out."""
    group_size: int
    """Responses that this GPU samples for each: 0 of ready pairs, and where a vLLM server samples."""
    prompt: int
    response: int
    tiles: int
    """Of each prompt's picture."""
    rows: list[Row]
    """The forwards and backwards of one pass."""
    passes: int
    """Over the rows, with gradient."""
    scored: int
    """Further forwards over the rows without gradient: old log-probs, the reference's."""
    updates: int
    """Optimizer steps."""
    mini_batch: int
    """Prompts of one optimizer step."""

    @property
    def largest(self) -> Row:
        return max(self.rows, key=lambda row: row.tokens)

    @property
    def tokens(self) -> int:
        """Trained on in the step."""
        return self.passes * sum(row.tokens for row in self.rows)

    @property
    def sampled(self) -> int:
        """Response tokens of the rollout."""
        return self.prompts * self.group_size * self.response


def of(
    name: str,
    settings: config.MPO | config.GRPO,
    recipe: config.Recipe,
    *,
    gpus: int,
    prompt: int,
    response: int,
    tiles: int,
) -> Work:
    """The step of stage `name` on one of `gpus`, at full length and with every group informative.

    MPO trains on max_pairs pairs a prompt, at most as many as right and wrong responses can form; GRPO on a full batch
    of groups. Ready pairs (mpo.sampling null) are a prompt each. A vLLM server's rollout costs this GPU nothing.
    raises  ValueError where a prompt or a response has no token
    """
    if min(prompt, response) < 1:
        raise ValueError(f"expected --prompt-tokens and --response-tokens of 1 or more, got {prompt} and {response}")
    sampling = settings.sampling
    group = sampling.group_size if sampling else 0
    passes = mini_batches = 1
    if isinstance(settings, config.MPO):
        whole = sampling.prompts if sampling else settings.pairs
        pairs = min(settings.max_pairs, (group // 2) * (group - group // 2)) if sampling else 1
        sequences, unit, scored = 2 * pairs, 2, int(sampling is not None)
    else:
        whole, sequences, unit = settings.sampling.prompts, group, 1
        passes, mini_batches = settings.updates_per_rollout, settings.mini_batches
        scored = int(passes * mini_batches > 1) + int(settings.loss.kl_coef > 0)
    prompts = -(-whole // gpus)
    held = -(-prompts // mini_batches)
    parts = rows(held, sequences, unit, prompt, response, settings.micro_batch_tokens, packed=recipe.model.packing)
    return Work(
        stage=name, prompts=prompts, group_size=group if recipe.rollout.engine == "local" else 0, prompt=prompt,
        response=response, tiles=tiles,
        rows=parts * mini_batches, passes=passes, scored=scored, updates=passes * mini_batches, mini_batch=held,
    )  # fmt: skip


def rows(
    groups: int, sequences: int, unit: int, prompt: int, response: int, budget: int | None, *, packed: bool
) -> list[Row]:
    """The rows that `train.batching.micro_batches` makes of equal groups.

    unit    sequences that must stand together: 2 of a pair, else 1
    budget  tokens of a row; what is longer goes alone. None: everything in one row
    Packed, a group that fits stands whole, else in parts, each behind its own copy of the prompt.
    """

    def row(count: int, each: int) -> Row:
        return Row(count, each, prompt, response, packed)

    if budget is None:
        return [row(groups, sequences)]
    if not packed:
        each = max(1, budget // (unit * (prompt + response))) * unit
        whole, rest = divmod(groups * sequences, each)
        return [row(1, each)] * whole + ([row(1, rest)] if rest else [])
    if (size := row(1, sequences).tokens) <= budget:
        whole, rest = divmod(groups, budget // size)
        return [row(budget // size, sequences)] * whole + ([row(rest, sequences)] if rest else [])
    each = max(1, (budget - prompt) // (unit * response)) * unit
    whole, rest = divmod(sequences, each)
    if not rest:
        return [row(1, each)] * (whole * groups)
    together = max(1, budget // row(1, rest).tokens)  # rests of several groups may share a row
    full, left = divmod(groups, together)
    rests = [row(together, rest)] * full + ([row(left, rest)] if left else [])
    return [row(1, each)] * (whole * groups) + rests
