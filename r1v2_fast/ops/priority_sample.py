"""Sampling by priority, as the Selective Sample Buffer draws: a pure function of (priorities, k, seed, alpha)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1v2_fast import _native
from r1v2_fast.ops import _backend
from r1v2_fast.reference import priority_sample as reference

_backend.register("priority_sample", ("cuda", _native.why_not))


class PrioritySample(NamedTuple):
    indices: torch.Tensor  # [k] int64
    probabilities: torch.Tensor  # [k], of a single draw


def sample_by_priority(
    priorities: torch.Tensor,  # [N]
    k: int,
    *,
    seed: int,
    alpha: float = 1.0,
    replacement: bool = False,
    check: bool = True,
    backend: str = "auto",
) -> PrioritySample:
    """Draw k indices in proportion to p^alpha: the k smallest keys log(E_i) - alpha log(p_i), E_i exponential.

    shapes          priorities [N] >= 0, 0 is never drawn; indices, probabilities [k] (single-draw p^alpha / sum)
    dtypes          priorities fp16, bf16, fp32, fp64; indices int64; probabilities fp32 (fp64 for fp64)
    random numbers  Philox 4x32-10, key = seed, counter = index (of the draw with replacement); ties by lower index
    replacement     False: sequential weighted sampling; True: inverse CDF on fp64 cumulative sums
    check           True looks at the values (one sync on a device); False gives index -1 where nothing can be drawn
    differentiable  nothing
    backend         "cuda": keys in one launch, on the CPU by its C++ twin, without replacement; "torch": every case
    raises          ValueError on NaN, infinite or negative priorities, or k beyond the positive ones; RuntimeError where
                    the backend cannot run
    source          Efraimidis and Spirakis (2006); R1V2 (2504.16656) section 3.3.2: priority = |advantage|
    """
    if priorities.dim() != 1 or not priorities.is_floating_point():
        raise ValueError(f"priorities must be floats [N], got {priorities.dtype} {tuple(priorities.shape)}")
    if k < 0 or alpha < 0:
        raise ValueError(f"k and alpha must be 0 or more, got {k} and {alpha}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must lie in [0, 2^63), got {seed}")
    lacks = ("cuda", "it draws without replacement only" if replacement else None)
    chosen = _backend.pick("priority_sample", backend, priorities, lacks=lacks)
    if check:
        _check(priorities, k, replacement)
    op = _native_op if chosen == "cuda" else _op
    return PrioritySample(*op(priorities.detach(), k, seed, float(alpha), replacement))


def _check(priorities: torch.Tensor, k: int, replacement: bool) -> None:
    bad = ~priorities.isfinite() | (priorities < 0)
    positive = int((priorities > 0).sum())
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        raise ValueError(f"priorities must be finite and 0 or more, got {priorities[index].item()} at index {index}")
    if k > 0 and (positive == 0 or (not replacement and k > positive)):
        raise ValueError(f"cannot draw k = {k} from {positive} positive priorities of {len(priorities)}")


_SCHEMA = "(Tensor priorities, SymInt k, int seed, float alpha, bool replacement) -> (Tensor, Tensor)"
torch.library.define("r1v2_fast::priority_sample", _SCHEMA)
torch.library.define("r1v2_fast::priority_sample_native", _SCHEMA)


@torch.library.impl("r1v2_fast::priority_sample", "default")
def _impl(priorities, k, seed, alpha, replacement):
    return _drawn(priorities, k, alpha, lambda usable: reference.sample(usable, k, seed, alpha, replacement))


@torch.library.impl("r1v2_fast::priority_sample_native", "default")
def _native_impl(priorities, k, seed, alpha, replacement):
    assert not replacement
    return _drawn(priorities, k, alpha, lambda usable: reference.smallest(_native.race_keys(usable, seed, alpha), k))


def _drawn(priorities, k, alpha, draw):
    usable = priorities.where(priorities.isfinite() & (priorities > 0), 0)
    wide = torch.float64 if priorities.dtype == torch.float64 else torch.float32
    indices = torch.full((k,), -1, dtype=torch.int64, device=priorities.device)
    if k and len(priorities):
        drawn = draw(usable)
        indices[: len(drawn)] = drawn
        indices.masked_fill_(usable[indices.clamp(min=0)] <= 0, -1)
    mass = torch.where(usable > 0, usable.double() ** alpha, 0)
    share = mass[indices.clamp(min=0)] / mass.sum() if len(priorities) else mass.new_zeros(k)
    return indices, share.masked_fill(indices < 0, 0).to(wide)


@torch.library.register_fake("r1v2_fast::priority_sample_native")
@torch.library.register_fake("r1v2_fast::priority_sample")
def _fake(priorities, k, seed, alpha, replacement):
    wide = torch.float64 if priorities.dtype == torch.float64 else torch.float32
    return priorities.new_empty(k, dtype=torch.int64), priorities.new_empty(k, dtype=wide)


_op = torch.ops.r1v2_fast.priority_sample.default
_native_op = torch.ops.r1v2_fast.priority_sample_native.default
