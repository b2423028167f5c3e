"""Policy losses: the loss, its gradient in the log-probs and the metrics made together; the backward only scales.

B sequences, T padded length, N tokens. Padded input is read as packed tokens under a mask, so both give the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from r1v2_fast.ops import _backend
from r1v2_fast.ops._once import differentiable_once

_backend.register("policy_loss")

KINDS = {"grpo": "seq_mean_token_mean", "dr_grpo": "seq_mean_token_sum_norm", "dapo": "token_mean"}
AGGREGATES = ("token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_sum_norm", "seq_mean_token_mean")
METRICS = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "ratio/mean",
    "kl",
    "sampling/importance_sampling_ratio/min",
    "sampling/importance_sampling_ratio/mean",
    "sampling/importance_sampling_ratio/max",
)


class PolicyLoss(NamedTuple):
    loss: torch.Tensor
    metrics: dict[str, torch.Tensor]


def policy_loss(
    logprobs: torch.Tensor,  # [B, T] with mask, or packed [N] with offsets
    old_logprobs: torch.Tensor,  # as logprobs
    advantages: torch.Tensor,  # [B], or as logprobs
    *,
    mask: torch.Tensor | None = None,  # [B, T] bool
    offsets: torch.Tensor | None = None,  # [B + 1]
    kind: str = "grpo",
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    log_ratio_clamp: float | None = 20.0,
    ref_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
    kl_kind: str = "k3",
    behaviour_logprobs: torch.Tensor | None = None,
    behaviour_cap: float = 2.0,
    aggregate: str | None = None,
    normalizer: float | torch.Tensor | None = None,
    backend: str = "auto",
) -> PolicyLoss:
    """-w min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_coef KL per token, r = exp(logprob - old_logprob).

    w = min(exp(old - behaviour), behaviour_cap) for replayed samples, a constant; 1 without behaviour_logprobs.
    KL: k1 lp - ref, k2 (lp - ref)^2 / 2, k3 exp(ref - lp) - (ref - lp) - 1.

    shapes          logprobs and its likes [B, T] with mask, or [N] with offsets; advantages [B] or per token
    dtypes          fp16, bf16, fp32 -> fp32 loss and metrics; fp64 -> fp64; log-probs in nat
    kind            how tokens are averaged unless `aggregate` says: grpo, dr_grpo, dapo
    normalizer      replaces the outermost divisor, so that any split of a batch gives the same gradient:
                    token_mean (dapo) tokens; seq_mean_* (grpo) sequences with a token; seq_mean_token_sum_norm
                    (dr_grpo) B x T, to be given for packed input; token_sum 1
    log_ratio_clamp bound of the log-ratios; None leaves them, and then inf is possible
    zero advantage  exactly 0 policy loss and gradient
    metrics         device tensors under TRL's names, means over tokens
    differentiable  loss in logprobs
    raises          ValueError on wrong shapes or names; RuntimeError where the backend cannot run
    source          DeepSeekMath (2402.03300) eq. 3; DAPO (2503.14476); Dr. GRPO (2503.20783); decoupled ratio: POPO (2606.01281)
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {tuple(KINDS)}, got {kind!r}")
    aggregate = KINDS[kind] if aggregate is None else aggregate
    if aggregate not in AGGREGATES:
        raise ValueError(f"aggregate must be one of {AGGREGATES}, got {aggregate!r}")
    if kl_kind not in ("k1", "k2", "k3"):
        raise ValueError(f"kl_kind must be k1, k2 or k3, got {kl_kind!r}")
    if kl_coef and ref_logprobs is None:
        raise ValueError(f"kl_coef = {kl_coef} needs ref_logprobs, got None")
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low and clip_high must be 0 or more, got {clip_low} and {clip_high}")
    if (mask is None) == (offsets is None):
        raise ValueError("give mask with [B, T] log-probs, or offsets with packed [N] ones, not both or neither")
    for name, value in (
        ("old_logprobs", old_logprobs),
        ("ref_logprobs", ref_logprobs),
        ("behaviour_logprobs", behaviour_logprobs),
        ("mask", mask),
    ):
        if value is not None and value.shape != logprobs.shape:
            raise ValueError(f"{name} must be logprobs' {tuple(logprobs.shape)}, got {tuple(value.shape)}")
    _backend.pick("policy_loss", backend, logprobs)
    if mask is not None:
        if logprobs.dim() != 2:
            raise ValueError(f"with a mask log-probs are [B, T], got {tuple(logprobs.shape)}")
        sequences, length = logprobs.shape
        rows = torch.arange(sequences, device=logprobs.device)[:, None].expand(sequences, length).reshape(-1)
        live = mask.reshape(-1).bool()
        longest = length
    else:
        assert offsets is not None
        if logprobs.dim() != 1 or offsets.dim() != 1:
            raise ValueError(f"with offsets log-probs are [N], got {tuple(logprobs.shape)}, {tuple(offsets.shape)}")
        sequences, longest = len(offsets) - 1, 0
        places = torch.arange(len(logprobs), device=logprobs.device)
        rows = torch.searchsorted(offsets.to(logprobs.device)[1:].contiguous(), places, right=True)
        live = rows < sequences  # tokens beyond the last offset belong to nobody
        rows = rows.clamp(max=max(sequences - 1, 0))
        if aggregate == "seq_mean_token_sum_norm" and normalizer is None:
            raise ValueError("seq_mean_token_sum_norm of packed log-probs needs normalizer = B * L_max, got None")
    if advantages.shape == (sequences,):
        advantages = advantages[rows] if sequences else advantages.new_zeros(len(rows))
    elif advantages.shape != logprobs.shape:
        raise ValueError(f"advantages must be [{sequences}] or {tuple(logprobs.shape)}, got {tuple(advantages.shape)}")
    wide = torch.float64 if logprobs.dtype == torch.float64 else torch.float32

    def flat(values: torch.Tensor | None) -> torch.Tensor | None:
        return None if values is None else values.detach().reshape(-1).to(wide)

    if normalizer is not None:
        normalizer = torch.as_tensor(normalizer, dtype=wide, device=logprobs.device)
    loss, metrics = _PolicyLoss.apply(
        logprobs.reshape(-1).to(wide),
        flat(old_logprobs),
        flat(advantages),
        live,
        rows,
        sequences,
        longest,
        flat(ref_logprobs),
        flat(behaviour_logprobs),
        clip_low,
        clip_high,
        log_ratio_clamp,
        kl_coef,
        kl_kind,
        behaviour_cap,
        aggregate,
        normalizer,
    )
    absent = set()
    if ref_logprobs is None:
        absent.add("kl")
    if behaviour_logprobs is None:
        absent |= {name for name in METRICS if name.startswith("sampling/")}
    return PolicyLoss(
        loss, {name: value for name, value in zip(METRICS, metrics.unbind(0), strict=True) if name not in absent}
    )


