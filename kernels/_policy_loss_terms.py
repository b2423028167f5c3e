"""A token's policy term and its slope, in fp64, by family; what the constants in front of it are made of.

The formulas are those of r1v2_fast.ops.policy_loss. Clamps are comparisons, which let a NaN through where min and max do not.
"""

import triton
import triton.language as tl

LOG_SMALL = tl.constexpr(-18.420680743952367)  # log 1e-8; VESPO's bounds of log weights
LOG_LARGE = tl.constexpr(20.0)


@triton.jit
def clamp(x, low, high):
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def log_weight(weight):
    return clamp(tl.log(weight), LOG_SMALL, LOG_LARGE)


@triton.jit
def truncated_or_masked(difference, bound, low, high, MASKED: tl.constexpr):
    """exp of a log difference of samplers, within [low, high] or 0 outside."""
    weight = tl.exp(clamp(difference, -bound, bound))
    if MASKED:
        return tl.where((weight >= low) & (weight <= high), weight, 0.0)
    return clamp(weight, low, high)


@triton.jit
def kept_change(change, advantage, low, high):
    """GMPO's log-ratio, clamped on the side that the advantage pushes to; 0 without one."""
    change = tl.where((advantage > 0) & (change > high), high, change)
    change = tl.where((advantage < 0) & (change < -low), -low, change)
    return tl.where(advantage == 0, 0.0, change)


@triton.jit
def vespo_weight(log_w, advantage, k_positive, rate_positive, k_negative, rate_negative):
    shape = tl.where(advantage >= 0, k_positive, k_negative).to(tl.float64)
    rate = tl.where(advantage >= 0, rate_positive, rate_negative).to(tl.float64)
    return tl.exp(rate + shape * log_w - rate * tl.exp(log_w))


@triton.jit
def policy_term(
    logprob, old, advantage, ratio, change, phi, low, high, ratio_cap, dual_clip, tau_positive, tau_other, change_low,
    change_high, tv_low, tv_high, FAMILY: tl.constexpr, TWO_SIDED: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """f(rho, A); its slope in log rho, or in the log-prob where rho is a constant; clipped below, above, by dual_clip."""
    below, above, dual = ratio < low, ratio > high, advantage != advantage
    if FAMILY == "clip":
        plain = tl.where(ratio > ratio_cap, ratio_cap, ratio) * advantage
        clipped = clamp(ratio, low, high) * advantage
        value = -tl.where(plain < clipped, plain, clipped)
        whole = ((plain <= clipped) & (ratio <= ratio_cap)) | ((clipped <= plain) & ((below | above) == 0))
        if DUAL:
            dual = (advantage < 0) & (value > -advantage * dual_clip)
            value = tl.where(dual, -advantage * dual_clip, value)
            whole = whole & (dual == 0)
        slope = tl.where(whole | (plain != plain), -ratio * advantage, 0.0)
        below, above = below & (advantage < 0), above & (advantage > 0)
    elif FAMILY == "gmpo":
        value = -ratio * advantage
        slope = value
        below, above = (change < -change_low) & (advantage < 0), (change > change_high) & (advantage > 0)
    elif FAMILY == "sapo":
        tau = tl.where(advantage > 0, tau_positive, tau_other).to(tl.float64)
        gate = sigmoid(tau * (ratio - 1.0))
        value = -advantage * (4.0 / tau) * gate
        slope = tl.where(ratio != float("inf"), -advantage * 4.0 * gate * sigmoid(tau * (1.0 - ratio)) * ratio, 0.0)
        below, above = dual, dual
    elif FAMILY == "vespo":
        slope = -phi * advantage
        value = slope * logprob
        below, above = dual, dual
    elif FAMILY == "cispo":
        slope = -clamp(ratio, low, high) * advantage
        value = slope * logprob
        above = below | above if TWO_SIDED else above & (advantage > 0)
        below = dual
    else:
        moved = tl.exp(logprob) - tl.exp(old)
        below, above = (advantage <= 0) & (moved < -tv_low), (advantage > 0) & (moved > tv_high)
        slope = tl.where(below | above, 0.0, -tl.where(ratio > ratio_cap, ratio_cap, ratio) * advantage)
        value = slope * logprob
    return value, slope, below, above, dual


@triton.jit
def kl_term(away, KL: tl.constexpr):
    """KL of away = ref - logprob, and its slope in the log-prob."""
    if KL == "k1":
        value, slope = -away, tl.full(away.shape, 1.0, tl.float64)
    elif KL == "k2":
        value, slope = away * away / 2.0, -away
    else:
        grown = tl.exp(away)
        value, slope = grown - away - 1.0, 1.0 - grown
    return value, slope
