"""Gradients of replicated parameters, summed over ranks: every loss is a share of the whole mini-batch's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

BUCKET = 32 << 20  # bytes of one all-reduce: many small gradients travel together


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """In place, but for what is sharded: FSDP has summed that.

    A parameter that no rank used keeps no gradient: the optimizer passes over it, as on one rank.
    """
    trained = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
    if not trained:
        return
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for bucket in _buckets([p for p, any_rank in zip(trained, used.tolist(), strict=True) if any_rank]):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = summed.view_as(parameter)


@torch.no_grad()
def clip(parameters: Iterable[nn.Parameter], largest: float) -> torch.Tensor:
    """`nn.utils.clip_grad_norm_` over whole and sharded gradients together; returns the norm before."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    sharded = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    if not sharded:
        return nn.utils.clip_grad_norm_(parameters, largest)
    whole = [grad for grad in grads if not isinstance(grad, DTensor)]
    squares = nn.utils.get_total_norm(sharded).square()
    dist.all_reduce(squares)
    norm = (squares + nn.utils.get_total_norm(whole).square()).sqrt()
    factor = (largest / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_([*whole, *sharded], factor)
    return norm


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Runs of one dtype."""
    bucket: list[nn.Parameter] = []
    held = 0
    for parameter in parameters:
        if bucket and (held + parameter.nbytes > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += parameter.nbytes
    if bucket:
        yield bucket
