"""Matmuls that keep the fp32 accumulator of 16-bit factors.

n rows of a chunk, H hidden, V vocabulary. On CUDA cuBLAS writes fp32 from halves (`out_dtype`); elsewhere it does not
exist, and weight tiles are upcast instead.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator

import torch

UPCAST_BYTES = 64 << 20  # of a weight tile that is cast or upcast
HALVES = (torch.bfloat16, torch.float16)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


_precision_lock = threading.Lock()
_precision_users: dict[str, int] = {}
_precision_before: dict[str, str] = {}


@contextlib.contextmanager
def exact(device_type: str) -> Iterator[None]:
    """Autocast off (the op has chosen its dtype), and fp32 multiplied as fp32: no TF32, no bf16 in its place.

    The setting is the process's: of calls that overlap in threads, the first saves it and the last restores it.
    """
    settings = torch.backends.cuda.matmul if device_type == "cuda" else torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    with _precision_lock:
        _precision_users[device_type] = users = _precision_users.get(device_type, 0) + 1
        if users == 1:
            before = settings.fp32_precision
            above = torch._C._get_fp32_precision_getter("cuda" if device_type == "cuda" else "mkldnn", "all")
            _precision_before[device_type] = "none" if before == above else before  # goes on following what it followed
            settings.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _precision_lock:
            _precision_users[device_type] -= 1
            if not _precision_users[device_type]:
                settings.fp32_precision = _precision_before[device_type]


@functools.cache
def _writes_fp32(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether matmuls of halves write their fp32 accumulator there; where not, weight tiles are upcast, with a warning."""
    if device.type != "cuda":
        return False
    square = torch.ones(16, 16, device=device, dtype=dtype)
    try:
        torch.mm(square, square, out_dtype=torch.float32)
    except (RuntimeError, NotImplementedError) as error:
        warnings.warn(
            f"r1v2_fast: torch.mm(..., out_dtype=torch.float32) cannot run on {torch.cuda.get_device_name(device)} "
            f"({str(error).splitlines()[0]}); {dtype} matmuls of linear_logprobs are upcast to fp32, which is slow",
            stacklevel=2,
        )
        return False
    return True


def native(compute: torch.dtype, device: torch.device) -> bool:
    """The matmuls run on the compute dtype itself, into its accumulator's dtype."""
    return compute not in HALVES or _writes_fp32(device, compute)


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, fresh: bool) -> None:
    """out = (0 if fresh else out) + a b, in out's precision; a and b of one dtype."""
    if a.dtype == out.dtype:
        torch.mm(a, b, out=out) if fresh else out.addmm_(a, b)
    elif fresh:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out)


def _tiles(weight_VH: torch.Tensor, compute: torch.dtype, wide: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """The weight in the dtype that is multiplied: itself, or tile by tile."""
    multiplied = compute if native(compute, weight_VH.device) else wide
    if weight_VH.dtype == compute == multiplied:
        yield slice(0, len(weight_VH)), weight_VH
        return
    rows = max(1, UPCAST_BYTES // (wide.itemsize * max(1, weight_VH.shape[1])))
    for start in range(0, len(weight_VH), rows):
        tile = slice(start, start + rows)
        yield tile, weight_VH[tile].to(compute).to(multiplied)


def project(hidden_nH: torch.Tensor, weight_VH: torch.Tensor, out_nV: torch.Tensor) -> None:
    """h W^T into `out_nV`, fp32 or fp64; the weight counts as cast to hidden's dtype."""
    multiplied = hidden_nH if native(hidden_nH.dtype, hidden_nH.device) else hidden_nH.to(out_nV.dtype)
    for tile, weight in _tiles(weight_VH, hidden_nH.dtype, out_nV.dtype):
        _add_product(out_nV[:, tile], multiplied, weight.T, fresh=True)


def back_project(matrix_nV: torch.Tensor, weight_VH: torch.Tensor, compute: torch.dtype) -> torch.Tensor:
    """D W in the accumulator's precision, [n, H]."""
    wide = accumulator(compute)
    out = matrix_nV.new_empty(len(matrix_nV), weight_VH.shape[1], dtype=wide)
    fresh = True
    for tile, weight in _tiles(weight_VH, compute, wide):
        _add_product(out, matrix_nV[:, tile].to(weight.dtype), weight, fresh=fresh)
        fresh = False
    return out


def add_outer(
    out_VH: torch.Tensor, matrix_nV: torch.Tensor, rows_nH: torch.Tensor, compute: torch.dtype, *, fresh: bool
) -> None:
    """out = (0 if fresh else out) + D^T R in out's precision; halves are multiplied in their dtype where that is native."""
    if native(compute, out_VH.device):
        _add_product(out_VH, matrix_nV.to(compute).T, rows_nH.to(compute), fresh=fresh)
        return
    columns = max(1, UPCAST_BYTES // (out_VH.dtype.itemsize * max(1, len(matrix_nV))))
    for start in range(0, len(out_VH), columns):
        tile = slice(start, start + columns)
        _add_product(out_VH[tile], matrix_nV[:, tile].T.to(out_VH.dtype), rows_nH, fresh=fresh)
