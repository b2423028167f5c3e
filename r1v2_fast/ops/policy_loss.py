"""Policy losses: the loss, its gradient in the log-probs and the metrics made together; the backward only scales.

B sequences, T padded length, N tokens. Padded input is read as packed tokens under a mask, so both give the same bits.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from r1v2_fast.ops import _backend
from r1v2_fast.ops._number import Number, checked, split
from r1v2_fast.ops._policy_loss_autograd import loss_and_metrics
from r1v2_fast.ops._policy_loss_settings import (
    AGGREGATES,
    KINDS,
    KL_KINDS,
    ROLLOUT_MODES,
    Numbers,
    Words,
    or_infinite,
    over_sequences,
    reported,
)

__all__ = ["KINDS", "PolicyLoss", "over_sequences", "policy_loss"]

_backend.register("policy_loss", ("triton", _backend.triton_why_not))


class PolicyLoss(NamedTuple):
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def policy_loss(
    logprobs: torch.Tensor,  # [B, T] with mask, or packed [N] with offsets
    old_logprobs: torch.Tensor,  # as logprobs
    advantages: torch.Tensor,  # [B], or as logprobs
    *,
    mask: torch.Tensor | None = None,  # [B, T]
    offsets: torch.Tensor | None = None,  # [B + 1]
    kind: str = "grpo",
    ratio_level: str | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    ratio_cap: float | None = None,
    dual_clip: float | None = None,
    log_ratio_clamp: float | None = 20.0,
    ref_logprobs: torch.Tensor | None = None,  # as logprobs
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    kl_importance: bool = False,
    importance_weights: torch.Tensor | None = None,  # [B], or as logprobs
    rollout_logprobs: torch.Tensor | None = None,  # as logprobs
    rollout_mode: str = "token_truncate",
    rollout_cap: float | None = 3.0,
    rollout_min: float | None = None,
    behaviour_logprobs: torch.Tensor | None = None,  # as logprobs
    behaviour_cap: float | None = 2.0,
    off_policy_threshold: float | None = None,
    token_weights: torch.Tensor | None = None,  # as logprobs
    entropy: torch.Tensor | None = None,  # as logprobs
    entropy_coef: float = 0.0,
    entropy_normalizer: Number | None = None,
    cispo_low: float | None = None,
    sapo_tau: tuple[float, float] = (1.0, 1.05),
    vespo: tuple[float, float, float, float] = (2.0, 3.0, 3.0, 2.0),
    gmpo_clamp: float | tuple[float, float] = 0.4,
    dppo_threshold: float | tuple[float, float] | None = None,
    aggregate: str | None = None,
    normalizer: Number | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """The mean over tokens of w f(rho, A) + kl_coef KL, less entropy_coef times the mean entropy; rho = pi / pi_old.

    kind            f(rho, A), and how tokens are averaged unless `aggregate` says
      grpo dr_grpo dapo bnpo   -min(min(rho, ratio_cap) A, clip(rho, 1 - clip_low, 1 + clip_high) A), for A < 0 at most
                    -A dual_clip; seq_mean_token_mean, seq_mean_token_sum_norm, token_mean, token_mean
      gspo, luspo   the same with the sequence's ratio, exp of the mean log-ratio; gspo leaves a token its own gradient;
                    seq_mean_token_mean, seq_mean_token_sum
      gmpo          -A rho, rho the geometric mean of ratios that are clamped at gmpo_clamp (nat; (low, high)) on the side
                    that A pushes to; seq_mean_token_mean
      cispo         -sg(min(rho, clip_high)) A logprob: clip_high is the cap itself; with cispo_low it is
                    clip(rho, 1 - cispo_low, 1 + clip_high); token_mean
      sapo          -A (4 / tau) sigmoid(tau (rho - 1)), sapo_tau = (tau for A > 0, tau else); seq_mean_token_mean
      vespo         -sg(phi) A logprob, phi = exp(lambda + k log w - lambda w), w the product of the sequence's ratios and
                    corrections, each log within [log 1e-8, 20], so that a correction of 0 does not drop its token;
                    vespo = (k, lambda for A >= 0, k, lambda for A < 0); token_mean
      dppo_tv       -sg(min(rho, ratio_cap or 20)) A logprob, 0 where pi - pi_old exceeds dppo_threshold ((low, high);
                    None: clip_low and clip_high) in A's direction; token_mean
    ratio_level     "token" or "sequence"; None: the kind's own. gspo and gmpo have theirs; vespo's phi is a sequence's in any
                    case, so there it is the level of kl_importance and of the metric alone
    w               token_weights, times corrections that are constants and multiply each other: importance_weights as
                    they are; of rollout_logprobs exp(old - rollout), truncated to [rollout_min, rollout_cap] or masked
                    outside, for a token or the sequence's sum (a NaN here counts as on-policy); of behaviour_logprobs
                    min(exp(old - behaviour), behaviour_cap), the decoupled ratio of replayed samples.
                    off_policy_threshold (nat): 0 where A < 0 and the sequence's mean of sampled - logprob is above it;
                    sampled is rollout_logprobs, else behaviour_logprobs, else old_logprobs
    KL              k1 lp - ref, k2 (lp - ref)^2 / 2, k3 exp(ref - lp) - (ref - lp) - 1; kl_importance multiplies by
                    the kind's rho (gmpo's clamped one)
    normalizer      replaces the outermost divisor, so that any split of a batch gives the same gradient: token_mean
                    tokens; seq_mean_* sequences with a token; seq_mean_token_sum_norm B x T, to be given for packed
                    input; token_sum 1. Without one bnpo divides by the tokens of this call: local by definition.
                    entropy_normalizer: tokens, in place of those of this call
    log_ratio_clamp bound of log-ratios and of log weights; None leaves them, and then inf is possible
    zero            advantage or w 0 gives exactly 0 policy loss; weights act on neither KL nor divisors

    shapes          logprobs and its likes [B, T] with mask, or [N] with offsets; advantages and importance_weights for each
                    sequence, [B] or [B, 1], or for each token; where N = B, for each sequence
    dtypes          fp16, bf16, fp32 -> fp32 loss and metrics; fp64 -> fp64; log-probs and entropies in nat
    metrics         device tensors under TRL's names, means over tokens; of a sequence's ratio or rollout weight, of phi and
                    of what the off-policy mask drops, over sequences with a token; of sampling_logp_difference, over
                    tokens that the sampler scored
    differentiable  loss in logprobs and entropy, once
    backend         "triton": one launch whatever the settings, fp64 inside; "torch": any device with fp64, and fp64
                    inputs. On a GPU offsets are not looked at: bounded to [0, N], tokens of no sequence get gradient 0
    raises          ValueError on wrong shapes, names or numbers, and on one that has no meaning for the kind; RuntimeError
                    where the backend cannot run, and on create_graph=True
    source          docs/losses.md names each kind's paper, and the arguments that reproduce TRL, verl and Liger
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    family, own_level, own_aggregate = KINDS[kind]
    aggregate = own_aggregate if aggregate is None else aggregate
    for name, value, known in (
        ("aggregate", aggregate, AGGREGATES),
        ("kl_kind", kl_kind, KL_KINDS),
        ("rollout_mode", rollout_mode, ROLLOUT_MODES),
        ("ratio_level", ratio_level, (None, "token", "sequence")),
    ):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if kind in ("gspo", "gmpo") and ratio_level == "token":
        raise ValueError(
            f"{kind} is defined by its sequence's ratio, got ratio_level='token'; kind='grpo' has token ratios"
        )
    numbers = _numbers(
        family, clip_low, clip_high, ratio_cap, dual_clip, log_ratio_clamp, kl_coef, rollout_min, rollout_cap,
        behaviour_cap, off_policy_threshold, cispo_low, sapo_tau, vespo, gmpo_clamp, dppo_threshold, entropy_coef,
    )  # fmt: skip
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprobs, got None")
    if entropy_coef and entropy is None:
        raise ValueError(f"entropy_coef = {entropy_coef} needs entropy, got None")
    _check_shapes(
        logprobs, mask, offsets, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs, rollout_logprobs=rollout_logprobs,
        behaviour_logprobs=behaviour_logprobs, token_weights=token_weights, entropy=entropy,
    )  # fmt: skip
    sequences = len(logprobs) if offsets is None else len(offsets) - 1
    advantages = _of_sequences_or_tokens("advantages", advantages, sequences, logprobs)
    if importance_weights is not None:
        importance_weights = _of_sequences_or_tokens("importance_weights", importance_weights, sequences, logprobs)
    if aggregate == "seq_mean_token_sum_norm" and mask is None and normalizer is None:
        raise ValueError("seq_mean_token_sum_norm of packed log-probs needs normalizer = B * L_max, got None")
    ratio = own_level if ratio_level is None or own_level == "own" else ratio_level
    normalizer = checked("normalizer", normalizer, logprobs.device, above=0)
    entropy_normalizer = checked("entropy_normalizer", entropy_normalizer, logprobs.device, above=0)
    (divisor, divisor_number), (entropy_divisor, entropy_number) = (
        split(value, math.nan) for value in (normalizer, entropy_normalizer)
    )
    numbers = numbers._replace(divisor=divisor_number, entropy_divisor=entropy_number)
    divided = normalizer is not None or aggregate in ("token_sum", "seq_mean_token_sum_norm")
    words = Words(
        family=family,
        ratio=ratio,
        aggregate=aggregate,
        kl_kind=kl_kind if ref_logprobs is not None else "",
        kl_importance="yes" if kl_importance else "",
        rollout_mode=rollout_mode if rollout_logprobs is not None else "",
        divided="yes" if divided else "",
        entropy_divided="yes" if entropy_normalizer is not None else "",
    )
    fp64 = "it returns fp32 and the log-probs are fp64" if logprobs.dtype == torch.float64 else None
    chosen = _backend.pick("policy_loss", backend, logprobs, lacks=("triton", fp64))
    loss, metrics = loss_and_metrics(
        chosen, logprobs, old_logprobs, advantages, mask, offsets, ref_logprobs, importance_weights, rollout_logprobs,
        behaviour_logprobs, token_weights, entropy, divisor, entropy_divisor, numbers, words,
    )  # fmt: skip
    weighted = any(x is not None for x in (importance_weights, rollout_logprobs, behaviour_logprobs))
    names = reported(
        words, numbers, weighted=weighted, rollout=rollout_logprobs is not None, entropy=entropy is not None
    )
    return PolicyLoss(loss, {name: metrics[name] for name in names})


