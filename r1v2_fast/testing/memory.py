"""Peak memory of a function above what was held when it began, from the profiler's allocation events."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch


def peak_bytes(function: Callable[[], object]) -> int:
    """The most bytes held at once by tensors made inside `function`; on CUDA the caching allocator's own count."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        if (grown := torch.cuda.max_memory_allocated() - before) > 0:
            return grown
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def assert_peak(function: Callable[[], object], limit: float) -> int:
    """The peak stays at or below `limit` bytes; returns it."""
    peak = peak_bytes(function)
    assert peak <= limit, f"{peak / 2**20:.1f} MiB held at the peak, {limit / 2**20:.1f} MiB promised"
    return peak
