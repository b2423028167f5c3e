"""Packed sequences in PyTorch: bounds that can be trusted, and values of sequences spread over their tokens.

N tokens, B sequences.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def bounds_of(offsets: torch.Tensor, count: int) -> torch.Tensor:
    """[B + 1], within [0, count] and not decreasing: on a GPU nobody looked at the offsets."""
    return offsets.clamp(0, count).cummax(0).values


def repeats_of(bounds: torch.Tensor, count: int) -> torch.Tensor:
    """[B + 2] tokens before the first sequence, of each, and behind the last."""
    repeats = F.pad(bounds, (1, 1)).diff()
    repeats[-1] += count
    return repeats


def spread(values_B: torch.Tensor, repeats: torch.Tensor, count: int) -> torch.Tensor:
    """[N]; 0 for tokens of no sequence."""
    return torch.repeat_interleave(F.pad(values_B, (1, 1)), repeats, output_size=count)
