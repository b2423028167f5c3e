"""Reading a block of tokens of one sequence, in fp64: which count, and the corrections that stand in front of their terms."""

import triton
import triton.language as tl

from ._policy_loss_terms import clamp, truncated_or_masked


@triton.jit
def read(pointer, index, live):
    return tl.load(pointer + index, mask=live, other=0.0).to(tl.float64)


@triton.jit
def live_tokens(mask, index, end, PADDED: tl.constexpr):
    here = index < end
    if PADDED:
        here = here & (tl.load(mask + index, mask=here, other=0) != 0)
    return here


@triton.jit
def sampler_gap(old, rollout, index, live):
    """old - rollout; a NaN, a token that the sampler could not score, counts as on-policy."""
    difference = old - read(rollout, index, live)
    return tl.where(difference == difference, difference, 0.0)


@triton.jit
def correction(
    old, difference, importance, behaviour, index, live, bound, behaviour_cap, rollout_min, rollout_cap,
    IMPORTANCE: tl.constexpr, HAS_BEHAVIOUR: tl.constexpr, ROLLOUT: tl.constexpr,
):  # fmt: skip
    """The product of the corrections that are given for each token."""
    weight = tl.full(index.shape, 1.0, tl.float64)
    if IMPORTANCE == "token":
        weight *= read(importance, index, live)
    if HAS_BEHAVIOUR:
        grown = tl.exp(clamp(old - read(behaviour, index, live), -bound, bound))
        weight *= tl.where(grown > behaviour_cap, behaviour_cap, grown)
    if ROLLOUT == "token_truncate" or ROLLOUT == "token_mask":
        weight *= truncated_or_masked(difference, bound, rollout_min, rollout_cap, ROLLOUT == "token_mask")
    return weight
