"""Loss, gradients and metrics in one launch: a program takes whole sequences, so whatever a sequence's sum decides needs no
second one.

N tokens, B sequences. Traffic: each input once (twice where a sum over the sequence comes first), each gradient once.
fp64 inside: terms of both signs cancel in the sums, and no order of additions, padded or packed, then shows in fp32.
"""

import math

import torch
import triton
import triton.language as tl

from ._finish import last_to_finish, ticket
from ._packed import fill, offset, scalar
from ._policy_loss_terms import (
    LOG_LARGE,
    LOG_SMALL,
    clamp,
    kept_change,
    kl_term,
    log_weight,
    policy_term,
    truncated_or_masked,
    vespo_weight,
)
from ._policy_loss_tokens import correction, live_tokens, read, sampler_gap
from ._policy_loss_totals import METRICS, ROW, totals

PROGRAMS = 1024  # at most: the last one adds a row from each


@triton.jit
def _divisor(given, number, known, GIVEN: tl.constexpr):
    if GIVEN == "":
        return known
    return scalar(given, number, GIVEN == "tensor")


@triton.jit
def policy_loss_kernel(
    logprobs,  # [N] or [B, T]; so are its likes; all of fp16, bf16 or fp32
    old,
    advantages,  # [B] or [N]
    mask,  # [B, T], or unused
    offsets,  # [B + 1] ints, or unused
    reference,
    importance,  # [B] or [N], or unused
    rollout,
    behaviour,
    token_weights,
    entropy,
    normalizer,  # [1], or unused
    entropy_normalizer,
    loss,  # [1] fp32, out
    grad,  # [N] fp32, out: divided by the divisor where that is known beforehand
    entropy_grad,  # [N] fp32, out, or unused
    metrics,  # [METRICS] fp32, out
    scales,  # [2] fp32, out: what the two gradients are still to be multiplied by
    partials,  # [ROW, programs] fp64
    finished,  # [1] int32
    count,
    sequences,
    longest,
    low: tl.float64,
    high: tl.float64,
    ratio_cap: tl.float64,
    dual_clip: tl.float64,
    bound: tl.float64,
    kl_coef: tl.float64,
    rollout_min: tl.float64,
    rollout_cap: tl.float64,
    behaviour_cap: tl.float64,
    off_policy: tl.float64,
    tau_positive: tl.float64,
    tau_other: tl.float64,
    k_positive: tl.float64,
    rate_positive: tl.float64,
    k_negative: tl.float64,
    rate_negative: tl.float64,
    change_low: tl.float64,
    change_high: tl.float64,
    tv_low: tl.float64,
    tv_high: tl.float64,
    entropy_coef: tl.float64,
    divisor_number: tl.float64,
    entropy_divisor_number: tl.float64,
    FAMILY: tl.constexpr,
    RATIO: tl.constexpr,  # "token", "sequence", "own"
    AGGREGATE: tl.constexpr,
    KL: tl.constexpr,  # "", "k1", "k2", "k3"
    KL_IN_LOSS: tl.constexpr,
    KL_IMPORTANCE: tl.constexpr,
    ADVANTAGE: tl.constexpr,  # "token" or "sequence"
    IMPORTANCE: tl.constexpr,  # "", "token", "sequence"
    ROLLOUT: tl.constexpr,  # "" or a mode
    HAS_BEHAVIOUR: tl.constexpr,
    OFF_POLICY: tl.constexpr,  # "", "rollout", "behaviour", "old": whose log-probs the sequence mask looks at
    HAS_WEIGHTS: tl.constexpr,
    HAS_ENTROPY: tl.constexpr,
    DUAL: tl.constexpr,
    TWO_SIDED: tl.constexpr,
    PADDED: tl.constexpr,
    GIVEN: tl.constexpr,  # where the divisor comes from: "", "tensor", "number"
    ENTROPY_GIVEN: tl.constexpr,
    DIVIDED: tl.constexpr,
    ENTROPY_DIVIDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    SEQUENCE_ROLLOUT: tl.constexpr = ROLLOUT == "sequence_truncate" or ROLLOUT == "sequence_mask"
    MEAN: tl.constexpr = AGGREGATE == "seq_mean_token_mean"
    SUMS_FIRST: tl.constexpr = RATIO != "token" or FAMILY == "vespo" or SEQUENCE_ROLLOUT or OFF_POLICY != ""
    COUNTED_FIRST: tl.constexpr = PADDED and (MEAN or SUMS_FIRST)
    MOVES: tl.constexpr = FAMILY == "clip" or FAMILY == "gmpo" or FAMILY == "sapo"  # through the ratio
    CORRECTED: tl.constexpr = IMPORTANCE != "" or HAS_BEHAVIOUR or ROLLOUT != ""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    none = tl.full((), 0.0, tl.float64)
    infinity = none + float("inf")

    known = none + 1.0
    if AGGREGATE == "seq_mean_token_sum_norm" and PADDED:
        known = tl.maximum((none + sequences) * longest, 1.0)
    if not PADDED:  # tokens of no sequence get no gradient
        begin = offset(offsets, 1, 0, 0, count)
        last = offset(offsets, 1, sequences, begin, count)
        step = programs * BLOCK
        fill(grad, 0.0, program * BLOCK, begin, step, BLOCK)
        fill(grad, 0.0, last + program * BLOCK, count, step, BLOCK)
        if HAS_ENTROPY:
            fill(entropy_grad, 0.0, program * BLOCK, begin, step, BLOCK)
            fill(entropy_grad, 0.0, last + program * BLOCK, count, step, BLOCK)
    divisor = _divisor(normalizer, divisor_number, known, GIVEN)
    entropy_divisor = _divisor(entropy_normalizer, entropy_divisor_number, known, ENTROPY_GIVEN)
    entropy_step = -entropy_coef / entropy_divisor if ENTROPY_DIVIDED else none - entropy_coef

    all_loss, all_tokens, all_nonempty, all_entropy, all_kl, all_ratio = none, none, none, none, none, none
    all_low, all_high, all_region, all_dual, all_phi, all_dropped = none, none, none, none, none, none
    all_weight, all_gap, all_scored, weight_max, high_max, gap_max = none, none, none, -infinity, -infinity, -infinity
    weight_min, low_min = infinity, infinity

    for sequence in range(program, sequences, programs):
        if PADDED:
            start = sequence * longest
            end = start + longest
        else:
            start = offset(offsets, 1, sequence, 0, count)
            end = offset(offsets, 1, sequence + 1, start, count)
        advantage = tl.zeros([BLOCK], tl.float64)
        if ADVANTAGE == "sequence":
            advantage += tl.load(advantages + sequence).to(tl.float64)

        # what a sum over the sequence decides
        tokens, sum_change, sum_log_weight, sum_difference, sum_away = none, none, none, none, none
        if COUNTED_FIRST and not SUMS_FIRST:
            for first in range(start, end, BLOCK):
                tokens += tl.sum(live_tokens(mask, first + lane, end, PADDED).to(tl.float64), 0)
        if not PADDED:
            tokens += (end - start).to(tl.float64)
        if SUMS_FIRST:
            for first in range(start, end, BLOCK):
                index = first + lane
                live = live_tokens(mask, index, end, PADDED)
                if PADDED:
                    tokens += tl.sum(live.to(tl.float64), 0)
                lp, before = read(logprobs, index, live), read(old, index, live)
                if ADVANTAGE == "token":
                    advantage = read(advantages, index, live)
                change = lp - before
                difference = change
                if ROLLOUT != "":
                    difference = sampler_gap(before, rollout, index, live)
                if FAMILY == "vespo":
                    weight = correction(
                        before, difference, importance, behaviour, index, live, bound, behaviour_cap, rollout_min,
                        rollout_cap, IMPORTANCE, HAS_BEHAVIOUR, ROLLOUT,
                    )  # fmt: skip
                    clamped = clamp(change, -LOG_LARGE, LOG_LARGE) + log_weight(weight)
                    sum_log_weight += tl.sum(tl.where(live, clamped, 0.0), 0)
                if SEQUENCE_ROLLOUT:
                    sum_difference += tl.sum(tl.where(live, difference, 0.0), 0)
                if OFF_POLICY != "":
                    sampled = before
                    if OFF_POLICY == "rollout":
                        sampled = read(rollout, index, live)
                    elif OFF_POLICY == "behaviour":
                        sampled = read(behaviour, index, live)
                    away = sampled - lp
                    sum_away += tl.sum(tl.where(live & (away == away), away, 0.0), 0)
                if FAMILY == "gmpo":
                    change = clamp(kept_change(change, advantage, change_low, change_high), -bound, bound)
                if RATIO != "token":
                    sum_change += tl.sum(tl.where(live, change, 0.0), 0)
        size = tl.maximum(tokens, 1.0)
        mean_change = sum_change / size
        sequence_weight = none + 1.0
        if IMPORTANCE == "sequence":
            sequence_weight *= tl.load(importance + sequence).to(tl.float64)
        if SEQUENCE_ROLLOUT:
            sequence_weight *= truncated_or_masked(
                sum_difference, bound, rollout_min, rollout_cap, ROLLOUT == "sequence_mask"
            )
        log_w = clamp(sum_log_weight + log_weight(sequence_weight), LOG_SMALL, LOG_LARGE)
        away_mean = sum_away / size
        share = 1.0 / size if MEAN else none + 1.0

        lows, highs, duals = none, none, none
        ratios, phis, drops, weights, pulled = none, none, none, none, none
        for first in range(start, end, BLOCK):
            index = first + lane
            live = live_tokens(mask, index, end, PADDED)
            lp, before = read(logprobs, index, live), read(old, index, live)
            if ADVANTAGE == "token":
                advantage = read(advantages, index, live)
            change = lp - before
            if RATIO == "token":
                ratio = tl.exp(clamp(change, -bound, bound))
                inside = (tl.abs(change) > bound) == 0  # a NaN passes
            else:
                change_mean = tl.zeros([BLOCK], tl.float64) + mean_change
                ratio = tl.exp(clamp(change_mean, -bound, bound))
                inside = (tl.abs(change_mean) > bound) == 0
            difference = tl.zeros([BLOCK], tl.float64)
            if ROLLOUT != "":
                difference = tl.where(live, sampler_gap(before, rollout, index, live), 0.0)
                sampled = read(rollout, index, live)
                all_scored += tl.sum((live & (sampled == sampled)).to(tl.float64), 0)
                all_gap += tl.sum(tl.abs(difference), 0)
                gap_max = tl.maximum(gap_max, tl.max(tl.abs(difference), 0))
            weight = tl.full([BLOCK], 1.0, tl.float64)
            phi = weight
            if CORRECTED:
                weight = sequence_weight * correction(
                    before, difference, importance, behaviour, index, live, bound, behaviour_cap, rollout_min, rollout_cap,
                    IMPORTANCE, HAS_BEHAVIOUR, ROLLOUT,
                )  # fmt: skip
                weights += tl.sum(tl.where(live, weight, 0.0), 0)
                weight_min = tl.minimum(weight_min, tl.min(tl.where(live, weight, infinity), 0))
                weight_max = tl.maximum(weight_max, tl.max(tl.where(live, weight, -infinity), 0))
            if FAMILY == "vespo":  # the corrections are part of w
                phi = vespo_weight(log_w, advantage, k_positive, rate_positive, k_negative, rate_negative)
                phis += tl.sum(tl.where(live, phi, 0.0), 0)
                weight = tl.full([BLOCK], 1.0, tl.float64)
            if OFF_POLICY != "":
                dropped = live & (advantage < 0) & (tl.zeros([BLOCK], tl.float64) + away_mean > off_policy)
                drops += tl.sum(dropped.to(tl.float64), 0)
                weight = tl.where(dropped, 0.0, weight)
            if HAS_WEIGHTS:
                weight *= read(token_weights, index, live)

            term, slope, below, above, dual = policy_term(
                lp, before, advantage, ratio, change, phi, low, high, ratio_cap, dual_clip, tau_positive, tau_other,
                change_low, change_high, tv_low, tv_high, FAMILY, TWO_SIDED, DUAL,
            )  # fmt: skip
            busy = live & (advantage != 0) & (weight != 0)  # else exactly nothing, even at a ratio of inf
            term, slope = tl.where(busy, term * weight, 0.0), tl.where(busy, slope * weight, 0.0)
            own = tl.zeros([BLOCK], tl.float64)
            if not MOVES:
                own, slope = slope, own
            if KL != "":
                away = read(reference, index, live) - lp
                free = ((tl.abs(away) > bound) == 0) & live
                kl, steep = kl_term(clamp(away, -bound, bound), KL)
                steep = tl.where(free, steep, 0.0)
                if KL_IMPORTANCE:
                    kl, steep = kl * ratio, steep * ratio
                kl = tl.where(live, kl, 0.0)
                all_kl += tl.sum(kl, 0)
                if KL_IN_LOSS:
                    term, own = term + kl_coef * kl, own + kl_coef * steep
                    if KL_IMPORTANCE:
                        slope += kl_coef * kl
            if RATIO == "sequence":
                pulled += tl.sum(slope, 0)
            else:
                own += tl.where(inside, slope, 0.0)
            own *= share
            if DIVIDED:
                own = own / divisor
            tl.store(grad + index, tl.where(live, own, 0.0), mask=index < end)
            all_loss += tl.sum(term, 0) * share
            ratios += tl.sum(tl.where(live, ratio, 0.0), 0)
            if PADDED and not COUNTED_FIRST:
                tokens += tl.sum(live.to(tl.float64), 0)
            if FAMILY == "clip" or FAMILY == "gmpo" or FAMILY == "dppo_tv":
                lows += tl.sum((live & below).to(tl.float64), 0)
            if FAMILY != "sapo" and FAMILY != "vespo":
                highs += tl.sum((live & above).to(tl.float64), 0)
            if DUAL:
                duals += tl.sum((live & dual).to(tl.float64), 0)
            if HAS_ENTROPY:
                all_entropy += tl.sum(read(entropy, index, live), 0)
                tl.store(entropy_grad + index, tl.where(live, entropy_step, 0.0), mask=index < end)

        if RATIO == "sequence":  # rho = exp(mean of log-ratios): each token holds 1 / size of its slope
            pull = tl.where(tl.abs(mean_change) > bound, 0.0, pulled * share / size)
            if DIVIDED:
                pull = pull / divisor
            tl.debug_barrier()  # the stores above come first
            for first in range(start, end, BLOCK):
                index = first + lane
                live = live_tokens(mask, index, end, PADDED)
                holds = live
                if FAMILY == "gmpo":
                    if ADVANTAGE == "token":
                        advantage = read(advantages, index, live)
                    change = read(logprobs, index, live) - read(old, index, live)
                    kept = kept_change(change, advantage, change_low, change_high)
                    holds = live & (kept == change) & (advantage != 0) & (tl.abs(change) <= bound)
                # fp32 as it was stored: own is 0 but for a KL term or a constant ratio
                own = tl.load(grad + index, mask=live, other=0.0).to(tl.float64)
                tl.store(grad + index, own + tl.where(holds, pull, 0.0), mask=live)

        size = tl.maximum(tokens, 1.0)
        unit = 1.0 / size if RATIO != "token" else none + 1.0  # a sequence's ratio counts once
        all_tokens += tokens
        all_nonempty += tl.where(tokens > 0, 1.0, 0.0)
        all_low += lows * unit
        all_high += highs * unit
        all_region += (lows + highs) * unit
        all_dual += duals * unit
        all_ratio += ratios * unit
        all_weight += weights / size if SEQUENCE_ROLLOUT else weights
        all_phi += phis / size
        all_dropped += drops / size
        low_min = tl.minimum(low_min, tl.where(tokens > 0, lows / size, infinity))
        high_max = tl.maximum(high_max, tl.where(tokens > 0, highs / size, -infinity))

    row = partials + program
    tl.store(row, all_loss)
    tl.store(row + 1 * programs, all_tokens)
    tl.store(row + 2 * programs, all_nonempty)
    tl.store(row + 3 * programs, all_low)
    tl.store(row + 4 * programs, all_high)
    tl.store(row + 5 * programs, all_region)
    tl.store(row + 6 * programs, all_dual)
    tl.store(row + 7 * programs, all_high)
    tl.store(row + 8 * programs, all_phi)
    tl.store(row + 9 * programs, all_ratio)
    tl.store(row + 10 * programs, all_kl)
    tl.store(row + 11 * programs, all_entropy)
    tl.store(row + 12 * programs, all_dropped)
    tl.store(row + 13 * programs, all_weight)
    tl.store(row + 14 * programs, all_gap)
    tl.store(row + 15 * programs, low_min)
    tl.store(row + 16 * programs, weight_min)
    tl.store(row + 17 * programs, high_max)
    tl.store(row + 18 * programs, weight_max)
    tl.store(row + 19 * programs, gap_max)
    tl.store(row + 20 * programs, all_scored)
    if last_to_finish(finished):
        totals(
            partials, loss, scales, metrics, programs, divisor, entropy_divisor, entropy_coef, RATIO, AGGREGATE, DIVIDED,
            ENTROPY_DIVIDED, HAS_ENTROPY, SEQUENCE_ROLLOUT,
        )  # fmt: skip


def launch(
    logprobs, old, advantages, mask, offsets, reference, importance, rollout, behaviour, token_weights, entropy,
    normalizer, entropy_normalizer, *, numbers, words,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """loss [], grad [N], entropy_grad [N] or [0], metrics, scales [2]; tensors contiguous, numbers and words as they came."""
    count = logprobs.numel()
    sequences, longest = logprobs.shape if mask is not None else (len(offsets) - 1, 0)
    programs = max(min(sequences, PROGRAMS), 1)
    block = min(max(triton.next_power_of_2(triton.cdiv(count, max(sequences, 1))), 128), 512)
    fp32 = {"dtype": torch.float32, "device": logprobs.device}
    loss, grad, scales = torch.empty((), **fp32), torch.empty(count, **fp32), torch.empty(2, **fp32)
    entropy_grad = torch.empty(0 if entropy is None else count, **fp32)
    metrics = torch.empty(METRICS.value, **fp32)
    partials = torch.empty(ROW.value * programs, dtype=torch.float64, device=logprobs.device)
    optional = (
        mask,
        offsets,
        reference,
        importance,
        rollout,
        behaviour,
        token_weights,
        entropy,
        normalizer,
        entropy_normalizer,
    )
    sources = (("rollout", rollout), ("behaviour", behaviour), ("old", old))

    def level(tensor):
        return "" if tensor is None else "sequence" if tensor.numel() == sequences else "token"

    def given(tensor, number):
        return "tensor" if tensor is not None else "" if math.isnan(number) else "number"

    policy_loss_kernel[(programs,)](
        logprobs,
        old,
        advantages,
        *(logprobs if tensor is None else tensor for tensor in optional),
        loss,
        grad,
        entropy_grad,
        metrics,
        scales,
        partials,
        ticket(logprobs.device),
        count,
        sequences,
        longest,
        *numbers,
        FAMILY=words.family,
        RATIO=words.ratio,
        AGGREGATE=words.aggregate,
        KL=words.kl_kind,
        KL_IN_LOSS=numbers.kl_coef != 0,
        KL_IMPORTANCE=bool(words.kl_importance),
        ADVANTAGE=level(advantages),
        IMPORTANCE=level(importance),
        ROLLOUT=words.rollout_mode,
        HAS_BEHAVIOUR=behaviour is not None,
        OFF_POLICY=next(name for name, x in sources if x is not None) if numbers.off_policy < math.inf else "",
        HAS_WEIGHTS=token_weights is not None,
        HAS_ENTROPY=entropy is not None,
        DUAL=numbers.dual_clip < math.inf,
        TWO_SIDED=numbers.low > -math.inf,
        PADDED=mask is not None,
        GIVEN=given(normalizer, numbers.divisor),
        ENTROPY_GIVEN=given(entropy_normalizer, numbers.entropy_divisor),
        DIVIDED=bool(words.divided),
        ENTROPY_DIVIDED=bool(words.entropy_divided),
        BLOCK=block,
        num_warps=block // 64,
    )
    return loss, grad, entropy_grad, metrics, scales
