"""Group-relative advantages over groups of any sizes, without a loop over groups and without a host sync.

N rewards, R components, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from r1v2_fast.ops import _backend

_backend.register("group_advantage", ("triton", _backend.triton_why_not))


class GroupAdvantages(NamedTuple):
    advantages: torch.Tensor  # [N]
    mean: torch.Tensor  # [G]
    std: torch.Tensor  # [G]
    informative: torch.Tensor  # [G] bool


CHOICES = {
    "aggregate": ("sum", "gdpo"),
    "baseline": ("mean", "leave_one_out"),
    "scale": ("group", "batch", "none"),
    "correction": (0, 1),
    "eps_mode": ("add", "clamp"),
    "singleton": ("zero", "raw"),
}


def group_advantages(
    rewards: torch.Tensor,  # [N] or [N, R]
    groups: int | torch.Tensor,  # uniform size, or offsets [G + 1]
    *,
    component_weights: torch.Tensor | None = None,  # [R]
    aggregate: str = "sum",
    baseline: str = "mean",
    scale: str = "group",
    correction: int = 1,
    eps: float = 1e-4,
    eps_mode: str = "add",
    singleton: str = "zero",
    informative_from: torch.Tensor | None = None,  # [N]
    informative_tol: float = 0.0,
    zero_uninformative: bool = False,
    backend: str = "auto",
) -> GroupAdvantages:
    """A_i = (r_i - mean_g) / (std_g + eps) within each group g; r_i the weighted sum of i's reward components.

    shapes          rewards [N] or [N, R]; advantages [N]; mean, std, informative [G]
    dtypes          fp16, bf16, fp32 -> fp32; fp64 -> fp64
    aggregate       "sum": sum, then normalise (R1V2); "gdpo": normalise each component, sum, whiten over the batch
    baseline        "mean", or "leave_one_out": the mean of the others
    scale           divide by the group's std, the batch's, or nothing (Dr. GRPO); correction 1 is the unbiased std
    eps_mode        "add": std + eps; "clamp": max(std, eps)
    singleton       a group of one: "zero" advantage, or "raw": mean 0 and std 1 (verl)
    informative     max - min > informative_tol over the finite values of informative_from (default: r)
    NaN             a NaN component is skipped; all NaN: outside its group's statistics, advantage 0
    differentiable  nothing: advantages are constants of the policy gradient
    backend         "triton": one launch, statistics in fp32; "torch": statistics in fp64, and every case
    raises          ValueError on wrong shapes, offsets (looked at on the CPU) or names; RuntimeError where the backend
                    cannot run: Triton has no gdpo, no scale="batch" (both need the whole batch first) and no fp64
    source          DeepSeekMath (2402.03300) section 4.1.2; Skywork R1V2 (2504.16656) eq. 6; GDPO (2601.05242)
    """
    given = {
        "aggregate": aggregate,
        "baseline": baseline,
        "scale": scale,
        "correction": correction,
        "eps_mode": eps_mode,
        "singleton": singleton,
    }
    for name, value in given.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {CHOICES[name]}, got {value!r}")
    if rewards.dim() not in (1, 2) or not rewards.is_floating_point():
        raise ValueError(f"rewards must be floats [N] or [N, R], got {rewards.dtype} {tuple(rewards.shape)}")
    wide = torch.float64 if rewards.dtype == torch.float64 else torch.float32
    rewards_NR = (rewards[:, None] if rewards.dim() == 1 else rewards).detach().to(wide)
    count, components = rewards_NR.shape
    if component_weights is not None and component_weights.shape != (components,):
        raise ValueError(f"component_weights must be [{components}], got {tuple(component_weights.shape)}")
    if informative_from is not None and informative_from.shape != (count,):
        raise ValueError(f"informative_from must be [{count}], got {tuple(informative_from.shape)}")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    offsets = _offsets(groups, count, rewards.device)
    weights = rewards_NR.new_ones(components) if component_weights is None else component_weights.to(rewards_NR)
    deciding = None if informative_from is None else informative_from.detach().to(rewards_NR)
    lacks = ("triton", _triton_lacks(aggregate, scale, wide))
    chosen = _backend.pick("group_advantage", backend, rewards, lacks=lacks)
    arguments = (
        rewards_NR, offsets, weights, deciding, aggregate, baseline, scale, correction, eps, eps_mode, singleton,
        informative_tol, zero_uninformative,
    )  # fmt: skip
    return GroupAdvantages(*(_triton_op if chosen == "triton" else _torch_op)(*arguments))


def _triton_lacks(aggregate: str, scale: str, dtype: torch.dtype) -> str | None:
    if aggregate == "gdpo" or scale == "batch":
        return (
            f"aggregate={aggregate!r} with scale={scale!r} needs the whole batch's moments before the first advantage"
        )
    return "it computes in fp32 and the rewards are fp64" if dtype == torch.float64 else None


def groups_from_ids(ids: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [N], offsets [G + 1]): `ids[order]` has equal ids together, groups and members in first-seen order.

    ids     int tensor [N], or a NumPy array of ints or hashable objects (verl's uids); time linear in N
    raises  ValueError on another shape or dtype
    """
    if isinstance(ids, torch.Tensor):
        if ids.dim() != 1 or ids.is_floating_point():
            raise ValueError(f"ids must be int [N], got {ids.dtype} {tuple(ids.shape)}")
        values: list = ids.tolist()
        device = ids.device
    else:
        if not isinstance(ids, np.ndarray) or ids.ndim != 1:
            raise ValueError(f"ids must be a 1-D tensor or NumPy array, got {type(ids).__name__}")
        values, device = ids.tolist(), torch.device("cpu")
    numbers: dict = {}
    labels = np.fromiter((numbers.setdefault(value, len(numbers)) for value in values), np.int64, len(values))
    order = np.argsort(labels, kind="stable")  # radix sort for ints
    offsets = np.concatenate([[0], np.bincount(labels, minlength=len(numbers)).cumsum()]).astype(np.int64)
    return torch.from_numpy(order).to(device), torch.from_numpy(offsets).to(device)


