"""Gradients of replicated parameters, summed over ranks: every loss is a share of the whole mini-batch's."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import nn

BUCKET = 32 << 20  # bytes of one all-reduce: many small gradients travel together


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """In place. A parameter that no rank used keeps no gradient: the optimizer passes over it, as on one rank."""
    trained = list(parameters)
    used = torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=trained[0].device)
    dist.all_reduce(used, dist.ReduceOp.MAX)
    for bucket in _buckets([p for p, any_rank in zip(trained, used.tolist(), strict=True) if any_rank]):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for parameter, summed in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            parameter.grad = summed.view_as(parameter)


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
