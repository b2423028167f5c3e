"""Which tokens count and to which sequence they belong: padded [B, T] under a mask, or packed [N] between offsets."""

from __future__ import annotations

import functools

import torch

from r1v2_fast.ops._packed import bounds_of, repeats_of, spread


class Layout:
    def __init__(self, tokens: torch.Tensor, mask: torch.Tensor | None, offsets: torch.Tensor | None):
        self.tokens_given = tokens.numel()
        self.padded = mask is not None
        if mask is not None:
            self.sequences, self.longest = mask.shape
            self.live = mask.reshape(-1).bool()
            self.lengths = self.live.view(mask.shape).sum(1, dtype=torch.float64)
        else:
            assert offsets is not None
            self.sequences, self.longest = len(offsets) - 1, 0
            self.bounds = bounds_of(offsets, tokens.numel())
            places = torch.arange(tokens.numel(), device=tokens.device)
            self.live = (places >= self.bounds[0]) & (places < self.bounds[-1])  # others belong to nobody
            self.lengths = self.bounds.diff().double()
        self.count = self.lengths.clamp(min=1)
        # on the CPU a look is cheaper than masking everything; on a GPU it would wait
        self.whole = tokens.device.type == "cpu" and bool(self.live.all())

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

    def kept(self, values_N: torch.Tensor, otherwise: float = 0.0) -> torch.Tensor:
        """The values of tokens that count, whatever stands elsewhere."""
        return values_N if self.whole else values_N.where(self.live, otherwise)

    def tokens(self, values: torch.Tensor) -> torch.Tensor:
        """[N] in fp64, 0 where no token counts."""
        return self.kept(values.reshape(-1).double())

    def maybe(self, values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else self.tokens(values)

    def per_token(self, values: torch.Tensor) -> torch.Tensor:
        """[N] of what is given for each token or for each sequence."""
        if values.numel() == self.sequences:
            return self.kept(self.spread(values.view(-1).double()))
        return self.tokens(values)

    def sums(self, values_N: torch.Tensor) -> torch.Tensor:
        """[B]"""
        values_N = self.kept(values_N.double())
        if self.padded:
            return values_N.view(self.sequences, self.longest).sum(1)
        return torch.segment_reduce(values_N, "sum", offsets=self.bounds) if self.sequences else values_N.new_zeros(0)

    def total(self, values_N: torch.Tensor) -> torch.Tensor:
        return self.kept(values_N.double()).sum()

    def spread(self, values_B: torch.Tensor) -> torch.Tensor:
        """[N]; 0 for tokens of no sequence."""
        if self.padded:
            return values_B[:, None].expand(self.sequences, self.longest).reshape(-1)
        numbers = values_B.to(torch.uint8) if values_B.dtype == torch.bool else values_B
        return spread(numbers, self._repeats, self.tokens_given).to(values_B.dtype)

    @functools.cached_property
    def _repeats(self) -> torch.Tensor:
        return repeats_of(self.bounds, self.tokens_given)
