"""Three terms, rewards, metrics and the gradient of packed pairs in one launch: a program takes whole pairs.

P pairs, N tokens. Traffic: each log-prob once, each gradient once. fp64 inside: a reward sums terms of both signs, which cancel.
The formulas are those of r1v2_fast.ops.mpo_loss.
"""

import math

import torch
import triton
import triton.language as tl

from ._finish import last_to_finish, ticket
from ._packed import fill, offset, scalar

PROGRAMS = 1024  # at most: the last one adds a row from each
SUMS = 5  # partial sums of a program: preference, quality, generation, pairs won, margins


@triton.jit
def _log_sigmoid(x):
    """min(x, 0) - log1p(exp(-|x|)), where log1p(u) = log w - ((w - 1) - u) / w, w the rounded 1 + u, keeps a tiny u."""
    u = tl.exp(-tl.abs(x))
    w = 1.0 + u
    return tl.minimum(x, 0.0) - (tl.log(w) - ((w - 1.0) - u) / w)


@triton.jit
def _sigmoid(x):
    u = tl.exp(-tl.abs(x))
    return tl.where(x < 0, u, 1.0) / (1.0 + u)


@triton.jit
def _sums(logprobs, reference, logprobs_stride, reference_stride, start, end, BLOCK: tl.constexpr):
    """Of logprob - reference, and of logprob."""
    difference, total = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        live = index < end
        own = tl.load(logprobs + index * logprobs_stride, mask=live, other=0.0).to(tl.float64)
        difference += own - tl.load(reference + index * reference_stride, mask=live, other=0.0).to(tl.float64)
        total += own
    return tl.sum(difference, 0), tl.sum(total, 0)


@triton.jit
def _added(partials, programs, PROGRAMS: tl.constexpr):
    slot = tl.arange(0, PROGRAMS)
    return tl.sum(tl.load(partials + slot, mask=slot < programs, other=0.0, cache_modifier=".cg"), 0)


