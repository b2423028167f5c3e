"""z of a tile: bias, scale, softcap, temperature, forbidden ids. Shared by every kernel that reads logits."""

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    """Relative error below 2e-7 (checked over [1e-4, 20] in fp32): an odd polynomial fit up to 0.625, exp above."""
    size = tl.abs(x)
    u = tl.minimum(size, 0.625) * tl.minimum(size, 0.625)
    p = 0.002295844256877899
    p = p * u - 0.008346987888216972
    p = p * u + 0.021769965067505836
    p = p * u - 0.05395940691232681
    p = p * u + 0.13333304226398468
    p = p * u - 0.3333333432674408
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, x + x * u * p, tl.where(x < 0.0, -far, far))


@triton.jit
def logits_of(
    logits,  # of the row
    bias,
    blocked,
    ids,  # an id outside [0, V) gives -inf
    V,
    width,  # readable columns: V, or beyond it to the row's padding, for loads as wide as their alignment
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_BLOCKED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
):
    """(z, f): softcap_(logit_scale (x + bias)) / temperature, and f = 1 - (s / softcap)^2."""
    inside = (ids >= 0) & (ids < V)
    z = tl.load(logits + ids, mask=(ids >= 0) & (ids < width), other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(bias + ids, mask=inside, other=0.0).to(tl.float32)
    if HAS_SCALE:
        z *= logit_scale
    f = 1.0
    if HAS_SOFTCAP:
        z = _tanh(tl.div_rn(z, softcap))
        f = 1.0 - z * z
        z *= softcap
    if HAS_TEMPERATURE:
        z = tl.div_rn(z, temperature)
    if HAS_BLOCKED:
        inside = inside & (tl.load(blocked + ids, mask=inside, other=1) == 0)
    return tl.where(inside, z, -float("inf")), f