def _offsets(groups: int | torch.Tensor, count: int, device: torch.device) -> torch.Tensor:
    if not isinstance(groups, torch.Tensor):
        if groups < 1 or count % groups:
            raise ValueError(f"the group size must divide the number of rewards {count}, got {groups}")
        return torch.arange(0, count + 1, groups, device=device)
    if groups.dim() != 1 or len(groups) < 1 or groups.is_floating_point():
        raise ValueError(f"offsets must be int [n_groups + 1], got {groups.dtype} {tuple(groups.shape)}")
    if groups.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(groups[0]) != 0 or int(groups[-1]) != count:
            raise ValueError(
                f"offsets must start at 0 and end at len(rewards) = {count}, got {int(groups[0])} and {int(groups[-1])}"
            )
        if bool((groups.diff() < 0).any()):
            raise ValueError("offsets must not decrease")
    return groups.to(device, torch.int64)


_SCHEMA = (
    "(Tensor rewards, Tensor offsets, Tensor weights, Tensor? informative_from, str aggregate, str baseline, str scale, "
    "int correction, float eps, str eps_mode, str singleton, float informative_tol, bool zero_uninformative) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define("r1v2_fast::group_advantage", _SCHEMA)
torch.library.define("r1v2_fast::group_advantage_triton", _SCHEMA)


@torch.library.impl("r1v2_fast::group_advantage_triton", "default")
def _triton_impl(
    rewards_NR, offsets, weights, deciding, aggregate, baseline, scale, correction, eps, eps_mode, singleton, tol, zero
):
    from r1v2_fast.kernels import group_advantage as kernel  # Triton is imported when a kernel is wanted, not before

    with _backend.on_device_of(rewards_NR):
        return kernel.launch(
            rewards_NR.contiguous(),
            offsets.contiguous(),
            weights.contiguous(),
            None if deciding is None else deciding.contiguous(),
            leave_one_out=baseline == "leave_one_out",
            divide=scale == "group",
            correction=correction,
            eps=eps,
            clamp=eps_mode == "clamp",
            raw_singleton=singleton == "raw",
            tol=tol,
            zero_uninformative=zero,
        )


@torch.library.impl("r1v2_fast::group_advantage", "default")
def _impl(
    rewards_NR, offsets, weights, deciding, aggregate, baseline, scale, correction, eps, eps_mode, singleton, tol, zero
):
    count, groups = len(rewards_NR), len(offsets) - 1
    out_dtype = rewards_NR.dtype
    # fp64 inside costs nothing at these sizes and spares whitening of whitened values its cancellation
    rewards_NR, weights = rewards_NR.double(), weights.double()
    members = torch.arange(count, device=rewards_NR.device)
    group_N = torch.searchsorted(offsets[1:].contiguous(), members, right=True).clamp(max=max(groups - 1, 0))
    missing_NR = rewards_NR.isnan()
    totals = (
        (rewards_NR.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf) * weights).where(~missing_NR, 0).sum(1)
    )
    totals = totals.masked_fill(missing_NR.all(1), torch.nan)
    how = (group_N, groups, baseline, scale, correction, eps, eps_mode, singleton)
    advantages, mean, std = _centre(totals, *how)
    live = ~totals.isnan()
    if aggregate == "gdpo":
        parts = [
            _centre(column, *how)[0] * weight for column, weight in zip(rewards_NR.unbind(1), weights, strict=True)
        ]
        advantages = torch.stack(parts).sum(0)
        batch_mean, batch_std = _batch_moments(advantages, live, correction)
        whitened = (advantages - batch_mean) / (batch_std + eps if eps_mode == "add" else batch_std.clamp(min=eps))
        advantages = whitened.where(live & (batch_std > 0), advantages.where(live, 0))
    deciding = totals if deciding is None else deciding.double()
    high, low = _extent(deciding, deciding.isfinite(), group_N, groups)
    informative = (high - low) > tol
    if zero and count:
        advantages = advantages.where(informative[group_N], 0)
    return advantages.to(out_dtype), mean.to(out_dtype), std.to(out_dtype), informative


