"""Group-relative advantages in one launch, or two where the batch's moments are needed (scale="batch", GDPO).

N rewards, R components, G groups: of one SIZE, or in CSR form with SIZE = 0. A program takes P groups, M members each, in
one read; a group longer than M takes the whole program, WIDE members at a time, in two. NaN in an advantage stands for a
reward that has none (unscorable, or among equals) until the last write makes it 0.
"""

import torch
import triton
import triton.language as tl

from . import _group_advantage_batch as second
from ._group_advantage_moments import divisor, extend, extent, merge, nothing, pool, root, statistics_of

LIMIT = tl.constexpr(2.0**59)
WIDE = 1024  # rewards that a program holds at once: eight a thread
RAGGED = 512  # of groups in CSR form: their bounds and moments take as many registers again
OPTIONS = {"maxnreg": 255}  # else ptxas spills around division's slow path for the sake of occupancy


@triton.jit
def _bounds(offsets, group, N, groups, SIZE: tl.constexpr):
    """Where groups start and end, inside [0, N], and 0.0, or NaN where the offsets are wrong."""
    exists = group < groups
    if SIZE > 0:
        start = group * SIZE
        end = tl.where(exists, start + SIZE, start)
        wrong = group < 0
    else:
        start = tl.load(offsets + group, mask=exists, other=0).to(tl.int64)
        end = tl.load(offsets + group + 1, mask=exists, other=0).to(tl.int64)
        first, last = group == 0, group == groups - 1
        wrong = (start < 0) | (end > N) | (end < start) | (first & (start != 0)) | (last & (end != N))
        start = tl.where(first, 0, tl.minimum(tl.maximum(start, 0), N))
        end = tl.where(last, N, tl.minimum(tl.maximum(end, 0), N))
    return start, end, tl.where(wrong, float("nan"), 0.0)


@triton.jit
def _plus(sum_so_far, part, weights, k, HAS_WEIGHTS: tl.constexpr):
    """NaN is skipped; the sum of nothing else is NaN."""
    if HAS_WEIGHTS:
        part *= tl.load(weights + k).to(tl.float32)
    one, other = sum_so_far == sum_so_far, part == part
    both = tl.where(one, sum_so_far, 0.0) + tl.where(other, part, 0.0)
    return tl.where(one | other, both, float("nan"))


@triton.jit
def _scorable(value):
    """NaN where it is not finite; within LIMIT, as sums and squares beyond would overflow to inf, and inf - inf is NaN."""
    bounded = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
    return tl.where(tl.abs(value) < float("inf"), bounded, float("nan"))


@triton.jit
def _component(rewards, index, here, k, row_stride, column_stride):
    place = rewards + index * row_stride + (index * 0 + k) * column_stride  # int64 before the first product
    return _scorable(tl.load(place, mask=here, other=float("nan")).to(tl.float32))


@triton.jit
def _read(
    rewards, weights, index, here, k: tl.constexpr, row_stride, column_stride, R: tl.constexpr, HAS_WEIGHTS: tl.constexpr
):  # fmt: skip
    """Component k of the rewards, or with k = R their weighted sum; NaN where it is not finite."""
    if k < R:
        value = _component(rewards, index, here, k, row_stride, column_stride)
    else:
        value = tl.full(index.shape, float("nan"), tl.float32)
        for c in tl.static_range(R):
            part = _component(rewards, index, here, c, row_stride, column_stride)
            value = _plus(value, part, weights, c, HAS_WEIGHTS)
        value = _scorable(value)
    return value


