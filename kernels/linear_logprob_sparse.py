"""The row-sparse hidden gradient: which entries of a row hold all but a budget of its probability, and their rows of W.

n rows, V vocabulary, H hidden, C candidates a row may have. Entries below budget / C are dropped while they are read (they
cannot weigh more than the budget where fewer than C of them matter); among the rest, which lie in cache by then, bisection
finds the highest threshold within the budget. A row with more than C candidates, or whose rest weighs too much, is left to
the dense matmul. Every sum has one order, so the same row gives the same bits.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._logits import logits_of

STEPS = 20  # of the bisection over some 30 octaves


@triton.jit
def select_kernel(
    logits,  # [n, V] rows `stride` apart
    temperatures,  # [n] fp32, or unused
    bias,
    blocked,  # [V] bool, or unused
    targets,  # [n] int64
    top,  # [n] fp32: m
    whole,  # [n] fp32: S
    room,  # [n, 2 C] int32, scratch: ids, then the bits of p f
    ids_out,  # [n, C] int32, out
    values_out,  # [n, C] fp32, out: p f
    counts,  # [n] int32, out: entries, or -1 for a dense row
    V,
    width,
    stride,
    logit_scale,
    softcap,
    temperature,
    budget,
    lost,  # what sums may have rounded away, relative to the mass
    HAS_BIAS: tl.constexpr,
    HAS_BLOCKED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    C: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(targets + row)
    m, s = tl.load(top + row), tl.load(whole + row)
    if PER_TOKEN:
        temperature = tl.load(temperatures + row)
    room += row * (2 * C)
    floor = budget / C
    lane = tl.arange(0, BLOCK)
    masses = tl.zeros([BLOCK], tl.float32)
    found = tl.full((), 0, tl.int32)
    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        ids = start + lane
        z, f = logits_of(
            logits + row * stride, bias, blocked, ids, V, width, logit_scale, softcap, temperature,
            HAS_BIAS, HAS_BLOCKED, HAS_SCALE, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
        p = tl.exp(z - m) / s
        if HAS_SOFTCAP:
            p *= f
        p = tl.where(ids == t, 0.0, p)
        masses += p
        keep = (p >= floor) & (ids < V)
        more = tl.sum(keep.to(tl.int32), 0)
        if more > 0:  # rare on a peaked row
            place = found + tl.cumsum(keep.to(tl.int32), 0) - 1
            fits = keep & (place < C)
            tl.store(room + place, ids, mask=fits)
            tl.store(room + C + place, p.to(tl.int32, bitcast=True), mask=fits)
        found += more
    mass = tl.sum(masses, 0)

    count = tl.full((), -1, tl.int32)
    if found <= C:
        tl.debug_barrier()  # candidates that other threads wrote are read below
        entry = tl.arange(0, C)
        ids = tl.load(room + entry, mask=entry < found, other=0)
        p = tl.load(room + C + entry, mask=entry < found, other=0).to(tl.float32, bitcast=True)
        within = budget - lost * mass
        if mass - tl.sum(p, 0) <= within:
            low, high = tl.log2(floor) - 1.0, tl.full((), 0.0, tl.float32)  # low keeps every candidate
            for _ in range(STEPS):
                middle = 0.5 * (low + high)
                dropped = mass - tl.sum(tl.where(p >= tl.exp2(middle), p, 0.0), 0)
                low = tl.where(dropped <= within, middle, low)
                high = tl.where(dropped <= within, high, middle)
            keep = (p >= tl.exp2(low)) & (entry < found)
            place = row * C + tl.cumsum(keep.to(tl.int32), 0) - 1
            tl.store(ids_out + place, ids, mask=keep)
            tl.store(values_out + place, p, mask=keep)
            count = tl.sum(keep.to(tl.int32), 0)
    tl.store(counts + row, count)


@triton.jit
def gather_kernel(
    ids,  # [n, C] int32
    values,  # [n, C] fp32: p f
    counts,  # [n] int32, -1: the row is made elsewhere
    targets,  # [n] int64
    whole,  # [n] fp32: S
    at_target,  # [n] fp32: the target's value times S, not positive
    weight,  # [V, H]
    out,  # [n, H] fp32: S (sum of value W[id]) + at_target W[t]
    V,
    H,
    row_stride,
    column_stride,
    C: tl.constexpr,
    COMPUTE: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    count = tl.load(counts + row)
    if count >= 0:
        column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        inside = column < H
        total = tl.zeros([BLOCK], tl.float32)
        for first in range(0, count, K):
            entry = first + tl.arange(0, K)
            there = entry < count
            id = tl.load(ids + row * C + entry, mask=there, other=0).to(tl.int64)
            value = tl.load(values + row * C + entry, mask=there, other=0.0)
            w = tl.load(
                weight + id[:, None] * row_stride + column[None, :] * column_stride,
                mask=there[:, None] & inside[None, :],
                other=0.0,
            )
            total += tl.sum(value[:, None] * w.to(COMPUTE).to(tl.float32), 0)
        total *= tl.load(whole + row)
        t = tl.load(targets + row)
        own = (t >= 0) & (t < V)
        w = tl.load(weight + t * row_stride + column * column_stride, mask=inside & own, other=0.0)
        total += tl.load(at_target + row) * w.to(COMPUTE).to(tl.float32)
        tl.store(out + row * H + column, total, mask=inside)


def launch_select(
    head: dict, targets_n: torch.Tensor, top_n: torch.Tensor, whole_n: torch.Tensor, budget: float, most: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(ids [n, C], values [n, C], counts [n]) of at most C = `most` candidates a row, a power of 2."""
    rows, device = len(targets_n), targets_n.device
    room = torch.empty(rows, 2 * most, dtype=torch.int32, device=device)
    ids = torch.empty(rows, most, dtype=torch.int32, device=device)
    values = torch.empty(rows, most, dtype=torch.float32, device=device)
    counts = torch.empty(rows, dtype=torch.int32, device=device)
    if rows:
        select_kernel[(rows,)](
            **head, targets=targets_n, top=top_n, whole=whole_n, room=room, ids_out=ids, values_out=values,
            counts=counts, budget=budget, lost=32 * torch.finfo(torch.float32).eps, C=most, STEPS=STEPS,
            **_launch.parameters("linear_logprob", device, head["V"]),
        )  # fmt: skip
    return ids, values, counts


def launch_gather(
    entries: tuple[torch.Tensor, torch.Tensor, torch.Tensor],  # of launch_select
    targets_n: torch.Tensor,
    whole_n: torch.Tensor,
    at_target_n: torch.Tensor,
    weight_VH: torch.Tensor,
    compute: tl.dtype,
    out_nH: torch.Tensor,  # fp32; dense rows are left alone
) -> None:
    rows, (V, H) = len(targets_n), weight_VH.shape
    block = min(512, triton.next_power_of_2(H))
    if rows and H:
        gather_kernel[(rows, triton.cdiv(H, block))](
            *entries, targets_n, whole_n, at_target_n, weight_VH, out_nH, V, H, weight_VH.stride(0), weight_VH.stride(1),
            C=entries[0].shape[1], COMPUTE=compute, K=8, BLOCK=block, num_warps=4,
        )  # fmt: skip
