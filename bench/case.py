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


@dataclass(frozen=True)
class Case:
    stem: str
    name: str
    shape: dict[str, int]
    dtype: str
    inputs: Callable[[torch.device], Any]
    truth: Callable[[Any], Outputs]
    """The answer in fp64; every provider is held against it before any is timed."""
    providers: dict[str, Provider]
    """`ours` and `pytorch` (the plain composition, whose error sets the bar), then the peers."""
    devices: tuple[str, ...] = ("cpu", "cuda")
    flops: float = 0.0
    bytes: float = 0.0
