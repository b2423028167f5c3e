"""A transformers model in fp64 throughout: its RMSNorms compute in fp32 whatever they are given."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn


def to_double(model: nn.Module) -> None:
    """Weights and norms of `model` in fp64, so that two ways to one gradient agree to fp64's rounding."""
    model.double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_rms_norm, module)


def _rms_norm(norm, hidden: torch.Tensor) -> torch.Tensor:
    return norm.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)
