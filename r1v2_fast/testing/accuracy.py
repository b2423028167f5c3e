"""The relative rule: against an fp64 truth, at most 1.5 times the same-dtype PyTorch error plus one output ulp.

fp64 results have no finer truth: they agree with it to 1e-10 of its largest value.
"""

from __future__ import annotations

import torch


def max_error(values: torch.Tensor, truth: torch.Tensor) -> float:
    assert truth.dtype == torch.float64, f"the truth is fp64, got {truth.dtype}"
    assert values.shape == truth.shape, f"expected shape {tuple(truth.shape)}, got {tuple(values.shape)}"
    if values.numel() == 0:
        return 0.0
    error = (values.double() - truth).abs().max().item()
    return error if error == error else float("inf")  # a NaN is an infinite error


def ulp_at_max(truth: torch.Tensor, dtype: torch.dtype) -> float:
    if truth.numel() == 0:
        return 0.0
    return torch.finfo(dtype).eps * truth.abs().max().item()


def assert_as_accurate(ours: torch.Tensor, reference: torch.Tensor, truth: torch.Tensor, what: str = "result") -> None:
    """`ours` and `reference` (plain PyTorch in the same input dtype) against `truth` (fp64): the relative rule."""
    if reference.dtype == torch.float64 and ours.dtype == torch.float64:
        allowed = 1e-10 * truth.abs().max().item() if truth.numel() else 0.0  # the truth itself is fp64: parity
    else:
        allowed = 1.5 * max_error(reference, truth) + ulp_at_max(truth, ours.dtype)
    error = max_error(ours, truth)
    assert error <= allowed, f"{what}: error {error:.3e} against fp64, allowed {allowed:.3e}"
