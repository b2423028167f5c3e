"""Which tokens count and to which sequence they belong: padded [B, T] under a mask, or packed [N] between offsets."""

from __future__ import annotations

import functools

import torch


class Layout:
    def __init__(self, tokens: torch.Tensor, mask: torch.Tensor | None, offsets: torch.Tensor | None):
        if mask is not None:
            self.sequences, self.longest = mask.shape
            self.live = mask.reshape(-1).bool()
            self.lengths = self.live.view(mask.shape).sum(1, dtype=torch.float64)
            self.rows = None
        else:
            assert offsets is not None
            self.sequences, self.longest = len(offsets) - 1, 0
            places = torch.arange(tokens.numel(), device=tokens.device)
            rows = torch.searchsorted(offsets[1:].contiguous(), places, right=True)
            self.live = (rows < self.sequences) & (places >= offsets[0])  # others belong to nobody
            self.lengths = offsets.diff().double()
            self.rows = rows.clamp(max=max(self.sequences - 1, 0))
        self.count = self.lengths.clamp(min=1)

    @functools.cached_property
    def token_count(self) -> torch.Tensor:
        return self.lengths.sum().clamp(min=1)

    @functools.cached_property
    def nonempty(self) -> torch.Tensor:
        return (self.lengths > 0).sum().clamp(min=1)

    def divisor(self, aggregate: str) -> torch.Tensor | float:
        """What an aggregate divides by last, unless a normalizer is given."""
        if aggregate == "token_mean":
            return self.token_count
        if aggregate == "token_sum":
            return 1.0
        return max(self.sequences * self.longest, 1) if aggregate == "seq_mean_token_sum_norm" else self.nonempty

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """[N] in fp64, 0 where no token counts, whatever stands there."""
        return values.reshape(-1).double().where(self.live, 0)

    def maybe(self, values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else self.tokens(values)

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """[N] of what is given for each token or for each sequence."""
        return self.tokens(self.spread(values.view(-1)) if values.numel() == self.sequences else values)

    def sums(self, values_N: torch.Tensor) -> torch.Tensor:
        """[B]"""
        values_N = values_N.double().where(self.live, 0)
        if self.rows is None:
            return values_N.view(self.sequences, self.longest).sum(1)
        return values_N.new_zeros(self.sequences).index_add(0, self.rows, values_N)

    def total(self, values_N: torch.Tensor) -> torch.Tensor:
        return values_N.double().where(self.live, 0).sum()

    def spread(self, values_B: torch.Tensor) -> torch.Tensor:
        """[N]"""
        if self.rows is None:
            return values_B[:, None].expand(self.sequences, self.longest).reshape(-1)
        return values_B[self.rows] if self.sequences else values_B.new_zeros(len(self.rows))
