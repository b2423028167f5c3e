"""Group-relative advantages in plain PyTorch, without a loop over groups; statistics in fp64. NaN means: there is none.

N rewards, R components, G groups. Values of uniform groups are a view [G, size], those of ragged groups stay [N].
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1v2_fast.ops._packed import bounds_of

Tensors = tuple[torch.Tensor, ...]
EMPTY = {"sum": 0.0, "max": -torch.inf, "min": torch.inf}  # of a group without members


class _Uniform(NamedTuple):
    size: int

    def rows(self, values_N: torch.Tensor) -> torch.Tensor:
        return values_N.view(-1, self.size)

    def reduced(self, values: torch.Tensor, how: str) -> torch.Tensor:
        return values.sum(1) if how == "sum" else values.amax(1) if how == "max" else values.amin(1)

    def of_member(self, values_G: torch.Tensor) -> torch.Tensor:
        return values_G[:, None]


class _Ragged(NamedTuple):
    bounds: torch.Tensor  # [G + 1]
    group_N: torch.Tensor

    @classmethod
    def of(cls, offsets: torch.Tensor, count: int) -> _Ragged:
        """Whatever the offsets are, their bounds cover [0, count] and do not decrease."""
        bounds = bounds_of(offsets.long(), count)
        bounds[0], bounds[-1] = 0, count
        numbers = torch.arange(len(bounds) - 1, device=bounds.device)
        return cls(bounds, numbers.repeat_interleave(bounds.diff(), output_size=count))

    def rows(self, values_N: torch.Tensor) -> torch.Tensor:
        return values_N

    def reduced(self, values: torch.Tensor, how: str) -> torch.Tensor:
        return torch.segment_reduce(values, how, offsets=self.bounds, initial=EMPTY[how], unsafe=True)

    def of_member(self, values_G: torch.Tensor) -> torch.Tensor:
        return values_G.index_select(0, self.group_N)


class _Moments(NamedTuple):
    known: torch.Tensor  # how many values there are
    mean: torch.Tensor
    std: torch.Tensor
    extent: torch.Tensor
    """Highest less lowest; -inf where there is no value."""


def _moments(values: torch.Tensor, groups: _Uniform | _Ragged, correction: int) -> _Moments:
    """Taken less each group's highest value, so that equal values have exactly their mean and no deviation."""
    live = ~values.isnan()
    high, low = (
        groups.reduced(values.where(live, -torch.inf), "max"),
        groups.reduced(values.where(live, torch.inf), "min"),
    )
    count = groups.reduced(live.to(values.dtype), "sum")
    pivot = high.where(count > 0, 0)
    deviation = (values - groups.of_member(pivot)).where(live, 0)
    shift = groups.reduced(deviation, "sum") / count.clamp(min=1)
    rest = (deviation - groups.of_member(shift)).where(live, 0)
    square = groups.reduced(rest * rest, "sum")
    return _Moments(count, pivot + shift, (square / (count - correction).clamp(min=1)).sqrt(), high - low)


def _divisor(std: torch.Tensor, eps: float, eps_mode: str) -> torch.Tensor:
    """inf instead of 0, because what divides by 0 shall be 0."""
    divisor = std + eps if eps_mode == "add" else std.clamp(min=eps)
    return divisor.masked_fill(divisor == 0, torch.inf)


def _total(known_NR: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """NaN components are skipped; a total of none, or one that overflows, is NaN."""
    total = (known_NR if weights is None else known_NR * weights).nansum(1)
    return total.masked_fill(known_NR.isnan().all(1) | total.isinf(), torch.nan)


def group_advantages(
    rewards_NR, offsets, size, weights, deciding, aggregate, baseline, scale, correction, eps, eps_mode, singleton, tol, zero
) -> Tensors:  # fmt: skip
    """Advantages [N], mean, std, informative [G]; the floats in fp64."""
    count = len(rewards_NR)
    if not count:
        empty_G = rewards_NR.new_zeros(0 if offsets is None else len(offsets) - 1, dtype=torch.float64)
        return rewards_NR.new_zeros(0, dtype=torch.float64), empty_G, empty_G.clone(), empty_G > 0
    groups = _Uniform(size) if offsets is None else _Ragged.of(offsets, count)
    batch = _Uniform(count)
    weights = None if weights is None else weights.double()
    known_NR = _finite(rewards_NR)

    def centred(values: torch.Tensor) -> tuple[torch.Tensor, _Moments]:
        found = _moments(values, groups, correction)
        equal = found.extent == 0
        if singleton == "raw":
            alone = found.known == 1
            found = found._replace(mean=found.mean.masked_fill(alone, 0), std=found.std.masked_fill(alone, 1))
            equal &= ~alone
        deviation = values - groups.of_member(found.mean)
        if baseline == "leave_one_out":
            deviation = deviation * groups.of_member(found.known / (found.known - 1).clamp(min=1))
        if scale != "none":
            spread = found if scale == "group" else _moments(batch.rows(values), batch, correction)
            divisor = _divisor(spread.std, eps, eps_mode)
            deviation = deviation / (groups.of_member(divisor) if scale == "group" else divisor)
        return deviation.masked_fill(groups.of_member(equal), torch.nan), found

    totals = groups.rows(_total(known_NR, weights))
    advantages, found = centred(totals)
    if aggregate == "gdpo":
        parts = [centred(groups.rows(column_N.contiguous()))[0].flatten() for column_N in known_NR.unbind(1)]
        summed_N, live_N = _total(torch.stack(parts, 1), weights), ~totals.flatten().isnan()
        whole = _moments(batch.rows(summed_N.nan_to_num(0).where(live_N, torch.nan)), batch, correction)
        whitened_N = (summed_N - whole.mean) / _divisor(whole.std, eps, eps_mode)
        advantages = groups.rows(whitened_N.where(live_N, torch.nan))
    extent = found.extent if deciding is None else _moments(groups.rows(_finite(deciding)), groups, correction).extent
    informative = extent > tol
    if zero:
        advantages = advantages.where(groups.of_member(informative), torch.nan)
    floats: Tensors = (advantages.masked_fill(advantages.isnan(), 0).flatten(), found.mean, found.std)
    if offsets is not None:
        wrong = (offsets[0] != 0) | (offsets[-1] != count) | (offsets.diff() < 0).any()
        floats = tuple(values.masked_fill(wrong, torch.nan) for values in floats)
    return *floats, informative


def _finite(values: torch.Tensor) -> torch.Tensor:
    return values.double().where(values.isfinite(), torch.nan)
