"""Sampling by priority, as the Selective Sample Buffer draws: a pure function of (priorities, k, seed, alpha)."""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1v2_fast import _native
from r1v2_fast.ops import _backend, _number
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
    alpha           0 to 1000: beyond, keys of equal priorities would round to ties
    random numbers  Philox 4x32-10, key = seed, counter = index (of the draw with replacement); ties by lower index
    replacement     False: sequential weighted sampling; True: inverse CDF on fp64 sums
    check           True looks at the values (one sync on a device); False takes bad priorities for 0 and gives index -1 where
                    nothing can be drawn
    differentiable  nothing
    backend         "cuda": the k first of the race are found without making every key, in one launch; on the CPU its C++
                    twin, on torch's threads, with the same indices; "torch": every key, sorted
    raises          ValueError on NaN, infinite or negative priorities, or k beyond the positive ones; RuntimeError where
                    the backend cannot run
    source          Efraimidis and Spirakis (2006); R1V2 (2504.16656) section 3.3.2: priority = |advantage|
    """
    if priorities.dim() != 1 or not priorities.is_floating_point():
        raise ValueError(f"priorities must be floats [N], got {priorities.dtype} {tuple(priorities.shape)}")
    k, seed = _number.whole("k", k, 0), _number.seed(seed)
    if not 0 <= alpha <= 1000:
        raise ValueError(f"alpha must lie in [0, 1000], got {alpha}")
    chosen = _backend.pick("priority_sample", backend, priorities)
    op = _native_op if chosen == "cuda" else _op
    indices, probabilities, status = op(priorities.detach(), k, seed, float(alpha), replacement)
    if check:
        _check(priorities, k, replacement, status)
    return PrioritySample(indices, probabilities)


def _check(priorities: torch.Tensor, k: int, replacement: bool, status: torch.Tensor) -> None:
    positive, bad, failed = status.tolist()  # the one sync
    if bad >= 0:
        raise ValueError(f"priorities must be finite and 0 or more, got {priorities[bad].item()} at index {bad}")
    if k > 0 and (positive == 0 or (not replacement and k > positive)):
        raise ValueError(f"cannot draw k = {k} from {positive} positive priorities of {len(priorities)}")
    if failed:
        raise RuntimeError(f"priority_sample found no limit for k = {k} of {len(priorities)}; use backend='torch'")


_SCHEMA = "(Tensor priorities, SymInt k, int seed, float alpha, bool replacement) -> (Tensor, Tensor, Tensor)"
torch.library.define("r1v2_fast::priority_sample", _SCHEMA)
torch.library.define("r1v2_fast::priority_sample_native", _SCHEMA)


@torch.library.impl("r1v2_fast::priority_sample", "default")
def _impl(priorities, k, seed, alpha, replacement):
    good = priorities.isfinite() & (priorities >= 0)
    usable = priorities.where(good, 0)
    bad = torch.arange(len(good), device=good.device).where(~good, len(good))
    first_bad = bad.amin() if len(bad) else bad.new_zeros(())
    status = torch.stack(((usable > 0).sum(), first_bad.where(first_bad < len(good), -1), first_bad.new_zeros(())))
    indices = torch.full((k,), -1, dtype=torch.int64, device=priorities.device)
    if k and len(priorities):
        drawn = reference.sample(usable, k, seed, alpha, replacement)
        indices[: len(drawn)] = drawn
        indices.masked_fill_(usable[indices.clamp(min=0)] <= 0, -1)
    mass = reference.masses(usable, alpha)
    share = mass[indices.clamp(min=0)] / mass.sum() if len(priorities) else mass.new_zeros(k)
    return indices, share.masked_fill(indices < 0, 0).to(_wide(priorities)), status


@torch.library.impl("r1v2_fast::priority_sample_native", "default")
def _native_impl(priorities, k, seed, alpha, replacement):
    draw = _native.priority_draw if replacement else _native.priority_sample
    return draw(priorities, k, seed, alpha)


def _wide(priorities: torch.Tensor) -> torch.dtype:
    return torch.float64 if priorities.dtype == torch.float64 else torch.float32


@torch.library.register_fake("r1v2_fast::priority_sample_native")
@torch.library.register_fake("r1v2_fast::priority_sample")
def _fake(priorities, k, seed, alpha, replacement):
    status = priorities.new_empty(3, dtype=torch.int64)
    return priorities.new_empty(k, dtype=torch.int64), priorities.new_empty(k, dtype=_wide(priorities)), status


_op = torch.ops.r1v2_fast.priority_sample.default
_native_op = torch.ops.r1v2_fast.priority_sample_native.default
