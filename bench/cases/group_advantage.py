"""group_advantages: groups of 8, against a view of the rewards as a matrix (which ragged groups do not have)."""

from __future__ import annotations

import torch

from bench.case import Case, Provider
from r1v2_fast.ops import group_advantages

GROUP = 8


def inputs(n: int):
    def make(device: torch.device) -> torch.Tensor:
        return torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)

    return make


def pytorch(rewards: torch.Tensor):
    groups = rewards.view(-1, GROUP)
    return (((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1),)


def ours(rewards: torch.Tensor):
    return (group_advantages(rewards, GROUP).advantages,)


def case(n: int, devices: tuple[str, ...]) -> Case:
    return Case(
        stem="group_advantage",
        name="groups of 8",
        shape={"N": n},
        dtype="float32",
        inputs=inputs(n),
        truth=lambda rewards: pytorch(rewards.double()),
        providers={"ours": Provider(ours), "pytorch": Provider(pytorch)},
        devices=devices,
        bytes=8.0 * n,
    )


CASES = [case(1 << 16, ("cpu",)), case(1 << 20, ("cuda",))]
