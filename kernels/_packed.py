"""What kernels over packed sequences share: bounded offsets, numbers that may lie in a tensor, runs of one value."""

import triton
import triton.language as tl


@triton.jit
def offset(offsets, stride, place, low, count):
    """Within [low, count] whatever it holds: nobody looks at offsets on a GPU, and nothing else may be read or written."""
    return tl.minimum(tl.maximum(tl.load(offsets + place * stride).to(tl.int64), low), count)


@triton.jit
def scalar(tensor, number, IN_TENSOR: tl.constexpr):
    if IN_TENSOR:
        return tl.load(tensor).to(tl.float64)
    return tl.zeros((), tl.float64) + number


@triton.jit
def fill(out, value, start, end, step, BLOCK: tl.constexpr):
    for first in range(start, end, step):
        index = first + tl.arange(0, BLOCK)
        tl.store(out + index, value, mask=index < end)
