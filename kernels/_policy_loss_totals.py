"""What the last program of policy_loss makes of everybody's partial sums: the loss, what gradients lack, the metrics."""

import triton
import triton.language as tl

# partial sums of a program: loss, tokens, sequences, then the metrics, then the tokens that a sampler scored
ROW, USED = tl.constexpr(32), tl.constexpr(21)
FIRST_METRIC = tl.constexpr(3)
# METRICS of r1v2_fast.ops._policy_loss_settings: sums, then minima, then maxima
SUMS, MINIMA, METRICS = tl.constexpr(12), tl.constexpr(2), tl.constexpr(17)


@triton.jit
def totals(
    partials, loss, scales, metrics, programs, divisor, entropy_divisor, entropy_coef, RATIO: tl.constexpr,
    AGGREGATE: tl.constexpr, DIVIDED: tl.constexpr, ENTROPY_DIVIDED: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    SEQUENCE_ROLLOUT: tl.constexpr,
):  # fmt: skip
    slot, column = tl.arange(0, ROW), tl.arange(0, 64)
    sums = tl.zeros([ROW], tl.float64)
    least, most = sums + float("inf"), sums - float("inf")
    for begun in range(0, programs, 64):
        there = (slot < USED)[:, None] & (begun + column < programs)[None, :]
        place = partials + slot[:, None] * programs + (begun + column)[None, :]
        tile = tl.load(place, mask=there, other=0.0, cache_modifier=".cg")
        sums += tl.sum(tile, 1)
        least = tl.minimum(least, tl.min(tl.where(there, tile, float("inf")), 1))
        most = tl.maximum(most, tl.max(tl.where(there, tile, -float("inf")), 1))
    counted_tokens = tl.sum(tl.where(slot == 1, sums, 0.0), 0)
    tokens = tl.maximum(counted_tokens, 1.0)
    nonempty = tl.maximum(tl.sum(tl.where(slot == 2, sums, 0.0), 0), 1.0)
    if not DIVIDED:
        divisor = tokens if AGGREGATE == "token_mean" else nonempty
    if not ENTROPY_DIVIDED:
        entropy_divisor = tokens
    total = tl.sum(tl.where(slot == 0, sums, 0.0), 0) / divisor
    if HAS_ENTROPY:
        total -= entropy_coef * tl.sum(tl.where(slot == 11, sums, 0.0), 0) / entropy_divisor
    tl.store(loss, total)
    tl.store(scales, 1.0 if DIVIDED else 1.0 / divisor)
    tl.store(scales + 1, 1.0 if ENTROPY_DIVIDED else 1.0 / entropy_divisor)
    metric = slot - FIRST_METRIC
    units = tokens if RATIO == "token" else nonempty
    scored = tl.maximum(tl.sum(tl.where(slot == 20, sums, 0.0), 0), 1.0)
    by_sequence = (slot == 8) | (slot == 12)
    by_token = (slot == 10) | (slot == 11)
    if SEQUENCE_ROLLOUT:
        by_sequence = by_sequence | (slot == 13)
    else:
        by_token = by_token | (slot == 13)
    counted = tl.where(by_sequence, nonempty, tl.where(by_token, tokens, units))
    found = sums / tl.where(slot == 14, scored, counted)
    extreme = tl.where(metric < SUMS + MINIMA, least, most)
    extreme = tl.where(tl.zeros([ROW], tl.float64) + counted_tokens > 0, extreme, 0.0)
    found = tl.where(metric < SUMS, found, extreme)
    tl.store(metrics + metric, found, mask=(metric >= 0) & (metric < METRICS))
