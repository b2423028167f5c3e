"""Responses with everything that a policy loss can be given, and the reference's answer for the op's own arguments.

N tokens, B sequences; packed, or padded with NaN.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch

from r1v2_fast.ops.policy_loss import KINDS, policy_loss
from r1v2_fast.reference import policy_loss as reference

LENGTHS = (3, 0, 5, 4)


class Responses(NamedTuple):
    logprobs: torch.Tensor  # [N]
    old_logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    rollout_logprobs: torch.Tensor
    behaviour_logprobs: torch.Tensor
    token_weights: torch.Tensor
    token_importance: torch.Tensor
    entropy: torch.Tensor
    token_advantages: torch.Tensor
    advantages: torch.Tensor  # [B]
    importance_weights: torch.Tensor  # [B]
    offsets: torch.Tensor  # [B + 1]

    def to(self, target) -> Responses:
        """In another dtype, or on a device."""
        offsets = self.offsets if isinstance(target, torch.dtype) else self.offsets.to(target)
        return Responses(**{name: value.to(target) for name, value in self._asdict().items()} | {"offsets": offsets})

    @property
    def lengths(self) -> torch.Tensor:
        return self.offsets.diff()

    @property
    def mask(self) -> torch.Tensor:
        return torch.arange(int(self.lengths.max()), device=self.offsets.device) < self.lengths[:, None]

    def padded(self, values_N: torch.Tensor) -> torch.Tensor:
        return values_N.new_full(self.mask.shape, torch.nan).masked_scatter(self.mask, values_N)


def responses(lengths=LENGTHS, *, seed: int = 0, spread: float = 1.0) -> Responses:
    """fp64 log-probs `spread` apart; among the advantages zeros, among the weights too, and a NaN from the sampler."""
    g = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    n, b = int(offsets[-1]), len(lengths)

    def normal(scale: float, size: int = n) -> torch.Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64) * scale

    logprobs = -normal(1.0).abs()
    rollout = logprobs + normal(0.4 * spread)
    rollout[1::7] = torch.nan
    weights = torch.rand(n, generator=g, dtype=torch.float64)
    weights[2::5] = 0
    token_advantages, advantages = normal(1.0), normal(1.0, b)
    token_advantages[::4], advantages[3::4] = 0, 0
    return Responses(
        logprobs=logprobs,
        old_logprobs=logprobs + normal(0.3 * spread),
        ref_logprobs=logprobs + normal(0.2 * spread),
        rollout_logprobs=rollout,
        behaviour_logprobs=logprobs + normal(0.5 * spread),
        token_weights=weights,
        token_importance=0.5 + torch.rand(n, generator=g, dtype=torch.float64),
        entropy=normal(1.0).abs(),
        token_advantages=token_advantages,
        advantages=advantages,
        importance_weights=0.5 + torch.rand(b, generator=g, dtype=torch.float64),
        offsets=offsets,
    )


EVERYTHING: dict[str, Any] = {
    "given": ("ref_logprobs", "rollout_logprobs", "behaviour_logprobs", "token_weights", "importance_weights", "entropy"),
    "kl_coef": 0.1, "kl_importance": True, "ratio_cap": 1.3, "dual_clip": 1.2, "rollout_mode": "sequence_truncate",
    "rollout_cap": 1.4, "rollout_min": 0.7, "off_policy_threshold": 0.1, "entropy_coef": 0.05, "normalizer": 5.0,
    "entropy_normalizer": 9.0,
}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "per token": {"per_token": True},
    "k1": {"given": ("ref_logprobs",), "kl_coef": 0.1, "kl_kind": "k1", "kl_importance": True},
    "k2": {"given": ("ref_logprobs",), "kl_coef": 0.1, "kl_kind": "k2"},
    "k3": {"given": ("ref_logprobs",), "kl_coef": 0.1, "kl_kind": "k3", "kl_importance": True, "per_token": True},
    "dual": {"dual_clip": 1.2, "clip_low": 0.1, "clip_high": 0.4},
    "cap": {"ratio_cap": 1.1, "cispo_low": 0.1},
    "replay": {"given": ("behaviour_logprobs",), "behaviour_cap": 1.2},
    "token truncate": {"given": ("rollout_logprobs",), "rollout_mode": "token_truncate", "rollout_cap": 1.2},
    "token mask": {"given": ("rollout_logprobs", "token_importance"), "rollout_mode": "token_mask", "rollout_cap": 1.2},
    "sequence truncate": {"given": ("rollout_logprobs",), "rollout_mode": "sequence_truncate", "rollout_min": 0.9},
    "sequence mask": {
        "given": ("rollout_logprobs", "importance_weights"),
        "rollout_mode": "sequence_mask",
        "rollout_cap": 1.1,
    },
    "off policy": {"off_policy_threshold": 0.0},
    "off policy, replayed": {"given": ("behaviour_logprobs",), "off_policy_threshold": 0.05},
    "entropy": {"given": ("entropy", "token_weights"), "entropy_coef": 0.2},
    "token sum": {"aggregate": "token_sum"},
    "sequence": {"ratio_level": "sequence", "given": ("ref_logprobs",), "kl_coef": 0.1, "kl_importance": True},
    "sequence, per token": {"ratio_level": "sequence", "per_token": True, "aggregate": "token_mean"},
    "everything": EVERYTHING,
    "everything, per token": {**EVERYTHING, "per_token": True, "ratio_level": "sequence", "normalizer": None},
}


def op_arguments(batch: Responses, kind: str, settings: dict[str, Any], *, padded: bool = False) -> dict[str, Any]:
    """Keyword arguments of ops.policy_loss besides its log-probs; their normalizer where packed input needs one."""
    options, family = dict(settings), KINDS[kind].family
    for name, families in (("dual_clip", ("clip",)), ("ratio_cap", ("clip", "dppo_tv")), ("cispo_low", ("cispo",))):
        if family not in families:
            options.pop(name, None)
    if family == "cispo" and "cispo_low" not in options:
        options["clip_high"] = 1.1  # the cap itself
    shape = batch.padded if padded else (lambda values: values)
    found = {"old_logprobs": shape(batch.old_logprobs), "kind": kind}
    found |= {"mask": batch.mask} if padded else {"offsets": batch.offsets}
    found["advantages"] = shape(batch.token_advantages) if options.pop("per_token", False) else batch.advantages
    for name in options.pop("given", ()):
        value = getattr(batch, name)
        if name == "importance_weights":
            found[name] = value
        else:
            found[name.replace("token_importance", "importance_weights")] = shape(value)
    if kind == "dr_grpo" and not options.get("aggregate") and options.get("normalizer") is None:
        options["normalizer"] = 20.0
    return found | options


def by_reference(
    logprobs: torch.Tensor, entropy: torch.Tensor, batch: Responses, kind: str, settings: dict[str, Any], **more
):
    """The reference's loss for these settings, differentiable in both."""
    options = op_arguments(batch, kind, settings)
    rename = {
        "old_logprobs": "old_N", "ref_logprobs": "ref_N", "rollout_logprobs": "rollout_N", "behaviour_logprobs": "behaviour_N",
        "token_weights": "token_weights_N", "entropy": "entropy_N",
    }  # fmt: skip
    given = settings.get("given", ())
    if "importance_weights" in options:
        rename["importance_weights"] = "importance_N" if "token_importance" in given else "importance_B"
    options = {rename.get(name, name): value for name, value in options.items()}
    advantages, offsets = options.pop("advantages"), options.pop("offsets")
    if not settings.get("per_token"):
        advantages = advantages.repeat_interleave(batch.lengths)
    _, own_level, own_aggregate = KINDS[kind]
    options["ratio_level"] = options.get("ratio_level") or ("token" if own_level == "token" else "sequence")
    options["aggregate"] = options.get("aggregate") or own_aggregate
    if "entropy" in given:
        options["entropy_N"] = entropy
    return reference.policy_loss(logprobs, options.pop("old_N"), advantages, offsets.tolist(), **options, **more)