def _extent(values, live, group_N, groups):
    high = values.new_full((groups,), -torch.inf).scatter_reduce(0, group_N, values.where(live, -torch.inf), "amax")
    low = values.new_full((groups,), torch.inf).scatter_reduce(0, group_N, values.where(live, torch.inf), "amin")
    return high, low


def _batch_moments(values, live, correction):
    count = live.sum()
    mean = values.where(live, 0).sum() / count.clamp(min=1)
    square = (values - mean).square().where(live, 0).sum()
    return mean, (square / (count - correction).clamp(min=1)).sqrt()


def _centre(values, group_N, groups, baseline, scale, correction, eps, eps_mode, singleton):
    """Two passes, so that equal rewards give exactly zero; statistics over the rewards that are not NaN."""
    live = ~values.isnan()
    known = values.where(live, 0)
    count = values.new_zeros(groups).index_add(0, group_N, live.to(values.dtype))
    high, low = _extent(values, live, group_N, groups)
    mean = values.new_zeros(groups).index_add(0, group_N, known) / count.clamp(min=1)
    flat = high == low
    mean = torch.where(flat, high, mean)
    alone = (count == 1) & (singleton == "raw")
    mean = mean.masked_fill(alone, 0)
    deviation = (known - mean[group_N]).where(live, 0) if len(values) else known
    square = values.new_zeros(groups).index_add(0, group_N, deviation.square())
    std = (square / (count - correction).clamp(min=1)).sqrt()
    std = std.masked_fill(flat | (count <= correction), 0).masked_fill(alone, 1)
    if not len(values):
        return known, mean, std
    if baseline == "leave_one_out":
        deviation = deviation * (count / (count - 1).clamp(min=1))[group_N]
    if scale != "none":
        spread = std if scale == "group" else _batch_moments(known, live, correction)[1].expand(groups)
        divisor = spread + eps if eps_mode == "add" else spread.clamp(min=eps)
        deviation = deviation / divisor[group_N]
    silent = ~live | (flat & ~alone)[group_N]
    return deviation.masked_fill(silent, 0), mean, std


@torch.library.register_fake("r1v2_fast::group_advantage_triton")
@torch.library.register_fake("r1v2_fast::group_advantage")
def _fake(rewards_NR, offsets, *arguments):
    per_group = rewards_NR.new_empty(len(offsets) - 1)
    return (
        rewards_NR.new_empty(len(rewards_NR)), per_group, per_group.new_empty(len(per_group)),
        per_group.new_empty(len(per_group), dtype=torch.bool),
    )  # fmt: skip


_torch_op = torch.ops.r1v2_fast.group_advantage.default
_triton_op = torch.ops.r1v2_fast.group_advantage_triton.default