def _several(name: str, value, count: int) -> tuple[float, ...]:
    """`count` numbers of 0 or more; one number stands for two equal ones."""
    values = (value,) * count if count == 2 and isinstance(value, (int, float)) else value
    if not isinstance(values, (tuple, list)) or len(values) != count or not all(v >= 0 for v in values):
        raise ValueError(f"{name} must be {count} numbers, each 0 or more, got {value}")
    return tuple(values)


def _numbers(
    family, clip_low, clip_high, ratio_cap, dual_clip, log_ratio_clamp, kl_coef, rollout_min, rollout_cap, behaviour_cap,
    off_policy_threshold, cispo_low, sapo_tau, vespo, gmpo_clamp, dppo_threshold, entropy_coef,
) -> Numbers:  # fmt: skip
    for name, value in (
        ("clip_low", clip_low), ("clip_high", clip_high), ("ratio_cap", ratio_cap), ("log_ratio_clamp", log_ratio_clamp),
        ("kl_coef", kl_coef), ("rollout_cap", rollout_cap), ("rollout_min", rollout_min),
        ("behaviour_cap", behaviour_cap), ("cispo_low", cispo_low),
    ):  # fmt: skip
        if value is not None and not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    for name, value in (("entropy_coef", entropy_coef), ("off_policy_threshold", off_policy_threshold)):
        if value is not None and math.isnan(value):
            raise ValueError(f"{name} must be a number, got {value}")
    if dual_clip is not None and not dual_clip > 1:
        raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
    if rollout_min is not None and rollout_cap is not None and rollout_min > rollout_cap:
        raise ValueError(f"rollout_min must be at most rollout_cap = {rollout_cap}, got {rollout_min}")
    for name, value, families in (
        ("dual_clip", dual_clip, ("clip",)),
        ("ratio_cap", ratio_cap, ("clip", "dppo_tv")),
        ("cispo_low", cispo_low, ("cispo",)),
    ):
        if value is not None and family not in families:
            kinds = ", ".join(kind for kind in KINDS if KINDS[kind].family in families)
            raise ValueError(f"{name} has no meaning for this kind, but for {kinds}; got {value}")
    if family == "cispo" and cispo_low is None and clip_high < 1:
        raise ValueError(
            f"clip_high of cispo is the cap of the ratio itself, 1 or more (5 in ScaleRL), got {clip_high}"
        )
    change = _several("gmpo_clamp", gmpo_clamp, 2)
    moved = _several("dppo_threshold", (clip_low, clip_high) if dppo_threshold is None else dppo_threshold, 2)
    tau_positive, tau_other = _several("sapo_tau", sapo_tau, 2)
    if not (tau_positive > 0 and tau_other > 0):
        raise ValueError(f"sapo_tau must be temperatures above 0, got {sapo_tau}")
    k_positive, rate_positive, k_negative, rate_negative = _several("vespo", vespo, 4)
    low, high = 1 - clip_low, 1 + clip_high
    if family == "cispo":
        low, high = (-math.inf, clip_high) if cispo_low is None else (1 - cispo_low, 1 + clip_high)
    if family == "dppo_tv" and ratio_cap is None:
        ratio_cap = 20.0
    return Numbers(
        low=low,
        high=high,
        ratio_cap=or_infinite(ratio_cap),
        dual_clip=or_infinite(dual_clip),
        bound=or_infinite(log_ratio_clamp),
        kl_coef=kl_coef,
        rollout_min=0.0 if rollout_min is None else rollout_min,
        rollout_cap=or_infinite(rollout_cap),
        behaviour_cap=or_infinite(behaviour_cap),
        off_policy=or_infinite(off_policy_threshold),
        tau_positive=tau_positive,
        tau_other=tau_other,
        k_positive=k_positive,
        rate_positive=rate_positive,
        k_negative=k_negative,
        rate_negative=rate_negative,
        change_low=change[0],
        change_high=change[1],
        tv_low=moved[0],
        tv_high=moved[1],
        entropy_coef=entropy_coef,
        divisor=math.nan,
        entropy_divisor=math.nan,
    )


