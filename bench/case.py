"""What a case declares: inputs, an fp64 truth, and providers that compute the same thing. No timing code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Provider:
    run: Callable[[Any], Outputs]
    why_not: Callable[[str], str | None] = lambda device: None
    """Why it cannot run on a device type, with what would work."""
    floor: bool = False
    """Part of the work alone, below which nobody gets: timed, and its outputs, which answer nothing, unchecked."""


@dataclass(frozen=True)
class Case:
    stem: str
    name: str
    shape: dict[str, int]
    dtype: str
    inputs: Callable[[torch.device], Any]
    truth: Callable[[Any], Outputs]
    """The answer in fp64; every provider but a floor is held against it before any is timed."""
    providers: dict[str, Provider]
    """`ours` and `pytorch` (the plain composition, whose error sets the bar), then the peers."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    flops: float = 0.0
    bytes: float = 0.0
    """FLOPs and bytes of memory traffic that the answer costs at the least: what the roofline is made of."""
    allowed: Callable[[Any], Outputs] | None = None
    """For each output, what a row of ours may err by (2-norm) beyond the relative rule; None: nothing."""
