"""The row pass of linear_logprobs alone: statistics and the bf16 gradient matrix D from fp32 logits, 6 bytes a logit."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.case import Case, Outputs, Provider
from r1v2_fast.ops import _linear_logprob_native as native
from r1v2_fast.ops._linear_logprob_pass import room, triton_head
from r1v2_fast.ops._linear_logprob_rows import Shaping, raw_of, raw_room

SHAPING = Shaping(None, 1.0, 1.0, None, None)


class Inputs(NamedTuple):
    logits: torch.Tensor  # [n, V] fp32, rows padded to 128 bytes
    targets: torch.Tensor
    raw: torch.Tensor  # [10, n] fp32, overwritten
    matrix: torch.Tensor  # [n, V] bf16, overwritten


def inputs(n: int, v: int):
    def make(device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        like = torch.empty(0, device=device)
        logits = room(like, n, v, torch.float32).normal_(std=4.0, generator=g)
        targets = torch.randint(0, v, (n,), generator=g, device=device)
        return Inputs(logits, targets, raw_room(like, n, torch.float32), room(like, n, v, torch.bfloat16))

    return make


def _statistics(raw: torch.Tensor) -> Outputs:
    """m, the sum of the others, the target's logit."""
    return tuple(raw_of(raw)[:3])


def ours(given: Inputs) -> Outputs:
    """Triton's row kernel."""
    from r1v2_fast.kernels import linear_logprob as kernel

    head = triton_head(given.logits, SHAPING, slice(None), padded=True)
    kernel.launch(head, given.targets, given.raw, given.matrix, (), padded=True)
    return _statistics(given.raw)


def cluster(given: Inputs) -> Outputs:
    head = triton_head(given.logits, SHAPING, slice(None), padded=True)
    native.launch(head, given.targets, given.raw, given.matrix, (), own=True)
    return _statistics(given.raw)


def _formula(given: Inputs, dtype: torch.dtype) -> Outputs:
    z, index = given.logits.to(dtype), given.targets[:, None]
    top, target = z.amax(1), z.gather(1, index)
    e = (z - top[:, None]).exp_().scatter_(1, index, 0)
    others = e.sum(1)
    given.matrix.copy_(e)
    given.matrix.scatter_(1, index, -others[:, None].bfloat16())
    return top, others, target.squeeze(1)


def case(n: int, v: int) -> Case:
    def cluster_why_not(device: str) -> str | None:
        return native.why_not(device) or native.lacks(torch.empty(0, device=device), v)

    return Case(
        stem="linear_logprob",
        name="row pass alone",
        shape={"N": n, "V": v},
        dtype="float32",
        inputs=inputs(n, v),
        truth=lambda given: _formula(given, torch.float64),
        providers={
            "ours": Provider(ours),
            "pytorch": Provider(lambda given: _formula(given, torch.float32)),
            "cluster rows": Provider(cluster, cluster_why_not),
        },
        devices=("cuda",),
        bytes=6.0 * n * v,
    )


CASES = [case(1024, 152064), case(1024, 151674), case(1024, 128256), case(1024, 32000), case(512, 262144)]
