"""The floor of linear_logprobs: its head matmuls alone. N rows, H hidden size, V vocabulary."""

from __future__ import annotations

import functools

import torch

TILE_BYTES = 1 << 30  # of fp32 logits, as much as linear_logprobs takes for its own


@torch.no_grad()
def matmuls(hidden: torch.Tensor, weight: torch.Tensor, products: int) -> tuple[torch.Tensor, ...]:
    """2 NHV FLOPs: logits; 3 and 4: times the head, for half and all rows; 6: and the head's gradient."""
    n, v = len(hidden), len(weight)
    probs_NV = _probabilities(n, v, hidden.dtype, hidden.device)
    graded = {2: 0, 3: n // 2, 4: n, 6: n}[products]
    tiles = -(-n * v * 4 // TILE_BYTES)
    size = -(-n // tiles)
    logits = torch.empty(size, v, device=hidden.device)
    unit = torch.empty(graded, hidden.shape[1], dtype=hidden.dtype, device=hidden.device)
    for start in range(0, n, size):
        rows = hidden[start : start + size]
        _product(rows, weight.T, logits[: len(rows)])
        if (done := unit[start : start + size]).numel():
            _product(probs_NV[start : start + len(done)], weight, done)
    if products != 6:
        return logits, unit
    grad = torch.empty(weight.shape, device=hidden.device)
    _product(probs_NV.T, hidden, grad)
    return logits, unit, grad


def _product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)


@functools.lru_cache(maxsize=1)
def _probabilities(n: int, v: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Numbers that keep the multipliers busy, as an empty buffer would not; made in the warm-up."""
    return torch.rand(n, v, dtype=dtype, device=device)
