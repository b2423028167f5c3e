"""What the machine can do, measured in the same run: bytes of a copy and FLOPs of a matrix product, per second."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from bench.case import Case
from bench.timing import clock

# The copied buffer lies far beyond any cache. M, K and N of the product: the scale of the cases, 0.1 s on two CPU cores
COPIED = {"cpu": 256 << 20, "cuda": 1 << 30}
PRODUCT = {"cpu": (1024, 1024, 8192), "cuda": (4096, 5120, 32768)}
REPEATS = 5  # the best counts: a ceiling is what the machine does undisturbed


class Ceilings(NamedTuple):
    bandwidth: float  # bytes/s, a copy's reads and writes
    matmul: dict[str, float]  # FLOP/s by the output's dtype; empty where the case has no matrix product


def ceilings(case: Case, device: torch.device) -> Ceilings:
    return Ceilings(bandwidth(device.type), matmul_rates(device.type, case.dtype) if case.flops else {})


def roofline_percent(case: Case, seconds: float, ceiling: Ceilings) -> float | None:
    """The least time that the case's declared FLOPs and bytes take at the ceilings, in percent of `seconds`."""
    times = [case.bytes / ceiling.bandwidth]
    if ceiling.matmul:
        times.append(case.flops / max(ceiling.matmul.values()))
    return 100 * max(times) / seconds if max(times) else None


@functools.cache
def bandwidth(device: str) -> float:
    source = torch.ones(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    return 2 * COPIED[device] / _best(device, lambda: target.copy_(source))


@functools.cache
def matmul_rates(device: str, dtype: str) -> dict[str, float]:
    """Halves on CUDA into their own dtype and into the fp32 accumulator, which `linear_logprobs` keeps."""
    m, k, n = PRODUCT[device]
    kind = getattr(torch, dtype)
    g = torch.Generator(device).manual_seed(0)  # normal numbers: a GPU draws less power, and clocks higher, on zeros
    a = torch.randn(m, k, generator=g, device=device).to(kind)
    b = torch.randn(n, k, generator=g, device=device).to(kind).T
    flops = 2.0 * m * k * n
    out = torch.empty(m, n, dtype=kind, device=device)
    rates = {dtype: flops / _best(device, lambda: torch.mm(a, b, out=out))}
    if device == "cuda" and kind.itemsize == 2:
        wide = torch.empty(m, n, device=device)
        rates["float32"] = flops / _best(device, lambda: torch.mm(a, b, out_dtype=torch.float32, out=wide))
    return rates


def _best(device: str, function) -> float:
    seconds = clock(torch.device(device))
    return min(seconds(function) for _ in range(1 + REPEATS))  # the first warms up, and is never the best
