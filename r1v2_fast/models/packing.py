"""Prompt-shared packing: each prompt once, its responses behind it, several groups in one row without padding.

L tokens of the row, N response tokens, S sequences. A group with a prompt of P tokens and responses of R_i costs
P + sum R_i tokens where padding costs G (P + max R_i): at P = 3,500, G = 8 and R = 2,000 that is 2.3 times fewer.
Each response sees its prompt and itself; its positions go on where the prompt's end, as if it stood alone.
Source: Prefix Grouper (arXiv 2506.05433); DualKV (2605.15422).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1v2_fast.data.collate import Sequence
from r1v2_fast.models.attention import Layout

PromptKey = tuple[tuple[int, ...], tuple[str, ...]]


@dataclass(frozen=True)
class PackedBatch:
    """What `data.collate.Batch` is for padded rows; `rows`, `targets`, `offsets` and `last` follow the sequences' order."""

    input_ids: torch.Tensor  # [1, L] int64
    positions: torch.Tensor  # [1, L] int64
    layout: Layout
    image_keys: list[list[str]]  # of each group, in the row's order
    rows: torch.Tensor  # [N] int64, where in the row stands what predicts a response token
    targets: torch.Tensor  # [N] int64, that token
    offsets: torch.Tensor  # [S + 1] int64
    last: torch.Tensor  # [S] int64, where in the row a sequence ends

    @property
    def attention_mask(self) -> dict[str, Layout]:
        """In the form of masks that transformers takes as they are."""
        return {"full_attention": self.layout}

    def to(self, device: torch.device | str) -> PackedBatch:
        tensors = {
            name: getattr(self, name).to(device)
            for name in ("input_ids", "positions", "rows", "targets", "offsets", "last")
        }
        return PackedBatch(layout=self.layout.to(device), image_keys=self.image_keys, **tensors)


def prompt_key(sequence: Sequence) -> PromptKey:
    """Sequences with equal keys share a prompt."""
    return tuple(sequence.prompt_ids), tuple(sequence.image_keys)


def packed_tokens(sequences: list[Sequence]) -> int:
    """Tokens of the row that `pack` makes."""
    prompts = {prompt_key(sequence): len(sequence.prompt_ids) for sequence in sequences}
    return sum(prompts.values()) + sum(len(sequence.response_ids) for sequence in sequences)


def pack(sequences: list[Sequence]) -> PackedBatch:
    """One row of all `sequences`, those that share a prompt behind one copy of it, groups in order of appearance."""
    groups: dict[PromptKey, list[int]] = {}
    for index, sequence in enumerate(sequences):
        assert sequence.prompt_ids, "a prompt must have a token: it predicts its responses' first"
        groups.setdefault(prompt_key(sequence), []).append(index)
    ids: list[int] = []
    positions: list[int] = []
    lengths: list[tuple[int, list[int]]] = []
    rows: list[torch.Tensor] = [torch.empty(0, dtype=torch.int64)] * len(sequences)
    last = torch.zeros(len(sequences), dtype=torch.int64)
    for (prompt, _), members in groups.items():
        ids += prompt
        positions += range(len(prompt))
        prompt_end = len(ids)
        for index in members:
            response = sequences[index].response_ids
            start = len(ids)
            # a response's first token is predicted from the prompt's last position, the others from the one before
            rows[index] = torch.arange(start - 1, start - 1 + len(response))
            rows[index][:1] = prompt_end - 1
            last[index] = start + len(response) - 1 if response else prompt_end - 1
            ids += response
            positions += range(len(prompt), len(prompt) + len(response))
        lengths.append((len(prompt), [len(sequences[index].response_ids) for index in members]))
    counts = torch.tensor([0] + [len(sequence.response_ids) for sequence in sequences])
    return PackedBatch(
        input_ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        layout=Layout.of(lengths),
        image_keys=[list(images) for _, images in groups],
        rows=torch.cat(rows),
        targets=torch.tensor([token for sequence in sequences for token in sequence.response_ids], dtype=torch.int64),
        offsets=counts.cumsum(0),
        last=last,
    )
