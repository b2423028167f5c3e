"""PriorityIndex: 4,096 of N out of an index that is built, with and without replacement, and an update of 4,096.

No two samplers draw the same indices. Each answers with the share of its draw in four bins of the priority, which every right
one must agree on but for chance; ours and the torch backend draw the same. An update answers with the total.
"""

from __future__ import annotations

import importlib
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from bench.case import Case, Provider
from r1v2_fast.ops import PriorityIndex

K, SEED, BINS = 4096, 3, 4


class Inputs(NamedTuple):
    ours: PriorityIndex
    torch_backend: PriorityIndex
    priorities: torch.Tensor  # [N]
    cumulative: torch.Tensor  # [N] fp64, for those who search it
    indices: torch.Tensor  # [K] to update, distinct
    updates: torch.Tensor  # [K]
    segment_tree: Any  # torchrl's, where it loads


def inputs(n: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    priorities = torch.rand(n, generator=generator)
    indices = torch.randint(0, n - K, (K,), generator=generator).sort().values + torch.arange(K)
    updates = priorities[indices].flip(0)
    priorities, indices, updates = (tensor.to(device) for tensor in (priorities, indices, updates))
    ours, torch_backend = (PriorityIndex(n, device=device, backend=backend) for backend in ("auto", "torch"))
    for index in (ours, torch_backend):
        index.load_state_dict({"alpha": 1.0, "priorities": priorities})
    tree = None
    if torchrl_why_not(device.type) is None:
        tree = importlib.import_module("torchrl._torchrl").SumSegmentTreeFp32(n)
        tree[torch.arange(n)] = priorities
    return Inputs(ours, torch_backend, priorities, priorities.double().cumsum(0), indices, updates, tree)


def torchrl_why_not(device: str) -> str | None:
    if device != "cpu":
        return "torchrl keeps its CUDA tree in another package; run it on the CPU"
    try:
        importlib.import_module("torchrl._torchrl")
    except ImportError as error:
        return (
            f"torchrl's extension does not load ({str(error).partition(chr(10))[0][:80]}); install one for this torch"
        )
    return None


def shares(given: Inputs, indices: torch.Tensor):
    drawn = given.priorities[indices].double()
    return (torch.bincount((drawn * BINS).long().clamp(max=BINS - 1), minlength=BINS) / len(drawn),)


def ours(replacement: bool, given: Inputs):
    return shares(given, given.ours.sample(K, seed=SEED, replacement=replacement, check=False).indices)


def torch_backend(replacement: bool, given: Inputs):
    return shares(given, given.torch_backend.sample(K, seed=SEED, replacement=replacement, check=False).indices)


def race(given: Inputs):
    """As it is written in a line of PyTorch, in fp32: E / p of all N."""
    arrivals = torch.empty_like(given.priorities).exponential_().div_(given.priorities)
    return shares(given, arrivals.topk(K, largest=False).indices)


def search(given: Inputs):
    """Sums that are there, and no way to update one of them."""
    u = torch.rand(K, dtype=torch.float64, device=given.priorities.device) * given.cumulative[-1]
    return shares(given, torch.searchsorted(given.cumulative, u, right=True))


def choice(given: Inputs):
    share = given.priorities.double().numpy() / float(given.cumulative[-1])
    return shares(given, torch.from_numpy(np.random.default_rng(SEED).choice(len(share), K, replace=False, p=share)))


def segment_tree(given: Inputs):
    tree = given.segment_tree
    mass = torch.rand(K) * tree.query(0, len(given.priorities))
    return shares(given, tree.scan_lower_bound(mass))


def update(given: Inputs):
    given.ours.update(given.indices, given.updates, check=False)
    return (given.ours.total,)


def recumulate(given: Inputs):
    """What a draw by search needs anew after any update."""
    updated = given.priorities.index_copy(0, given.indices, given.updates).double().cumsum(0)
    return (updated[-1],)


def update_tree(given: Inputs):
    given.segment_tree[given.indices] = given.updates
    return (torch.tensor(given.segment_tree.query(0, len(given.priorities))),)


def updated_total(given: Inputs):
    return (given.priorities.double().index_copy(0, given.indices, given.updates.double()).sum(),)


def case(n: int, name: str, truth, providers: dict[str, Provider]) -> Case:
    return Case(
        stem="priority_index",
        name=name,
        shape={"N": n, "k": K},
        dtype="float32",
        inputs=partial(inputs, n),
        truth=truth,
        providers=providers,
        bytes=16.0 * K,  # a priority, an index and a share each
    )


def cases(n: int) -> list[Case]:
    on_cpu = lambda device: None if device == "cpu" else "NumPy draws on the CPU"  # noqa: E731
    without = {
        "ours": Provider(partial(ours, False)),
        "pytorch": Provider(race),
        "torch backend": Provider(partial(torch_backend, False)),
        "numpy choice": Provider(choice, on_cpu),
    }
    with_replacement = {
        "ours": Provider(partial(ours, True)),
        "pytorch": Provider(search),
        "torchrl sum tree": Provider(segment_tree, torchrl_why_not),
    }
    updates = {
        "ours": Provider(update),
        "pytorch": Provider(recumulate),
        "torchrl sum tree": Provider(update_tree, torchrl_why_not),
    }
    return [
        case(n, f"{K} of N without replacement, index built", partial(torch_backend, False), without),
        case(n, f"{K} of N with replacement, index built", partial(torch_backend, True), with_replacement),
        case(n, f"update of {K}, ready to draw", updated_total, updates),
    ]


CASES = cases((1 << 24) + 1)
