"""Launches counted: of Triton kernels, under the interpreter as on a GPU, and of any kernel on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
    """The names of the Triton kernels that the block launches, as it goes."""
    seen: list[str] = []
    kept = {kind: kind.run for kind in (JITFunction, InterpretedFunction)}

    def counting(run):
        def wrapped(self, *arguments, **options):
            seen.append(self.fn.__name__)
            return run(self, *arguments, **options)

        return wrapped

    for kind, run in kept.items():
        kind.run = counting(run)
    try:
        yield seen
    finally:
        for kind, run in kept.items():
            kind.run = run


def kernels_launched(function: Callable[[], object]) -> int:
    """Kernels that one call starts on the GPU, whoever wrote them, by the profiler; copies and memsets are not kernels."""
    function()  # compiled, and its workspaces made
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        function()
        torch.cuda.synchronize()
    events = profile.events()
    assert events is not None
    on_device = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    return sum(not event.name.startswith(("Memcpy", "Memset")) for event in on_device)
