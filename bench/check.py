"""Outputs against the fp64 truth: the relative rule for ours, output by output."""

from __future__ import annotations

import torch

from bench.case import Case, Outputs

ROWS = 4096  # compared at a time: the weight gradient of a large head in fp64 is gigabytes
FOREIGN = 0.1  # of the truth's largest value: rounding stays far below, another quantity or another sign does not


def errors(values: Outputs, truth: Outputs, allowed: Outputs | None = None) -> tuple[float, ...]:
    """Of each output, the largest error over the truth's largest value; with `allowed`, by rows' 2-norms, beyond it."""
    limits: tuple[torch.Tensor | None, ...] = allowed or (None,) * len(truth)
    return tuple(_error(*three) for three in zip(values, truth, limits, strict=True))


def check(case: Case, inputs, ours: Outputs, pytorch: Outputs, truth: Outputs) -> None:
    """Raises AssertionError where an output of ours errs by more than 1.5 times PyTorch's error plus one ulp."""
    allowed = case.allowed(inputs) if case.allowed else None
    exactly = None if allowed is None else tuple(torch.zeros_like(limit) for limit in allowed)
    bars, found = errors(pytorch, truth, exactly), errors(ours, truth, allowed)
    for index, (value, bar, error) in enumerate(zip(ours, bars, found, strict=True)):
        limit = 1.5 * bar + torch.finfo(value.dtype).eps
        assert error <= limit, f"{case.name}: ours errs by {error:.2e} in output {index}, allowed {limit:.2e}"


def _error(value: torch.Tensor, exact: torch.Tensor, limit: torch.Tensor | None) -> float:
    assert value.shape == exact.shape, f"expected shape {tuple(exact.shape)}, got {tuple(value.shape)}"
    value, exact = (tensor.reshape(len(tensor) if tensor.dim() else 1, -1) for tensor in (value, exact))
    worst, scale = 0.0, torch.finfo(torch.float64).tiny
    for start in range(0, len(exact), ROWS):
        rows = slice(start, start + ROWS)
        difference, right = value[rows].double() - exact[rows], exact[rows]
        if limit is None:
            error, size = difference.abs().max().item(), right.abs().max().item()
        else:
            error, size = (difference.norm(dim=1) - limit[rows]).max().item(), right.norm(dim=1).max().item()
        if error != error:
            return float("inf")  # a NaN is an infinite error
        worst, scale = max(worst, error), max(scale, size)
    return worst / scale
