"""sample_by_priority without replacement, against the torch backend: the same draw, share by share."""

from __future__ import annotations

import torch

from bench.case import Case, Provider
from r1v2_fast.ops import sample_by_priority

K = 4096
SEED = 3


def inputs(n: int):
    def make(device: torch.device) -> torch.Tensor:
        return torch.rand(n, generator=torch.Generator().manual_seed(0)).to(device)

    return make


def ours(priorities: torch.Tensor):
    return (sample_by_priority(priorities, K, seed=SEED, check=False).probabilities,)


def pytorch(priorities: torch.Tensor):
    return (sample_by_priority(priorities, K, seed=SEED, check=False, backend="torch").probabilities,)


def truth(priorities: torch.Tensor):
    return (sample_by_priority(priorities.double(), K, seed=SEED, backend="torch").probabilities,)


def case(n: int) -> Case:
    return Case(
        stem="priority_sample",
        name=f"{K} of N without replacement",
        shape={"N": n, "k": K},
        dtype="float32",
        inputs=inputs(n),
        truth=truth,
        providers={"ours": Provider(ours), "pytorch": Provider(pytorch)},
        bytes=4.0 * n,
    )


CASES = [case(1 << 20)]