def _check_shapes(logprobs: torch.Tensor, mask, offsets, **likes: torch.Tensor | None) -> None:
    if not logprobs.is_floating_point():
        raise ValueError(f"log-probs must be floats, got {logprobs.dtype}")
    if (mask is None) == (offsets is None):
        raise ValueError("give mask with [B, T] log-probs, or offsets with packed [N] ones, not both or neither")
    for name, value in {**likes, "mask": mask}.items():
        if value is not None and value.shape != logprobs.shape:
            raise ValueError(f"{name} must be logprobs' {tuple(logprobs.shape)}, got {tuple(value.shape)}")
    if mask is not None and logprobs.dim() != 2:
        raise ValueError(f"with a mask log-probs are [B, T], got {tuple(logprobs.shape)}")
    if offsets is None:
        return
    if logprobs.dim() != 1 or offsets.dim() != 1 or len(offsets) < 1 or offsets.dtype not in (torch.int32, torch.int64):
        got = f"{tuple(logprobs.shape)} and {offsets.dtype} {tuple(offsets.shape)}"
        raise ValueError(f"with offsets log-probs are [N] and offsets int32 or int64 [B + 1], got {got}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(offsets[0]) < 0 or int(offsets[-1]) > len(logprobs):
            ends = f"{int(offsets[0])} and {int(offsets[-1])}"
            raise ValueError(f"offsets must lie in [0, N = {len(logprobs)}], got {ends} at the ends")
        if bool((offsets.diff() < 0).any()):
            raise ValueError("offsets must not decrease")


def _of_sequences_or_tokens(name: str, value: torch.Tensor, sequences: int, logprobs: torch.Tensor) -> torch.Tensor:
    if value.shape in ((sequences,), (sequences, 1)):
        return value.reshape(-1)
    if value.shape != logprobs.shape:
        raise ValueError(f"{name} must be [{sequences}] or {tuple(logprobs.shape)}, got {tuple(value.shape)}")
    return value
