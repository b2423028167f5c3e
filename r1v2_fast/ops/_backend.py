"""Which backend runs an op: a choice that cannot run raises with the reason, `auto` takes the fastest that can.

An op registers its candidates, fastest first, as (name, why_not) pairs; `why_not(device_type)` returns None when the
backend runs there, else the reason with what would work. `doctor` prints the same reasons.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple

import torch

WhyNot = Callable[[str], "str | None"]


class Verdict(NamedTuple):
    backend: str
    why_not: str | None


_CANDIDATES: dict[str, tuple[tuple[str, WhyNot], ...]] = {}


def register(op: str, *candidates: tuple[str, WhyNot]) -> None:
    """Declare the backends of `op`, fastest first; every op also has "torch", which runs anywhere, as the last."""
    assert op not in _CANDIDATES, f"{op} is registered twice"
    _CANDIDATES[op] = (*candidates, ("torch", lambda device_type: None))


def triton_why_not(device_type: str) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; `pip install triton` on Linux"
    if device_type == "cuda":
        return None
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return f"Triton kernels need a CUDA tensor, got one on {device_type}; move it, or use backend='torch'"


def verdicts(op: str, device_type: str) -> list[Verdict]:
    return [Verdict(name, why_not(device_type)) for name, why_not in _CANDIDATES[op]]


def ops() -> list[str]:
    return list(_CANDIDATES)


def auto(op: str, device_type: str) -> str:
    """The fastest backend that runs. The interpreter is for tests, so `auto` never takes Triton off a GPU."""
    for name, why_not in verdicts(op, device_type):
        if why_not is None and not (name == "triton" and device_type != "cuda"):
            return name
    raise AssertionError("unreachable: torch runs anywhere")


def on_device_of(tensor: torch.Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def pick(op: str, backend: str, tensor: torch.Tensor, *, lacks: tuple[str, str | None] = ("", None)) -> str:
    """The backend to run `op` with on `tensor`'s device; raises ValueError (unknown) or RuntimeError (cannot run).

    lacks  (a backend, why it has not the case at hand, or None): asked for it raises, `auto` takes torch
    """
    chosen = _pick(op, backend, tensor.device.type)
    lacking, reason = lacks
    if reason is None or chosen != lacking:
        return chosen
    if backend == chosen:
        raise RuntimeError(f"{op} cannot run with backend={backend!r}: {reason}; use backend='torch'")
    return "torch"


@torch.compiler.assume_constant_result
def _pick(op: str, backend: str, device_type: str) -> str:
    if backend == "auto":
        return auto(op, device_type)
    known = {verdict.backend: verdict.why_not for verdict in verdicts(op, device_type)}
    if backend not in known:
        raise ValueError(f"backend of {op} must be one of {['auto', *known]}, got {backend!r}")
    if known[backend] is not None:
        raise RuntimeError(f"{op} cannot run with backend={backend!r}: {known[backend]}")
    return backend
