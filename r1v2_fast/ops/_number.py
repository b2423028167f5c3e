"""Numbers that callers pass: one that changes from step to step (a float, or a tensor of one), and whole ones."""

from __future__ import annotations

import operator

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


def whole(name: str, value: int, low: int, below: int | None = None, *, so_written: str = "") -> int:
    """An int, NumPy's among them; raises ValueError on anything else, and outside [low, below).

    so_written  how a message writes `below`
    """
    if isinstance(value, torch.SymInt):  # while compiling
        return value
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is not None and number >= low and (below is None or number < below):
        return number
    range_ = f"of {low} or more" if below is None else f"in [{low}, {so_written or below})"
    raise ValueError(f"{name} must be an integer {range_}, got {value!r}")


def seed(value: int) -> int:
    """Of a random stream."""
    return whole("seed", value, 0, 1 << 63, so_written="2^63")