@triton.jit
def mpo_loss_kernel(
    logprobs,  # [N] fp16, bf16 or fp32
    reference,  # [N]
    offsets,  # [2P + 1] int32 or int64
    pair_weights,  # [P], or unused
    delta,  # [1], or unused
    normalizer,  # [1], or unused
    generation_normalizer,  # [1], or unused
    loss,  # [1] fp32, out
    metrics,  # [SUMS] fp32, out
    rewards,  # [2P] fp32, out
    grad,  # [N] fp32, out
    partials,  # [SUMS, programs] fp64
    finished,  # [1] int32
    logprobs_stride,
    reference_stride,
    offsets_stride,
    pair_weights_stride,
    count,
    pairs,
    beta: tl.float64,
    preference_weight: tl.float64,
    quality_weight: tl.float64,
    generation_weight: tl.float64,
    smoothing: tl.float64,
    delta_number: tl.float64,
    normalizer_number: tl.float64,
    generation_number: tl.float64,
    HAS_WEIGHTS: tl.constexpr,
    DELTA_TENSOR: tl.constexpr,
    NORMALIZER_TENSOR: tl.constexpr,
    GENERATION: tl.constexpr,  # its divisor: "tensor", "number", "tokens"
    PER_SEQUENCE: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    none = tl.zeros((), tl.float64)
    shift = scalar(delta, delta_number, DELTA_TENSOR)
    over_pairs = scalar(normalizer, normalizer_number, NORMALIZER_TENSOR)
    begin = offset(offsets, offsets_stride, 0, 0, count)
    last = offset(offsets, offsets_stride, 2 * pairs, begin, count)
    if GENERATION == "tokens":
        chosen_tokens = offset(offsets, offsets_stride, pairs, begin, count) - begin
        over_generated = tl.maximum(chosen_tokens, 1).to(tl.float64)
    else:
        over_generated = scalar(generation_normalizer, generation_number, GENERATION == "tensor")
    # tokens of no sequence
    fill(grad, 0.0, program * BLOCK, begin, programs * BLOCK, BLOCK)
    fill(grad, 0.0, last + program * BLOCK, count, programs * BLOCK, BLOCK)

    preference, quality, generation, won, margin = none, none, none, none, none
    for pair in range(program, pairs, programs):
        start = offset(offsets, offsets_stride, pair, 0, count)
        end = offset(offsets, offsets_stride, pair + 1, start, count)
        other_start = offset(offsets, offsets_stride, pairs + pair, 0, count)
        other_end = offset(offsets, offsets_stride, pairs + pair + 1, other_start, count)
        chosen, generated = _sums(logprobs, reference, logprobs_stride, reference_stride, start, end, BLOCK)
        rejected, _ = _sums(logprobs, reference, logprobs_stride, reference_stride, other_start, other_end, BLOCK)
        chosen, rejected = beta * chosen, beta * rejected
        gap = chosen - rejected
        weight = none + 1.0
        if HAS_WEIGHTS:
            weight = tl.load(pair_weights + pair * pair_weights_stride).to(tl.float64)
        share = weight
        if PER_SEQUENCE:
            share = weight / tl.maximum(end - start, 1).to(tl.float64)
        preference -= weight * ((1.0 - smoothing) * _log_sigmoid(gap) + smoothing * _log_sigmoid(-gap))
        quality -= weight * (_log_sigmoid(chosen - shift) + _log_sigmoid(shift - rejected))
        generation -= share * generated
        won += tl.where(chosen > rejected, 1.0, 0.0)
        margin += gap
        tl.store(rewards + pair, chosen)
        tl.store(rewards + pairs + pair, rejected)
        # d/d gap of the preference term, d/d r of the quality terms, then r's slope beta
        pull = preference_weight * (smoothing * _sigmoid(gap) - (1.0 - smoothing) * _sigmoid(-gap))
        slope = beta * (weight * (pull - quality_weight * _sigmoid(shift - chosen)) / over_pairs)
        slope -= generation_weight * share / over_generated
        other_slope = beta * (weight * (quality_weight * _sigmoid(rejected - shift) - pull) / over_pairs)
        fill(grad, slope, start, end, BLOCK, BLOCK)
        fill(grad, other_slope, other_start, other_end, BLOCK, BLOCK)

    tl.store(partials + program, preference)
    tl.store(partials + programs + program, quality)
    tl.store(partials + 2 * programs + program, generation)
    tl.store(partials + 3 * programs + program, won)
    tl.store(partials + 4 * programs + program, margin)
    if last_to_finish(finished):
        preference = _added(partials, programs, PROGRAMS) / over_pairs
        quality = _added(partials + programs, programs, PROGRAMS) / over_pairs
        generation = _added(partials + 2 * programs, programs, PROGRAMS) / over_generated
        won = _added(partials + 3 * programs, programs, PROGRAMS)
        margin = _added(partials + 4 * programs, programs, PROGRAMS)
        tl.store(loss, preference_weight * preference + quality_weight * quality + generation_weight * generation)
        tl.store(metrics, preference)
        tl.store(metrics + 1, quality)
        tl.store(metrics + 2, generation)
        tl.store(metrics + 3, won / pairs)
        tl.store(metrics + 4, margin / pairs)


def tile(count: int, pairs: int) -> tuple[int, int]:
    """(BLOCK tokens of a sequence at a time, warps), by the average sequence."""
    block = min(max(triton.next_power_of_2(triton.cdiv(count, 2 * pairs)), 128), 2048)
    return block, min(block // 128, 8)


def launch(
    logprobs, reference, offsets, pair_weights, delta, normalizer, generation_normalizer, numbers, per_sequence
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """loss [], metrics [SUMS], rewards [2P], grad [N]; numbers as the kernel orders them, the last NaN for the chosen tokens."""
    count, pairs = len(logprobs), (len(offsets) - 1) // 2
    programs = min(pairs, PROGRAMS)
    block, warps = tile(count, pairs)
    fp32 = {"dtype": torch.float32, "device": logprobs.device}
    loss, metrics = torch.empty((), **fp32), torch.empty(SUMS, **fp32)
    rewards, grad = torch.empty(2 * pairs, **fp32), torch.empty(count, **fp32)
    partials = torch.empty(SUMS * programs, dtype=torch.float64, device=logprobs.device)
    divisor = "tensor" if generation_normalizer is not None else "tokens" if math.isnan(numbers[-1]) else "number"
    optional = (pair_weights, delta, normalizer, generation_normalizer)
    mpo_loss_kernel[(programs,)](
        logprobs,
        reference,
        offsets,
        *(logprobs if tensor is None else tensor for tensor in optional),
        loss,
        metrics,
        rewards,
        grad,
        partials,
        ticket(logprobs.device),
        logprobs.stride(0),
        reference.stride(0),
        offsets.stride(0),
        1 if pair_weights is None else pair_weights.stride(0),
        count,
        pairs,
        *numbers,
        HAS_WEIGHTS=pair_weights is not None,
        DELTA_TENSOR=delta is not None,
        NORMALIZER_TENSOR=normalizer is not None,
        GENERATION=divisor,
        PER_SEQUENCE=per_sequence,
        PROGRAMS=PROGRAMS,
        BLOCK=block,
        num_warps=warps,
    )
    return loss, metrics, rewards, grad
