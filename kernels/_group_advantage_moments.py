"""Moments of groups and of the batch: count, mean and sum of squared deviations, from values where NaN means absent.

Rows are taken less a pivot, a rounded mean: a common offset then costs no digits, and equal values deviate by exactly
0, because the pivot misses each by the same few ulps, whose mean is exact.
"""

import triton
import triton.language as tl


@triton.jit
def extent(value):
    """Highest and lowest of each row's finite values; -inf and inf where it has none."""
    finite = tl.abs(value) < float("inf")
    high = tl.max(tl.where(finite, value, -float("inf")), 1)
    return high, tl.min(tl.where(finite, value, float("inf")), 1)


@triton.jit
def _average(value):
    live = value == value
    count = tl.sum(live.to(tl.float32), 1)
    return tl.div_rn(tl.sum(tl.where(live, value, 0.0), 1), tl.maximum(count, 1.0))


@triton.jit
def _moments(value, pivot):
    """Of each row, less its pivot, in two passes over registers."""
    live = value == value
    deviation = tl.where(live, value - pivot[:, None], 0.0)
    count = tl.sum(live.to(tl.float32), 1)
    mean = tl.div_rn(tl.sum(deviation, 1), tl.maximum(count, 1.0))
    rest = tl.where(live, deviation - mean[:, None], 0.0)
    return count, mean, tl.sum(rest * rest, 1)


@triton.jit
def statistics_of(value):
    """Of each row: count, pivot, mean less the pivot, sum of squared deviations, highest, lowest."""
    high, low = extent(value)
    pivot = _average(value)
    count, shift, square = _moments(value, pivot)
    return count, pivot, shift, square, high, low


@triton.jit
def nothing(P: tl.constexpr):
    """The statistics of P rows without a value."""
    zero, infinity = tl.zeros([P], tl.float32), tl.full([P], float("inf"), tl.float32)
    return zero, zero, zero, zero, -infinity, infinity


@triton.jit
def extend(statistics, value):
    """The statistics with one more tile of values."""
    count, pivot, shift, square, high, low = statistics
    more_high, more_low = extent(value)
    pivot = tl.where(count > 0, pivot, _average(value))  # of the first tile that has a value
    more_count, more_shift, more_square = _moments(value, pivot)
    count, shift, square = merge(count, shift, square, more_count, more_shift, more_square)
    return count, pivot, shift, square, tl.maximum(high, more_high), tl.minimum(low, more_low)


@triton.jit
def _quotient(a, b):
    return a / b if a.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def merge(count, mean, square, more_count, more_mean, more_square):
    """Chan's formula for the union of two sets. Equal means stay what they are, bit for bit."""
    both = count + more_count
    share = _quotient(more_count, tl.maximum(both, 1.0))
    delta = more_mean - mean
    return both, mean + delta * share, square + more_square + delta * (delta * (count * share))


@triton.jit
def pool(count, mean, square):
    """The same for a vector of sets, in fp64: there are few, and their means' weighted sum is then exact."""
    count, mean, square = count.to(tl.float64), mean.to(tl.float64), square.to(tl.float64)
    whole = tl.sum(count, 0)
    middle = tl.sum(count * mean, 0) / tl.maximum(whole, 1.0)
    rest = tl.where(count > 0, mean - middle, 0.0)
    return whole, middle, tl.sum(square + count * rest * rest, 0)


@triton.jit
def root(square, count, CORRECTION: tl.constexpr):
    return tl.sqrt_rn(tl.div_rn(square, tl.maximum(count - CORRECTION, 1.0)))


@triton.jit
def divisor(std, eps, CLAMP: tl.constexpr):
    """std + eps or max(std, eps); inf instead of 0, because what divides by 0 shall be 0."""
    sum_or_max = tl.maximum(std, eps, propagate_nan=tl.PropagateNan.ALL) if CLAMP else std + eps
    return tl.where(sum_or_max == 0, float("inf"), sum_or_max)
