"""Group-relative advantages in one launch: a program takes P groups, M members at a time.

N rewards, R components, G groups in CSR form. Two passes for the moments, so that equal rewards give exactly zero.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _total(rewards, weights, index, here, R: tl.constexpr):
    """Weighted sum of the components that are not NaN, and whether there is one."""
    total = tl.zeros(index.shape, tl.float32)
    live = index < 0
    for k in tl.static_range(R):
        value = tl.load(rewards + index * R + k, mask=here, other=float("nan"))
        present = value == value
        total += tl.where(present, value * tl.load(weights + k), 0.0)
        live = live | present
    return total, live


@triton.jit
def group_advantage_kernel(
    rewards,  # [N, R] fp32
    offsets,  # [G + 1] int64
    weights,  # [R] fp32
    deciding,  # [N] fp32, or unused
    advantages,  # [N] fp32
    means,  # [G] fp32
    stds,  # [G] fp32
    informative,  # [G] bool
    groups,
    eps,
    tol,
    R: tl.constexpr,
    HAS_DECIDING: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    DIVIDE: tl.constexpr,
    CORRECTION: tl.constexpr,
    CLAMP: tl.constexpr,
    RAW_SINGLETON: tl.constexpr,
    ZERO_UNINFORMATIVE: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64) * P + tl.arange(0, P)
    exists = group < groups
    start = tl.load(offsets + group, mask=exists, other=0)
    end = tl.load(offsets + group + 1, mask=exists, other=0)
    longest = tl.max(end - start, 0)
    member = tl.arange(0, M)[None, :]
    infinity = float("inf")

    count, total = tl.zeros([P], tl.float32), tl.zeros([P], tl.float32)
    high, low = tl.full([P], -infinity, tl.float32), tl.full([P], infinity, tl.float32)
    high_d, low_d = high, low
    for first in range(0, longest, M):
        index = start[:, None] + first + member
        here = index < end[:, None]
        value, live = _total(rewards, weights, index, here, R)
        count += tl.sum(live.to(tl.float32), 1)
        total += tl.sum(tl.where(live, value, 0.0), 1)
        high = tl.maximum(high, tl.max(tl.where(live, value, -infinity), 1))
        low = tl.minimum(low, tl.min(tl.where(live, value, infinity), 1))
        if HAS_DECIDING:
            value = tl.load(deciding + index, mask=here, other=infinity)
            live = here
        finite = live & (tl.abs(value) < infinity)
        high_d = tl.maximum(high_d, tl.max(tl.where(finite, value, -infinity), 1))
        low_d = tl.minimum(low_d, tl.min(tl.where(finite, value, infinity), 1))

    flat = high == low
    mean = tl.where(flat, high, total / tl.maximum(count, 1.0))
    alone = flat & False
    if RAW_SINGLETON:
        alone = count == 1.0
        mean = tl.where(alone, 0.0, mean)

    square = tl.zeros([P], tl.float32)
    for first in range(0, longest, M):
        index = start[:, None] + first + member
        value, live = _total(rewards, weights, index, index < end[:, None], R)
        deviation = tl.where(live, value - mean[:, None], 0.0)
        square += tl.sum(deviation * deviation, 1)
    std = tl.sqrt_rn(square / tl.maximum(count - CORRECTION, 1.0))
    std = tl.where(flat | (count <= CORRECTION), 0.0, std)
    std = tl.where(alone, 1.0, std)
    decided = (high_d - low_d) > tol
    tl.store(means + group, tl.where(count > 0, mean, 0.0), mask=exists)
    tl.store(stds + group, std, mask=exists)
    tl.store(informative + group, decided, mask=exists)

    silent = flat & (alone == 0)
    if ZERO_UNINFORMATIVE:
        silent = silent | (decided == 0)
    for first in range(0, longest, M):
        index = start[:, None] + first + member
        here = index < end[:, None]
        value, live = _total(rewards, weights, index, here, R)
        deviation = value - mean[:, None]
        if LEAVE_ONE_OUT:
            deviation *= (count / tl.maximum(count - 1.0, 1.0))[:, None]
        if DIVIDE:
            divisor = tl.maximum(std, eps) if CLAMP else std + eps
            deviation = deviation / divisor[:, None]
        kept = live & (silent == 0)[:, None]
        tl.store(advantages + index, tl.where(kept, deviation, 0.0), mask=here)


def tile(count: int, groups: int) -> tuple[int, int]:
    """(P groups, M members) of a program: 512 rewards, shaped like the average group."""
    members = min(max(triton.next_power_of_2(triton.cdiv(count, max(groups, 1))), 4), 512)
    return 512 // members, members


def launch(
    rewards_NR: torch.Tensor,  # fp32, contiguous
    offsets: torch.Tensor,  # int64 [G + 1]
    weights: torch.Tensor,  # fp32 [R]
    deciding: torch.Tensor | None,  # fp32 [N]
    *,
    leave_one_out: bool,
    divide: bool,
    correction: int,
    eps: float,
    clamp: bool,
    raw_singleton: bool,
    tol: float,
    zero_uninformative: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Advantages [N], mean, std, informative [G]."""
    (count, components), groups = rewards_NR.shape, len(offsets) - 1
    advantages = rewards_NR.new_empty(count)
    means, stds = rewards_NR.new_empty(groups), rewards_NR.new_empty(groups)
    informative = rewards_NR.new_empty(groups, dtype=torch.bool)
    if groups:
        P, M = tile(count, groups)
        group_advantage_kernel[(triton.cdiv(groups, P),)](
            rewards_NR,
            offsets,
            weights,
            rewards_NR if deciding is None else deciding,
            advantages,
            means,
            stds,
            informative,
            groups,
            eps,
            tol,
            R=components,
            HAS_DECIDING=deciding is not None,
            LEAVE_ONE_OUT=leave_one_out,
            DIVIDE=divide,
            CORRECTION=correction,
            CLAMP=clamp,
            RAW_SINGLETON=raw_singleton,
            ZERO_UNINFORMATIVE=zero_uninformative,
            P=P,
            M=M,
        )
    return advantages, means, stds, informative
