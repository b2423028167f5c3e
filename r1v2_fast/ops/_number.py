"""A number that changes from step to step: a float, or a tensor of one."""

from __future__ import annotations

import torch

Number = float | torch.Tensor


def checked(name: str, value: Number | None, device: torch.device, *, above: float | None = None) -> Number | None:
    """A float, or a tensor []; raises ValueError on several numbers, and on one that is not above `above`.

    While compiling a float becomes a tensor: it would be burnt into the graph, and every step has another.
    """
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got a tensor of shape {tuple(value.shape)}")
        return value.detach() if value.dim() == 0 else value.detach().reshape(())
    if torch.compiler.is_compiling():
        return torch.ones((), dtype=torch.float64, device=device) * value  # a product keeps it symbolic
    if value != value or (above is not None and not value > above):
        raise ValueError(f"{name} must be {'a number' if above is None else f'above {above:g}'}, got {value}")
    return float(value)


def split(value: Number | None, default: float) -> tuple[torch.Tensor | None, float]:
    """(the tensor, NaN), or (None, the float or default)."""
    if isinstance(value, torch.Tensor):
        return value, float("nan")
    return None, default if value is None else value
