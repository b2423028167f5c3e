"""Names of the Triton kernels that a block of code launches, under the interpreter as on a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction


@contextlib.contextmanager
def launches() -> Iterator[list[str]]:
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
