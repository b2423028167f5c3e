"""Group-relative advantages: the definition, group by group."""

from __future__ import annotations

import itertools
import math

import torch


def _moments(values: list[float], correction: int) -> tuple[float, float]:
    mean = sum(values) / len(values)
    if len(values) <= correction:
        return mean, 0.0
    return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - correction))


def _scaled(deviation: float, std: float, eps: float, eps_mode: str) -> float:
    return deviation / (std + eps if eps_mode == "add" else max(std, eps))


def _centre(values_N: torch.Tensor, offsets: list[int], *, baseline, scale, correction, eps, eps_mode, singleton):
    """(r - baseline) / spread within each group; NaN rewards stand outside and get 0."""
    values = values_N.double().tolist()
    finite_all = [v for v in values if not math.isnan(v)]
    batch_std = _moments(finite_all, correction)[1] if finite_all else 0.0
    advantages, means, stds = [0.0] * len(values), [], []
    for start, end in itertools.pairwise(offsets):
        live = [i for i in range(start, end) if not math.isnan(values[i])]
        group = [values[i] for i in live]
        mean, std = _moments(group, correction) if group else (0.0, 0.0)
        if group and max(group) == min(group):
            mean, std = group[0], 0.0
        if len(group) == 1 and singleton == "raw":
            mean, std = 0.0, 1.0
        means.append(mean)
        stds.append(std)
        if not group or (max(group) == min(group) and not (len(group) == 1 and singleton == "raw")):
            continue
        for i in live:
            deviation = values[i] - mean
            if baseline == "leave_one_out" and len(group) > 1:
                deviation *= len(group) / (len(group) - 1)  # r - mean of the others
            spread = {"group": std, "batch": batch_std}.get(scale)
            advantages[i] = deviation if spread is None else _scaled(deviation, spread, eps, eps_mode)
    make = lambda v: torch.tensor(v, dtype=torch.float64)  # noqa: E731
    return make(advantages), make(means), make(stds)


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

    rewards    [N] or [N, R]; offsets list [n_groups + 1]; NaN components are skipped
    returns    advantages [N], mean, std [n_groups], informative [n_groups], all fp64
    gradient   none: advantages are constants of the policy gradient
    source     DeepSeekMath (2402.03300) section 4.1.2; Skywork R1V2 (2504.16656) eq. 6; GDPO (2601.05242)
    """
    rewards_NR = (rewards[:, None] if rewards.dim() == 1 else rewards).double()
    weights = torch.ones(rewards_NR.shape[1]) if component_weights is None else component_weights
    weighted_NR = rewards_NR * weights.double()
    totals = torch.where(rewards_NR.isnan().all(1), torch.nan, weighted_NR.nansum(1))
    how = {"baseline": baseline, "correction": correction, "eps": eps, "eps_mode": eps_mode, "singleton": singleton}
    advantages, mean, std = _centre(totals, offsets, scale=scale, **how)
    if aggregate == "gdpo":
        parts = [
            _centre(rewards_NR[:, k], offsets, scale=scale, **how)[0] * weights[k].double() for k in range(len(weights))
        ]
        advantages = torch.stack(parts).sum(0)
        live = ~totals.isnan()
        if live.any():
            batch_mean, batch_std = _moments(advantages[live].tolist(), correction)
            if batch_std > 0:
                whitened = [_scaled(a - batch_mean, batch_std, eps, eps_mode) for a in advantages.tolist()]
                advantages = torch.tensor(whitened, dtype=torch.float64).where(live, 0.0)
    deciding = (totals if informative_from is None else informative_from.double()).tolist()
    informative = []
    for start, end in itertools.pairwise(offsets):
        finite = [v for v in deciding[start:end] if math.isfinite(v)]
        informative.append(bool(finite) and max(finite) - min(finite) > informative_tol)
        if zero_uninformative and not informative[-1]:
            advantages[start:end] = 0.0
    return advantages, mean, std, torch.tensor(informative, dtype=torch.bool)
