"""Group-relative advantages over groups of any sizes, without a loop over groups and without a host sync.

N rewards, R components, G groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1v2_fast.ops import _backend, _group_advantage_torch
from r1v2_fast.ops.group_ids import groups_from_ids as groups_from_ids

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

    shapes          rewards [N] or [N, R]; group g is rewards[offsets[g]:offsets[g + 1]], of any length, 0 too;
                    advantages [N]; mean, std of r and informative [G]
    dtypes          fp16, bf16, fp32 -> fp32; fp64 -> fp64; offsets int32 or int64
    aggregate       "sum": sum, then normalise (R1V2); "gdpo": normalise each component, sum, whiten over the batch
    baseline        "mean", or "leave_one_out": the mean of the others
    scale           divide by the group's std, the batch's, or nothing (Dr. GRPO); correction 1 is the unbiased std
    eps_mode        "add": std + eps; "clamp": max(std, eps); where that is 0, the advantage is 0
    singleton       a group of one: "zero" advantage, or "raw": mean 0 and std 1 (verl)
    equal rewards   a group whose rewards are all equal gets exactly 0, whatever eps is, and under "gdpo" so does one
                    whose components all are
    informative     max - min > informative_tol over the finite values of informative_from (default: r);
                    zero_uninformative gives the other groups advantage 0
    NaN, inf        a component that is not finite is skipped; a reward without one that is stands outside its group's
                    statistics and gets 0: it reaches nobody else, and no advantage is NaN
    differentiable  nothing: advantages are constants of the policy gradient
    backend         "triton": one launch, or two for scale="batch" and "gdpo", whatever the dtypes and strides; statistics
                    in fp32: beyond |r| of 1e18 squares overflow and advantages are 0; the batch's moments in fp64.
                    "torch": statistics in fp64, and every case. Neither waits for the device
    raises          ValueError on wrong shapes, names, and offsets where they are on the CPU; elsewhere, and inside
                    torch.compile, wrong offsets read nothing outside and make mean and std of their groups NaN.
                    RuntimeError where the backend cannot run: Triton has no fp64, and no "gdpo" with scale="batch"
    source          DeepSeekMath (2402.03300) section 4.1.2; Skywork R1V2 (2504.16656) eq. 6; Dr. GRPO (2503.20783);
                    RLOO (2402.14740); GDPO (2601.05242)
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
    rewards_NR = (rewards[:, None] if rewards.dim() == 1 else rewards).detach()
    count, components = rewards_NR.shape
    if not components:
        raise ValueError(f"rewards must have a component, got {tuple(rewards.shape)}")
    if component_weights is not None and component_weights.shape != (components,):
        raise ValueError(f"component_weights must be [{components}], got {tuple(component_weights.shape)}")
    if component_weights is not None and (
        component_weights.is_complex() or (component_weights.device.type == "cpu" and not _finite(component_weights))
    ):
        raise ValueError(f"component_weights must be finite real numbers, got {component_weights.tolist()}")
    if informative_from is not None and (informative_from.shape != (count,) or informative_from.is_complex()):
        got = f"{informative_from.dtype} {tuple(informative_from.shape)}"
        raise ValueError(f"informative_from must be real numbers [{count}], got {got}")
    if not eps >= 0:
        raise ValueError(f"eps must be 0 or more, got {eps}")
    size, offsets = _layout(groups, count, rewards.device)
    weights, deciding = (
        None if tensor is None else tensor.detach().to(rewards.device)
        for tensor in (component_weights, informative_from)
    )
    lacks = ("triton", _triton_lacks(aggregate, scale, rewards.dtype))
    chosen = _backend.pick("group_advantage", backend, rewards, lacks=lacks)
    arguments = (
        rewards_NR, offsets, size, weights, deciding, aggregate, baseline, scale, correction, eps, eps_mode, singleton,
        informative_tol, zero_uninformative,
    )  # fmt: skip
    return GroupAdvantages(*(_triton_op if chosen == "triton" else _torch_op)(*arguments))


def _finite(weights: torch.Tensor) -> bool:
    return torch.compiler.is_compiling() or bool(weights.isfinite().all())


def _triton_lacks(aggregate: str, scale: str, dtype: torch.dtype) -> str | None:
    if aggregate == "gdpo" and scale == "batch":
        return f"{aggregate=} with {scale=} needs the batch's std of every component before it can sum them"
    return "it computes in fp32 and the rewards are fp64" if dtype == torch.float64 else None


def _layout(groups: int | torch.Tensor, count: int, device: torch.device) -> tuple[int, torch.Tensor | None]:
    """The size of every group, or 0 and the offsets."""
    if not isinstance(groups, torch.Tensor):
        if not isinstance(groups, (int, torch.SymInt)):
            raise ValueError(f"groups must be an int or a tensor of offsets, got {type(groups).__name__}")
        if groups < 1 or count % groups:
            raise ValueError(f"the group size must divide the number of rewards {count}, got {groups}")
        return groups, None
    if groups.dim() != 1 or len(groups) < 1 or groups.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"offsets must be int32 or int64 [n_groups + 1], got {groups.dtype} {tuple(groups.shape)}")
    if groups.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(groups[0]) != 0 or int(groups[-1]) != count:
            raise ValueError(
                f"offsets must start at 0 and end at len(rewards) = {count}, got {int(groups[0])} and {int(groups[-1])}"
            )
        if bool((groups.diff() < 0).any()):
            raise ValueError("offsets must not decrease")
    return 0, groups.to(device)


_SCHEMA = (
    "(Tensor rewards, Tensor? offsets, int size, Tensor? weights, Tensor? informative_from, str aggregate, str baseline, "
    "str scale, int correction, float eps, str eps_mode, str singleton, float informative_tol, bool zero_uninformative) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define("r1v2_fast::group_advantage", _SCHEMA)
torch.library.define("r1v2_fast::group_advantage_triton", _SCHEMA)


@torch.library.impl("r1v2_fast::group_advantage_triton", "default")
def _triton_impl(
    rewards_NR, offsets, size, weights, deciding, aggregate, baseline, scale, correction, eps, eps_mode, singleton, tol, zero
):  # fmt: skip
    from r1v2_fast.kernels import group_advantage as kernel  # Triton is imported when a kernel is wanted, not before

    with _backend.on_device_of(rewards_NR):
        return kernel.launch(
            rewards_NR,
            None if offsets is None else offsets.contiguous(),
            size,
            None if weights is None else weights.contiguous(),
            deciding,
            gdpo=aggregate == "gdpo",
            leave_one_out=baseline == "leave_one_out",
            scale=scale,
            correction=correction,
            eps=eps,
            clamp=eps_mode == "clamp",
            raw_singleton=singleton == "raw",
            tol=tol,
            zero_uninformative=zero,
        )


@torch.library.impl("r1v2_fast::group_advantage", "default")
def _impl(rewards_NR, *arguments):
    *floats, informative = _group_advantage_torch.group_advantages(rewards_NR, *arguments)
    return (*(values.to(_out_dtype(rewards_NR)) for values in floats), informative)


def _out_dtype(rewards: torch.Tensor) -> torch.dtype:
    return torch.promote_types(rewards.dtype, torch.float32)


@torch.library.register_fake("r1v2_fast::group_advantage_triton")
@torch.library.register_fake("r1v2_fast::group_advantage")
def _fake(rewards_NR, offsets, size, *arguments):
    count = rewards_NR.shape[0]  # len() would make a graph's symbol a number
    groups = count // size if offsets is None else offsets.shape[0] - 1
    advantages, mean, std = (rewards_NR.new_empty(n, dtype=_out_dtype(rewards_NR)) for n in (count, groups, groups))
    return advantages, mean, std, rewards_NR.new_empty(groups, dtype=torch.bool)


_torch_op = torch.ops.r1v2_fast.group_advantage.default
_triton_op = torch.ops.r1v2_fast.group_advantage_triton.default
