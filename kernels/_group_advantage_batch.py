"""The second launch: divides advantages by the batch's standard deviation, after taking away the batch's mean for GDPO.

Each program reads the moments that every program of the first launch left, so there may be only so many of those.
"""

import torch
import triton
import triton.language as tl

from ._group_advantage_moments import divisor, pool

PARTIALS = 1024  # programs of the first launch, at most
BLOCK = 1024


@triton.jit
def finish_kernel(
    advantages,  # [N] fp32, in and out; NaN becomes 0
    partials,  # [3, programs] fp64: count, mean, sum of squared deviations
    N,
    programs,
    eps,
    WHITEN: tl.constexpr,
    CORRECTION: tl.constexpr,
    CLAMP: tl.constexpr,
    PARTIALS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.arange(0, PARTIALS)
    exists = program < programs
    count = tl.load(partials + program, mask=exists, other=0.0)
    mean = tl.load(partials + programs + program, mask=exists, other=0.0)
    square = tl.load(partials + 2 * programs + program, mask=exists, other=0.0)
    count, mean, square = pool(count, mean, square)
    std = tl.sqrt(square / tl.maximum(count - CORRECTION, 1.0)).to(tl.float32)
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(advantages + index, mask=index < N, other=0.0)
    advantage = tl.div_rn(value - mean.to(tl.float32) if WHITEN else value, divisor(std, eps, CLAMP))
    tl.store(advantages + index, tl.where(value == value, advantage, 0.0), mask=index < N)


def launch(
    advantages: torch.Tensor,  # [N] fp32, overwritten
    partials: torch.Tensor,  # [3, programs] fp64
    eps: float,
    *,
    whiten: bool,
    correction: int,
    clamp: bool,
) -> None:
    N = len(advantages)
    finish_kernel[(triton.cdiv(N, BLOCK),)](
        advantages,
        partials,
        N,
        partials.shape[1],
        eps,
        WHITEN=whiten,
        CORRECTION=correction,
        CLAMP=clamp,
        PARTIALS=PARTIALS,
        BLOCK=BLOCK,
    )