torch.library.define(
    "r1v2_fast::policy_loss",
    "(Tensor logprobs, Tensor old, Tensor advantages, Tensor live, Tensor rows, SymInt sequences, SymInt longest, "
    "Tensor? reference, Tensor? behaviour, float clip_low, float clip_high, float? log_ratio_clamp, float kl_coef, "
    "str kl_kind, float behaviour_cap, str aggregate, Tensor? normalizer) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("r1v2_fast::policy_loss", "default")
def _impl(
    logprobs, old, advantages, live, rows, sequences, longest, reference, behaviour, clip_low, clip_high,
    log_ratio_clamp, kl_coef, kl_kind, behaviour_cap, aggregate, normalizer,
):  # fmt: skip
    bound = torch.inf if log_ratio_clamp is None else log_ratio_clamp
    wide = logprobs.dtype  # fp64 inside: terms of both signs cancel in the sum, their rounding does not
    logprobs, old, advantages = logprobs.double(), old.double(), advantages.double()
    reference = None if reference is None else reference.double()
    behaviour = None if behaviour is None else behaviour.double()

    def gap(a, b):
        """(a - b within the bound, whether the bound lets a gradient through), clean where masked."""
        raw = (a - b).where(live, 0)
        return raw.clamp(-bound, bound), raw.abs() <= bound

    log_ratio, inside = gap(logprobs, old)
    ratio = log_ratio.exp()
    advantages = advantages.where(live, 0)
    plain, clipped = ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    weight = gap(old, behaviour)[0].exp().clamp(max=behaviour_cap) if behaviour is not None else None
    term = -torch.minimum(plain, clipped)
    # where both sides are equal autograd's minimum halves the slope; inside the clip range the slope is whole
    unclipped = (plain < clipped) | ((ratio >= 1 - clip_low) & (ratio <= 1 + clip_high))
    slope = -plain.where(unclipped & inside, 0)
    if weight is not None:
        term, slope = term * weight, slope * weight
    idle = advantages == 0  # exactly nothing, even at a ratio of inf
    term, slope = term.masked_fill(idle, 0), slope.masked_fill(idle, 0)
    kl = torch.zeros_like(term)
    if reference is not None:
        away, free = gap(reference, logprobs)
        kl = {"k1": -away, "k2": away.square() / 2, "k3": torch.expm1(away) - away}[kl_kind]
        if kl_coef:
            kl_slope = {"k1": torch.ones_like(away), "k2": -away, "k3": -torch.expm1(away)}[kl_kind]
            term = term + kl_coef * kl
            slope = slope + kl_coef * kl_slope.where(free & live, 0)

    # every sum goes through its sequence's own, so padding cannot change the order of additions
    def per_sequence(values):
        return values.new_zeros(sequences, dtype=torch.float64).index_add(0, rows, values.double())

    lengths = per_sequence(live)
    nonempty = (lengths > 0).sum().clamp(min=1)
    tokens = lengths.sum().clamp(min=1)
    default = {
        "token_mean": tokens,
        "token_sum": torch.ones_like(tokens),
        "seq_mean_token_sum": nonempty,
        "seq_mean_token_sum_norm": torch.full_like(tokens, max(sequences * longest, 1)),
        "seq_mean_token_mean": nonempty,
    }[aggregate]
    divisor = default if normalizer is None else normalizer.double()
    share = 1 / lengths.clamp(min=1) if aggregate == "seq_mean_token_mean" else torch.ones_like(lengths)
    loss = ((per_sequence(term) * share).sum() / divisor).to(wide)
    grad = (slope * (share[rows] if sequences else share.new_ones(len(rows))) / divisor).to(wide)

    def token_mean(values):
        return per_sequence(values.where(live, 0)).sum() / tokens

    low = (ratio < 1 - clip_low) & (advantages < 0)
    high = (ratio > 1 + clip_high) & (advantages > 0)
    weights = torch.ones_like(term) if weight is None else weight
    some = live.any()
    metrics = torch.stack(
        [
            token_mean(low),
            token_mean(high),
            token_mean(low | high),
            token_mean(ratio),
            token_mean(kl),
            _extreme(weights.where(live, torch.inf), some, "amin"),
            token_mean(weights),
            _extreme(weights.where(live, -torch.inf), some, "amax"),
        ]
    ).to(wide)
    return loss, grad, metrics


def _extreme(values, some, how):
    if values.numel() == 0:
        return values.new_zeros(())
    return getattr(values, how)().where(some, 0)


@torch.library.register_fake("r1v2_fast::policy_loss")
def _fake(logprobs, *arguments):
    return logprobs.new_empty(()), logprobs.new_empty(logprobs.shape), logprobs.new_empty(len(METRICS))


_op = torch.ops.r1v2_fast.policy_loss.default


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, *arguments):
        loss, grad, metrics = _op(logprobs, *arguments)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, grad_metrics):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, *(None,) * 16
