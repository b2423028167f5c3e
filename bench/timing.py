"""Interleaved medians: every round runs each provider once, so drift of the machine falls on all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch


class Timing(NamedTuple):
    median: float  # seconds
    low: float
    high: float
    rounds: int


def interleaved(
    functions: Mapping[str, Callable[[], object]], *, device: torch.device, rounds: int
) -> dict[str, Timing]:
    """Median, least and most seconds of each function, after one warm-up of each."""
    measure = clock(device)
    for function in functions.values():
        measure(function)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            seconds[name].append(measure(functions[name]))
    return {name: Timing(statistics.median(s), min(s), max(s), rounds) for name, s in seconds.items()}


def clock(device: torch.device) -> Callable[[Callable[[], object]], float]:
    """Seconds of one call: the stream's on CUDA, the wall's on the CPU."""
    return _cuda_seconds if device.type == "cuda" else _seconds


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _cuda_seconds(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3
