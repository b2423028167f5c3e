"""Group-relative advantages: the definition, group by group."""

from __future__ import annotations

import itertools
import math

import torch

NOTHING = math.nan  # the advantage of a reward that has none, until it becomes 0


def _moments(values: list[float], correction: int) -> tuple[float, float]:
    """Mean and standard deviation; equal values have exactly their mean and no deviation."""
    if not values:
        return 0.0, 0.0
    if max(values) == min(values):
        return values[0], 0.0
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - correction))


def _scaled(deviation: float, std: float, eps: float, eps_mode: str) -> float:
    divisor = std + eps if eps_mode == "add" else max(std, eps)
    return deviation / divisor if divisor > 0 else 0.0


def _centre(values: list[float], offsets: list[int], *, baseline, scale, correction, eps, eps_mode, singleton):
    """(r - baseline) / spread within each group; NOTHING for a reward that is NaN and in a group of equal rewards."""
    advantages, means, stds = [NOTHING] * len(values), [], []
    batch_std = _moments([v for v in values if not math.isnan(v)], correction)[1]
    for start, end in itertools.pairwise(offsets):
        live = [i for i in range(start, end) if not math.isnan(values[i])]
        group = [values[i] for i in live]
        mean, std = _moments(group, correction)
        raw = len(group) == 1 and singleton == "raw"
        if raw:
            mean, std = 0.0, 1.0
        means.append(mean)
        stds.append(std)
        if not group or (max(group) == min(group) and not raw):
            continue
        for i in live:
            deviation = values[i] - mean
            if baseline == "leave_one_out" and len(group) > 1:
                deviation *= len(group) / (len(group) - 1)  # r - mean of the others
            spread = {"group": std, "batch": batch_std}.get(scale)
            advantages[i] = deviation if spread is None else _scaled(deviation, spread, eps, eps_mode)
    return advantages, means, stds


def group_advantages(
    rewards,
    offsets,
    *,
    component_weights=None,
    aggregate="sum",
    baseline="mean",
    scale="group",
    correction=1,
    eps=1e-4,
    eps_mode="add",
    singleton="zero",
    informative_from=None,
    informative_tol=0.0,
    zero_uninformative=False,
):
    """A_i = (r_i - mean_g) / (std_g + eps) within each group g.

    rewards    [N] or [N, R]; offsets list [n_groups + 1]; components that are NaN or infinite are skipped
    returns    advantages [N], mean, std [n_groups], informative [n_groups], all fp64
    gradient   none: advantages are constants of the policy gradient
    source     DeepSeekMath (2402.03300) section 4.1.2; Skywork R1V2 (2504.16656) eq. 6; GDPO (2601.05242)
    """
    rewards_NR = (rewards[:, None] if rewards.dim() == 1 else rewards).double()
    known_NR = rewards_NR.where(rewards_NR.isfinite(), torch.nan)
    weights = torch.ones(known_NR.shape[1]) if component_weights is None else component_weights
    totals_N = (known_NR * weights.double()).nansum(1).masked_fill(known_NR.isnan().all(1), torch.nan)
    totals = totals_N.where(totals_N.isfinite(), torch.nan).tolist()
    how = {"baseline": baseline, "correction": correction, "eps": eps, "eps_mode": eps_mode, "singleton": singleton}
    advantages, means, stds = _centre(totals, offsets, scale=scale, **how)
    if aggregate == "gdpo":
        columns = [_centre(column.tolist(), offsets, scale=scale, **how)[0] for column in known_NR.unbind(1)]
        parts = torch.tensor(columns, dtype=torch.float64)
        summed = (parts * weights.double()[:, None]).nansum(0).tolist()
        live = [not math.isnan(total) for total in totals]
        mean, std = _moments(list(itertools.compress(summed, live)), correction)
        heard = (~parts.isnan().all(0)).tolist()
        advantages = [
            _scaled(a - mean, std, eps, eps_mode) if alive and any_heard else NOTHING
            for a, alive, any_heard in zip(summed, live, heard, strict=True)
        ]
    deciding = totals if informative_from is None else informative_from.double().tolist()
    informative = []
    for start, end in itertools.pairwise(offsets):
        finite = [v for v in deciding[start:end] if math.isfinite(v)]
        informative.append(bool(finite) and max(finite) - min(finite) > informative_tol)
        if zero_uninformative and not informative[-1]:
            advantages[start:end] = [NOTHING] * (end - start)
    advantages_N, mean_G, std_G = (torch.tensor(values, dtype=torch.float64) for values in (advantages, means, stds))
    return advantages_N.masked_fill(advantages_N.isnan(), 0), mean_G, std_G, torch.tensor(informative, dtype=torch.bool)
