"""Two gloo ranks: each takes half of the batch, and the sum of their gradients is the whole batch's."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from r1v2_fast import ops
from r1v2_fast.ops._policy_loss_settings import KINDS

B, T, H, V = 6, 4, 8, 31
NORMALIZER = {name: B if kind.aggregate.startswith("seq_mean") else B * T for name, kind in KINDS.items()}


def batch():
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(B * T, H, generator=g, dtype=torch.float64)
    weight = torch.randn(V, H, generator=g, dtype=torch.float64)
    targets = torch.randint(0, V, (B * T,), generator=g)
    old = -torch.rand(B * T, generator=g, dtype=torch.float64) * 3
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0], dtype=torch.float64)
    return hidden, weight, targets, old, ops.group_advantages(rewards, B // 2).advantages


def policy_gradient(sequences: slice, kind: str):
    """d loss / d weight on these sequences, with the whole batch's normaliser."""
    hidden, weight, targets, old, advantages = batch()
    tokens = slice(sequences.start * T, sequences.stop * T)
    weight.requires_grad_()
    logprobs = ops.linear_logprobs(hidden[tokens], weight, targets[tokens]).logprobs
    offsets = torch.arange(0, len(logprobs) + 1, T)
    ops.policy_loss(
        logprobs,
        old[tokens],
        advantages[sequences],
        offsets=offsets,
        kind=kind,
        normalizer=NORMALIZER[kind],
        clip_high=5.0 if kind == "cispo" else 0.2,
    ).loss.backward()
    return weight.grad


def rewards_of(rank: int):
    """Rank 0 holds three pairs, rank 1 one: a mean of means would be wrong."""
    chosen, rejected = torch.tensor([1.0, 2.0, 4.0, 0.5]), torch.tensor([-1.0, 0.5, 0.25, -2.0])
    own = slice(0, 3) if rank == 0 else slice(3, 4)
    return chosen[own], rejected[own]


def on_rank(rank: int, port: int):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        own = slice(0, B // 2) if rank == 0 else slice(B // 2, B)
        for kind in KINDS:
            summed = policy_gradient(own, kind)
            dist.all_reduce(summed)
            whole = policy_gradient(slice(0, B), kind)
            assert (summed - whole).abs().max() <= 1e-10 * whole.abs().max()
            assert whole.abs().max() > 0
        shift = ops.RewardShift()
        for _ in range(2):
            shift.update(*rewards_of(rank))
        every = torch.cat([*rewards_of(0), *rewards_of(1)]).double()
        assert abs(shift.delta.item() - every.mean().item()) <= 1e-6 and shift.count == 2 * len(every)
    finally:
        dist.destroy_process_group()


def test_two_ranks_make_the_gradient_and_the_shift_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(on_rank, args=(port,), nprocs=2)
