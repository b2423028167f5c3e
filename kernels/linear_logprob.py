"""One program a row of logits: its statistics, and in the same read what the gradient matmul multiplies.

n rows, V vocabulary, m a row's maximum, S = sum of exp(z - m). 132 rows in flight outgrow L2, so a second pass would read
from memory again. Hence D = exp(z - m) f is written before m is known, as exp(z - m0) f with m0 the first tile's maximum,
and rows of the product D W are scaled by exp(m0 - m) / S: 4 bytes read, 2 written a logit, where two passes take 10.
bf16 has fp32's range, so that holds while m - m0 <= LIMIT; rows beyond, and other dtypes, are read twice.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._logits import logits_of

LIMIT = 60.0  # nat; exp(60) times the longest vocabulary is far inside bf16's range


@triton.jit
def _shrink(a, b):
    """exp(a - b) for a <= b to a rounding or two: a - b, and its product with log2 e, would each lose |a - b| / 2^24."""
    d = a - b
    back = a - d
    lost = (back - b) + (a - (d + back))
    d = tl.maximum(d, -200.0)
    power = tl.floor(d * 1.4426950408889634 + 0.5)
    rest = (d - power * 0.693359375) + power * 0.00021219444005469057  # the first has 10 bits: its product is exact
    return tl.exp2(power) * (tl.exp(rest) * (1.0 + lost))


@triton.jit
def row_kernel(
    logits,  # [n, V] rows `stride` apart: h W^T, or the caller's own
    targets,  # [n] int64; an id outside [0, V) is another shard's, or ignored
    temperatures,  # [n] fp32, or unused
    bias,  # [V], or unused
    blocked,  # [V] bool, or unused
    raw,  # [10, n] fp32 rows `raw_stride` apart, out: Raw of r1v2_fast.ops._linear_logprob_rows
    matrix,  # [n, V] STORED rows `matrix_stride` apart, out, or unused; fp32 may lie over the logits
    V,
    width,
    stride,
    raw_stride,
    matrix_stride,
    matrix_width,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_BLOCKED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    TOP1: tl.constexpr,
    MEAN: tl.constexpr,
    SQUARES: tl.constexpr,
    GRAD: tl.constexpr,
    ONE_READ: tl.constexpr,
    OWN: tl.constexpr,  # D holds the target's entry, else 0 there
    NORMALISE: tl.constexpr,  # fp16 stores p 2^15: it would go subnormal below 6e-5
    STORED: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    matrix += row * matrix_stride
    t = tl.load(targets + row)
    if PER_TOKEN:
        temperature = tl.load(temperatures + row)
    lane = tl.arange(0, BLOCK)
    infinity = float("inf")

    z, f = logits_of(
        logits, bias, blocked, lane, V, width, logit_scale, softcap, temperature,
        HAS_BIAS, HAS_BLOCKED, HAS_SCALE, HAS_SOFTCAP, HAS_TEMPERATURE,
    )  # fmt: skip
    first_top = tl.maximum(tl.max(z, 0), -1e30)  # a tile of forbidden ids has none
    top = first_top
    target = tl.full((), -infinity, tl.float32)
    factor = tl.full((), 1.0, tl.float32)
    if TOP1:  # the target's tile comes first, so that its logit has the very bits that the loop will see
        start = t // BLOCK * BLOCK
        z, f = logits_of(
            logits, bias, blocked, tl.where(t >= 0, start, V) + lane, V, width, logit_scale, softcap, temperature,
            HAS_BIAS, HAS_BLOCKED, HAS_SCALE, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
        target = tl.where((t >= 0) & (t < V), tl.sum(tl.where(start + lane == t, z, 0.0), 0), -infinity)
    zeros = tl.zeros([BLOCK], tl.float32)
    others, weighted, squares, total, count, beaten = zeros, zeros, zeros, zeros, zeros, zeros

    for start in tl.range(0, V, BLOCK, num_stages=STAGES):
        ids = start + lane
        z, f = logits_of(
            logits, bias, blocked, ids, V, width, logit_scale, softcap, temperature,
            HAS_BIAS, HAS_BLOCKED, HAS_SCALE, HAS_SOFTCAP, HAS_TEMPERATURE,
        )  # fmt: skip
        allowed = z > -infinity
        if TOP1:
            beaten = tl.where((z > target) | ((z == target) & (ids < t)), 1.0, beaten)
        if MEAN:
            total += tl.where(allowed, z, 0.0)
            count += tl.where(allowed, 1.0, 0.0)
        if (t >= start) & (t < start + BLOCK) & (t < V):
            target = tl.sum(tl.where(ids == t, z, 0.0), 0)  # a sum lets a NaN through, a maximum does not
            if HAS_SOFTCAP:
                factor = tl.sum(tl.where(ids == t, f, 0.0), 0)
        higher = tl.maximum(top, tl.max(z, 0))
        shrink = _shrink(top, higher)
        if ENTROPY:
            weighted = shrink * (weighted + (top - higher) * others)
        if SQUARES:
            squares *= shrink * shrink
        others *= shrink
        top = higher
        e = tl.where(ids == t, 0.0, tl.exp(z - top))
        others += e
        if ENTROPY:
            weighted += tl.where(allowed, e * (z - top), 0.0)
        if SQUARES:
            squares += e * e
        if ONE_READ:
            d = e * tl.exp(top - first_top)
            if HAS_SOFTCAP:
                d *= f
            tl.store(matrix + ids, d.to(STORED), mask=ids < matrix_width)

    rest = tl.sum(others, 0)
    scale = _shrink(first_top, top)
    if GRAD:
        if not ONE_READ or top - first_top > LIMIT:
            tl.debug_barrier()  # what the first read wrote is written over
            scale = top * 0.0 + 1.0
            if NORMALISE:
                scale = (rest + tl.exp(target - top)) * 0.000030517578125
                scale = tl.where(scale == 0.0, 1.0, scale)  # a shard of forbidden ids alone
            for start in tl.range(0, V, BLOCK, num_stages=STAGES):
                ids = start + lane
                z, f = logits_of(
                    logits, bias, blocked, ids, V, width, logit_scale, softcap, temperature,
                    HAS_BIAS, HAS_BLOCKED, HAS_SCALE, HAS_SOFTCAP, HAS_TEMPERATURE,
                )  # fmt: skip
                d = tl.where(ids == t, 0.0, tl.exp(z - top))
                if HAS_SOFTCAP:
                    d *= f
                if NORMALISE:
                    d = d / scale
                tl.store(matrix + ids, d.to(STORED), mask=ids < matrix_width)
        if OWN:
            tl.debug_barrier()  # after the 0 that another thread wrote there
            own = -rest * factor / scale
            tl.store(matrix + t, own.to(STORED), mask=(t >= 0) & (t < V))

    raw += row
    tl.store(raw, top)
    tl.store(raw + raw_stride, rest)
    tl.store(raw + 2 * raw_stride, target)
    tl.store(raw + 3 * raw_stride, factor)
    tl.store(raw + 4 * raw_stride, scale)
    tl.store(raw + 5 * raw_stride, tl.sum(weighted, 0))
    tl.store(raw + 6 * raw_stride, tl.sum(squares, 0))
    tl.store(raw + 7 * raw_stride, tl.sum(total, 0))
    tl.store(raw + 8 * raw_stride, tl.sum(count, 0))
    tl.store(raw + 9 * raw_stride, tl.sum(beaten, 0))


def head_arguments(
    logits_nV: torch.Tensor,
    bias: torch.Tensor | None,
    blocked: torch.Tensor | None,
    temperature: torch.Tensor | float,
    logit_scale: float,
    softcap: float | None,
    *,
    padded: bool = False,
) -> dict:
    """What every kernel that reads logits is told of the head; a tensor that is absent is never read.

    padded  the columns from V to the row's stride are there to be read
    """
    per_token = isinstance(temperature, torch.Tensor)
    return {
        "logits": logits_nV,
        "temperatures": temperature if per_token else logits_nV,
        "bias": logits_nV if bias is None else bias,
        "blocked": logits_nV if blocked is None else blocked,
        "V": logits_nV.shape[1],
        "width": logits_nV.stride(0) if padded else logits_nV.shape[1],
        "stride": logits_nV.stride(0),
        "logit_scale": logit_scale,
        "softcap": 1.0 if softcap is None else softcap,
        "temperature": 1.0 if per_token else temperature,
        "HAS_BIAS": bias is not None,
        "HAS_BLOCKED": blocked is not None,
        "HAS_SCALE": logit_scale != 1.0,
        "HAS_SOFTCAP": softcap is not None,
        "HAS_TEMPERATURE": per_token or temperature != 1.0,
        "PER_TOKEN": per_token,
    }


STORED = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def launch(
    head: dict,  # of head_arguments
    targets_n: torch.Tensor,  # int64
    raw: torch.Tensor,  # [10, n] fp32, out
    matrix_nV: torch.Tensor | None,  # out: D; its rows' padding, if `padded`, is overwritten too
    outputs: tuple[str, ...],
    *,
    one_read: bool | None = None,
    own: bool | None = None,
    padded: bool = False,
    parameters: dict[str, int] | None = None,
) -> None:
    """Raw statistics of n rows and, where `matrix_nV` is given, D with exp(z - m) f = D scale.

    one_read    None: in bf16
    own         whether D holds the target's entry, else 0; None: in 16 bits
    parameters  of the launch; None: those measured on the device
    """
    rows = len(targets_n)
    if not rows:
        return
    assert targets_n.is_contiguous() and raw.stride(1) == 1 and head["logits"].stride(1) == 1
    dtype = torch.float32 if matrix_nV is None else matrix_nV.dtype
    own = dtype != torch.float32 if own is None else own
    row_kernel[(rows,)](
        **head,
        targets=targets_n,
        raw=raw,
        raw_stride=raw.stride(0),
        matrix=raw if matrix_nV is None else matrix_nV,
        matrix_stride=0 if matrix_nV is None else matrix_nV.stride(0),
        matrix_width=0 if matrix_nV is None else matrix_nV.stride(0) if padded else matrix_nV.shape[1],
        ENTROPY="entropy" in outputs,
        TOP1="is_top1" in outputs,
        MEAN="mean_logits" in outputs,
        SQUARES="log_sum_sq_probs" in outputs,
        GRAD=matrix_nV is not None,
        ONE_READ=matrix_nV is not None and (dtype == torch.bfloat16 if one_read is None else one_read),
        OWN=own,
        NORMALISE=dtype == torch.float16,
        STORED=STORED[dtype],
        LIMIT=LIMIT,
        **(parameters or _launch.parameters("linear_logprob", head["logits"].device, head["V"])),
    )