@triton.jit
def _walk(
    rewards, weights, index, end, k: tl.constexpr, row_stride, column_stride,
    R: tl.constexpr, HAS_WEIGHTS: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """Statistics of what `_read` gives, from `index` to `end`, M members at a time."""
    statistics = nothing(P)
    for first in range(0, tl.max(end - tl.min(index, 1), 0), M):
        here = index + first < end[:, None]
        value = _read(rewards, weights, index + first, here, k, row_stride, column_stride, R, HAS_WEIGHTS)
        statistics = extend(statistics, value)
    return statistics


@triton.jit
def _centre(statistics, eps, CORRECTION: tl.constexpr, CLAMP: tl.constexpr, RAW_SINGLETON: tl.constexpr):
    """Count, pivot, mean less the pivot, std; and the divisor of deviations, NaN where equals leave nothing to learn."""
    count, pivot, shift, square, high, low = statistics
    std = root(square, count, CORRECTION)
    equal = high == low
    if RAW_SINGLETON:
        alone = count == 1.0
        equal = equal & (alone == 0)
        pivot, shift, std = tl.where(alone, 0.0, pivot), tl.where(alone, 0.0, shift), tl.where(alone, 1.0, std)
    return count, pivot, shift, std, tl.where(equal, float("nan"), divisor(std, eps, CLAMP))


@triton.jit
def _normalised(value, centre, LEAVE_ONE_OUT: tl.constexpr, DIVIDE: tl.constexpr):
    count, pivot, shift, _, spread = centre
    advantage = (value - pivot[:, None]) - shift[:, None]
    if LEAVE_ONE_OUT:
        advantage *= tl.div_rn(count, tl.maximum(count - 1.0, 1.0))[:, None]
    if DIVIDE:
        advantage = tl.div_rn(advantage, spread[:, None])
    else:
        advantage *= tl.where(spread == spread, 1.0, spread)[:, None]
    return advantage


@triton.jit
def _groups(
    batch, group, wanted, rewards, offsets, weights, deciding, advantages, means, stds, informative, N, groups,
    row_stride, column_stride, deciding_stride, eps, tol, R: tl.constexpr, SIZE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    HAS_DECIDING: tl.constexpr, GDPO: tl.constexpr, BATCH: tl.constexpr, LEAVE_ONE_OUT: tl.constexpr,
    DIVIDE: tl.constexpr, CORRECTION: tl.constexpr, CLAMP: tl.constexpr, RAW_SINGLETON: tl.constexpr,
    ZERO_UNINFORMATIVE: tl.constexpr, P: tl.constexpr, M: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    """The wanted of P groups, M members at a time (HELD: M are all). Returns the batch's moments with theirs added."""
    start, end, poison = _bounds(offsets, group, N, groups, SIZE)
    end = tl.where(wanted, end, start)
    index = start[:, None] + tl.arange(0, M)[None, :]
    longest = M if HELD else tl.max(end - start, 0)
    centres = ()
    for k in tl.static_range(0 if GDPO else R, R + 1):  # the last, which `value` and `statistics` stay, is the totals
        if HELD:
            value = _read(rewards, weights, index, index < end[:, None], k, row_stride, column_stride, R, HAS_WEIGHTS)
            statistics = statistics_of(value)
        else:
            statistics = _walk(rewards, weights, index, end, k, row_stride, column_stride, R, HAS_WEIGHTS, P, M)
        centre = _centre(statistics, eps, CORRECTION, CLAMP, RAW_SINGLETON)
        centres = centres + (centre,)  # type: ignore[assignment]  # noqa: RUF005  (Triton does not unpack)
    high, low = statistics[4], statistics[5]
    if HAS_DECIDING:
        high, low = tl.full([P], -float("inf"), tl.float32), tl.full([P], float("inf"), tl.float32)
        for first in range(0, longest, M):
            here = index + first < end[:, None]
            other = tl.load(deciding + (index + first) * deciding_stride, mask=here, other=0).to(tl.float32)
            other = tl.where(here, other, float("nan"))  # not in the load: a bool or an int has no NaN
            more_high, more_low = extent(other)
            high, low = tl.maximum(high, more_high), tl.minimum(low, more_low)
    decided = high - low > tol
    _, pivot, shift, std, _ = centre
    tl.store(means + group, pivot + shift + poison, mask=wanted)
    tl.store(stds + group, std + poison, mask=wanted)
    tl.store(informative + group, decided, mask=wanted)

    summed = nothing(P)
    for first in range(0, longest, M):
        here = index + first < end[:, None]
        if not HELD:
            value = _read(rewards, weights, index + first, here, R, row_stride, column_stride, R, HAS_WEIGHTS)
        if GDPO:
            advantage = tl.full(value.shape, float("nan"), tl.float32)
            for k in tl.static_range(R):
                part = _component(rewards, index + first, here, k, row_stride, column_stride)
                part = _normalised(part, centres[k], LEAVE_ONE_OUT, DIVIDE)
                advantage = _plus(advantage, part, weights, k, HAS_WEIGHTS)
            advantage = tl.where(value == value, advantage, float("nan"))
            summed = extend(summed, tl.where((value == value) & (advantage != advantage), 0.0, advantage))
        else:
            advantage = _normalised(value, centre, LEAVE_ONE_OUT, DIVIDE)
        if ZERO_UNINFORMATIVE:
            advantage = tl.where(decided[:, None], advantage, float("nan"))
        if not BATCH:
            advantage = tl.where(advantage == advantage, advantage, 0.0) + poison[:, None]
        tl.store(advantages + index + first, advantage, mask=here)
    if BATCH:
        count, pivot, shift, square, _, _ = summed if GDPO else statistics
        more = pool(count, pivot + shift, square + poison)
        batch = merge(batch[0], batch[1], batch[2], more[0], more[1], more[2])
    return batch


@triton.jit
def group_advantage_kernel(
    rewards,  # [N, R] fp32, bf16 or fp16, by strides
    offsets,  # [G + 1] int32 or int64, or unused
    weights,  # [R], or unused
    deciding,  # [N], or unused
    advantages,  # [N] fp32
    means,  # [G] fp32
    stds,  # [G] fp32
    informative,  # [G] bool
    partials,  # [3, programs] fp64: count, mean and squares of what each program adds to the batch; or unused
    N,
    groups,
    row_stride,
    column_stride,
    deciding_stride,
    eps,
    tol,
    R: tl.constexpr,
    SIZE: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_DECIDING: tl.constexpr,
    GDPO: tl.constexpr,
    BATCH: tl.constexpr,
    LEAVE_ONE_OUT: tl.constexpr,
    DIVIDE: tl.constexpr,
    CORRECTION: tl.constexpr,
    CLAMP: tl.constexpr,
    RAW_SINGLETON: tl.constexpr,
    ZERO_UNINFORMATIVE: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    WIDE: tl.constexpr,
):
    zero = tl.full((), 0.0, tl.float64)
    batch = (zero, zero, zero)
    rank = tl.arange(0, P)
    for tile in range(tl.program_id(0), tl.cdiv(groups, P), tl.num_programs(0)):
        group = rank.to(tl.int64) + tile * P
        start, end, _ = _bounds(offsets, group, N, groups, SIZE)
        long = end - start > M
        if SIZE <= M:
            wanted = (group < groups) & (long == 0)
            batch = _groups(
                batch, group, wanted, rewards, offsets, weights, deciding, advantages, means, stds, informative, N, groups,
                row_stride, column_stride, deciding_stride, eps, tol, R, SIZE, HAS_WEIGHTS, HAS_DECIDING, GDPO, BATCH,
                LEAVE_ONE_OUT, DIVIDE, CORRECTION, CLAMP, RAW_SINGLETON, ZERO_UNINFORMATIVE, P, M, True,
            )  # fmt: skip
        if SIZE == 0 or SIZE > M:
            following = tl.min(tl.where(long, rank, P), 0)
            while following < P:
                one = tl.arange(0, 1).to(tl.int64) + tile * P + following
                batch = _groups(
                    batch, one, one < groups, rewards, offsets, weights, deciding, advantages, means, stds, informative, N,
                    groups, row_stride, column_stride, deciding_stride, eps, tol, R, SIZE, HAS_WEIGHTS, HAS_DECIDING, GDPO,
                    BATCH, LEAVE_ONE_OUT, DIVIDE, CORRECTION, CLAMP, RAW_SINGLETON, ZERO_UNINFORMATIVE, 1, WIDE, False,
                )  # fmt: skip
                following = tl.min(tl.where(long & (rank > following), rank, P), 0)
    if BATCH:
        mine = partials + tl.program_id(0)
        tl.store(mine, batch[0])
        tl.store(mine + tl.num_programs(0), batch[1])
        tl.store(mine + 2 * tl.num_programs(0), batch[2])


def tile(size: int, average: int) -> tuple[int, int]:
    """(P groups, M members) that a program holds: of one size exactly; of none (0), room for twice the average."""
    room = WIDE if size else RAGGED
    members = min(triton.next_power_of_2(size or max(2 * average, 1)), room)
    return room // members, members


def launch(
    rewards_NR: torch.Tensor,  # fp32, bf16 or fp16
    offsets: torch.Tensor | None,  # int32 or int64 [G + 1], contiguous
    size: int,  # of every group where offsets is None
    weights: torch.Tensor | None,  # [R], contiguous
    deciding: torch.Tensor | None,  # [N]
    *,
    gdpo: bool,
    leave_one_out: bool,
    scale: str,
    correction: int,
    eps: float,
    clamp: bool,
    raw_singleton: bool,
    tol: float,
    zero_uninformative: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Advantages [N], mean, std, informative [G]."""
    N, R = rewards_NR.shape
    groups = N // size if offsets is None else len(offsets) - 1
    advantages, means, stds = (rewards_NR.new_empty(n, dtype=torch.float32) for n in (N, groups, groups))
    informative = rewards_NR.new_empty(groups, dtype=torch.bool)
    if not groups:
        return advantages, means, stds, informative
    size = size if offsets is None else 0
    P, M = tile(size, triton.cdiv(N, groups))
    batch = gdpo or scale == "batch"
    programs = triton.cdiv(groups, P)
    if batch:
        programs = min(programs, second.PARTIALS)
    partials = advantages.new_empty(3, programs, dtype=torch.float64) if batch else advantages
    group_advantage_kernel[(programs,)](
        rewards_NR,
        rewards_NR if offsets is None else offsets,
        rewards_NR if weights is None else weights,
        rewards_NR if deciding is None else deciding,
        advantages,
        means,
        stds,
        informative,
        partials,
        N,
        groups,
        *rewards_NR.stride(),
        1 if deciding is None else deciding.stride(0),
        eps,
        tol,
        R=R,
        SIZE=size,
        HAS_WEIGHTS=weights is not None,
        HAS_DECIDING=deciding is not None,
        GDPO=gdpo,
        BATCH=batch,
        LEAVE_ONE_OUT=leave_one_out,
        DIVIDE=scale == "group",
        CORRECTION=correction,
        CLAMP=clamp,
        RAW_SINGLETON=raw_singleton,
        ZERO_UNINFORMATIVE=zero_uninformative,
        P=P,
        M=M,
        WIDE=WIDE,
        **OPTIONS,
    )
    if batch and N:
        second.launch(advantages, partials, eps, whiten=gdpo, correction=correction, clamp=clamp)
    return advantages, means, stds, informative