Answer = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # loss, its gradient in the log-probs, in the entropies


def ours(
    batch: Responses, kind: str, settings: dict[str, Any], *, padded: bool = False, backend: str = "auto"
) -> tuple[Answer, dict[str, torch.Tensor]]:
    """The op's answer and metrics."""
    logprobs, entropy = ((batch.padded(x) if padded else x.clone()) for x in (batch.logprobs, batch.entropy))
    leaves = logprobs.requires_grad_(), entropy.requires_grad_()
    arguments = op_arguments(batch, kind, settings, padded=padded)
    if "entropy" in arguments:
        arguments["entropy"] = entropy
    out = policy_loss(logprobs, **arguments, backend=backend)
    return _answer(out.loss, leaves), out.metrics


def plain(batch: Responses, kind: str, settings: dict[str, Any], dtype: torch.dtype) -> Answer:
    """The reference's answer by autograd, computed in `dtype`."""
    there = batch.to(dtype)
    leaves = there.logprobs.clone().requires_grad_(), there.entropy.clone().requires_grad_()
    return _answer(by_reference(*leaves, there, kind, settings), leaves)


def _answer(loss: torch.Tensor, leaves: tuple[torch.Tensor, torch.Tensor]) -> Answer:
    in_logprobs, in_entropy = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return loss.detach(), in_logprobs, in_entropy
