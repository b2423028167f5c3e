"""sample_by_priority: 4,096 of N without replacement, against what else draws so.

No two of them draw the same indices. Each answers with the share of its draw in four bins of the priority, which every right one
must agree on but for chance; ours and the torch backend draw the same.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from bench.case import Case, Provider
from r1v2_fast.ops import sample_by_priority

K, SEED, BINS = 4096, 3, 4


def inputs(n: int, device: torch.device) -> torch.Tensor:
    return torch.rand(n, generator=torch.Generator().manual_seed(0)).to(device)


def shares(priorities: torch.Tensor, indices: torch.Tensor):
    drawn = priorities[indices].double()
    return (torch.bincount((drawn * BINS).long().clamp(max=BINS - 1), minlength=BINS) / len(drawn),)


def ours(alpha: float, backend: str, priorities: torch.Tensor):
    sample = sample_by_priority(priorities, K, seed=SEED, alpha=alpha, check=False, backend=backend)
    return shares(priorities, sample.indices)


def truth(alpha: float, priorities: torch.Tensor):
    """The same draw, from every key in fp64."""
    return ours(alpha, "torch", priorities.double())


def race(alpha: float, priorities: torch.Tensor):
    """As it is written in a line of PyTorch, in fp32: E / p^alpha."""
    arrivals = torch.empty_like(priorities).exponential_().div_(priorities if alpha == 1 else priorities**alpha)
    return shares(priorities, arrivals.topk(K, largest=False).indices)


def multinomial(alpha: float, priorities: torch.Tensor):
    mass = priorities if alpha == 1 else priorities**alpha
    return shares(priorities, mass.multinomial(K))


def choice(alpha: float, priorities: torch.Tensor):
    mass = priorities.double().numpy() ** alpha
    drawn = np.random.default_rng(SEED).choice(len(mass), K, replace=False, p=mass / mass.sum())
    return shares(priorities, torch.from_numpy(drawn))


def case(n: int, alpha: float) -> Case:
    def at(function):
        return partial(function, alpha)

    on_cpu = lambda device: None if device == "cpu" else "NumPy draws on the CPU"  # noqa: E731
    capped = lambda device: None if n <= 1 << 24 else "torch.multinomial takes 2^24 categories"  # noqa: E731
    short = lambda device: None if n <= 1 << 20 else "it makes and sorts every key: tens of seconds"  # noqa: E731
    return Case(
        stem="priority_sample",
        name=f"{K} of N without replacement, alpha {alpha:g}",
        shape={"N": n, "k": K},
        dtype="float32",
        inputs=partial(inputs, n),
        truth=at(truth),
        providers={
            "ours": Provider(partial(ours, alpha, "auto")),
            "pytorch": Provider(at(race)),
            "torch backend": Provider(partial(ours, alpha, "torch"), short),
            "torch.multinomial": Provider(at(multinomial), capped),
            "numpy choice": Provider(at(choice), on_cpu),
        },
        bytes=4.0 * n,
    )


CASES = [case(1 << 20, 1.0), case((1 << 24) + 1, 1.0), case((1 << 24) + 1, 0.6)]
