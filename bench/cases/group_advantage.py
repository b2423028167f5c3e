"""group_advantages: groups of 8, and of 1 to 16, against PyTorch's plain formula and what trainers do.

N rewards, G groups. verl takes token rewards [N, T] and group ids: here one token, and the ids in NumPy as it passes them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from bench.case import Case, Provider
from bench.peers_linear_logprob import _from, compiled
from bench.peers_losses import PEERS
from r1v2_fast.ops import group_advantages

GROUP = 8
EPS = 1e-4


class Ragged(NamedTuple):
    rewards: torch.Tensor  # [N]
    offsets: torch.Tensor  # [G + 1]
    group: torch.Tensor  # [N] int64: for PyTorch
    ids: np.ndarray  # [N] int64: for verl


def inputs(n: int):
    def make(device: torch.device) -> torch.Tensor:
        return torch.randn(n, generator=torch.Generator().manual_seed(0)).to(device)

    return make


def ragged(n: int):
    def make(device: torch.device) -> Ragged:
        sizes = torch.randint(1, 17, (n,), generator=torch.Generator().manual_seed(0))
        ends = sizes.cumsum(0)
        offsets = torch.cat([ends.new_zeros(1), ends[ends < n], ends.new_tensor([n])])
        group = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())
        return Ragged(inputs(n)(device), offsets.to(device), group.to(device), group.numpy())

    return make


def ours(rewards: torch.Tensor):
    return (group_advantages(rewards, GROUP).advantages,)


def ours_ragged(given: Ragged):
    return (group_advantages(given.rewards, given.offsets, singleton="raw").advantages,)


def pytorch(rewards: torch.Tensor):
    groups = rewards.view(-1, GROUP)
    return (((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + EPS)).view(-1),)


def pytorch_ragged(given: Ragged):
    rewards, group = given.rewards, given.group
    zeros = rewards.new_zeros(len(given.offsets) - 1)
    count = zeros.index_add(0, group, torch.ones_like(rewards))
    alone = count == 1  # verl: mean 0, std 1
    mean = (zeros.index_add(0, group, rewards) / count).masked_fill(alone, 0)
    deviation = rewards - mean[group]
    square = zeros.index_add(0, group, deviation.square())
    std = (square / (count - 1).clamp(min=1)).sqrt().masked_fill(alone, 1)
    return (deviation / (std + EPS)[group],)


def trl(rewards: torch.Tensor):
    """Inline in its GRPOTrainer, so its formula: every group's mean and its own `nanstd` repeated over the group."""
    groups = rewards.view(-1, GROUP)
    mean = groups.nanmean(1).repeat_interleave(GROUP, 0)
    std = _from("trl.trainer.utils", "nanstd")(groups, dim=1).repeat_interleave(GROUP, 0)
    return (((rewards - mean) / (std + EPS)).nan_to_num(nan=0.0),)


def verl(estimator: str):
    def run(rewards: torch.Tensor, ids: np.ndarray):
        function = _from("verl.trainer.ppo.core_algos", "get_adv_estimator_fn")(estimator)
        token = torch.ones(len(rewards), 1, device=rewards.device)
        return (function(rewards[:, None], token, ids, epsilon=EPS)[0].squeeze(1),)

    def why_not(device: str) -> str | None:
        if estimator == "grpo" and device == "cuda":
            return "its loop over single rewards takes minutes at this size"
        return PEERS["verl"].why_not(device)

    uniform = Provider(lambda rewards: run(rewards, np.arange(len(rewards)) // GROUP), why_not)
    return uniform, Provider(lambda given: run(given.rewards, given.ids), why_not)


ESTIMATORS = {f"verl {name}": verl(name) for name in ("grpo", "grpo_vectorized")}


def uniform_case(n: int, devices: tuple[str, ...]) -> Case:
    return Case(
        stem="group_advantage",
        name="groups of 8",
        shape={"N": n},
        dtype="float32",
        inputs=inputs(n),
        truth=lambda rewards: pytorch(rewards.double()),
        providers={
            "ours": Provider(ours),
            "pytorch": Provider(pytorch),
            "compile": Provider(compiled(pytorch)),
            "trl": Provider(trl, PEERS["trl"].why_not),
            **{name: providers[0] for name, providers in ESTIMATORS.items()},
        },
        devices=devices,
        bytes=8.0 * n,
    )


def ragged_case(n: int, devices: tuple[str, ...]) -> Case:
    return Case(
        stem="group_advantage",
        name="groups of 1 to 16",
        shape={"N": n},
        dtype="float32",
        inputs=ragged(n),
        truth=lambda given: pytorch_ragged(given._replace(rewards=given.rewards.double())),
        providers={
            "ours": Provider(ours_ragged),
            "pytorch": Provider(pytorch_ragged),
            "compile": Provider(compiled(pytorch_ragged)),
            "trl": Provider(trl, lambda device: "it takes groups of one size only"),
            **{name: providers[1] for name, providers in ESTIMATORS.items()},
        },
        devices=devices,
        bytes=8.0 * n + 8.0 * n / 8.5,
    )


CASES = [
    uniform_case(1 << 16, ("cpu",)),
    ragged_case(1 << 16, ("cpu",)),
    uniform_case(1 << 20, ("cuda",)),
    ragged_case(1 << 20, ("cuda",)),
]
