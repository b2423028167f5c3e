"""The policy losses in PyTorch: every token's term and slope by hand, then sums.

N tokens (padded ones are flattened), B sequences. Everything is fp64 inside: terms of both signs cancel in the sums, their
rounding does not; and no order of additions, packed or padded, then shows in fp32.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from r1v2_fast.ops._policy_loss_layout import Layout
from r1v2_fast.ops._policy_loss_settings import METRICS, Numbers, Words

LOG_SMALL, LOG_LARGE = math.log(1e-8), 20.0  # VESPO's bounds of log weights
Tensor = torch.Tensor


class Terms(NamedTuple):
    value: Tensor  # [N] f(rho, A), before weights
    slope: Tensor  # [N] its derivative: in log rho, or in the log-prob where rho is a constant
    low: Tensor  # [N] bool: the clip took effect
    high: Tensor
    dual: Tensor


class Corrections(NamedTuple):
    """Constant weights: what is given for each token, what for each sequence."""

    tokens: Tensor  # [N]
    sequences: Tensor  # [B]
    difference: Tensor  # [N] old - rollout, 0 where the sampler could not score the token
    scored: Tensor  # [N] bool


def run(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor | None, offsets: Tensor | None,
    reference: Tensor | None, importance: Tensor | None, rollout: Tensor | None, behaviour: Tensor | None,
    token_weights: Tensor | None, entropy: Tensor | None, normalizer: Tensor | None, entropy_normalizer: Tensor | None,
    *, numbers: Numbers, words: Words,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """loss, gradient in the log-probs, gradient in the entropies, metrics in METRICS' order."""
    at = Layout(logprobs, mask, offsets)
    logprobs, old, advantages = at.tokens(logprobs), at.tokens(old), at.per_token(advantages)
    rollout, behaviour = at.maybe(rollout), at.maybe(behaviour)
    ratio, inside = _ratio(at, logprobs - old, advantages, numbers, words)
    corrections = _corrections(at, old, importance, rollout, behaviour, numbers, words)
    weights = phi = dropped = None
    if any(x is not None for x in (importance, rollout, behaviour)):
        weights = corrections.tokens * at.spread(corrections.sequences)
    applied = weights
    if words.family == "vespo":  # the corrections are part of w
        phi, applied = _phi(at, logprobs - old, advantages, corrections, numbers), None
    if numbers.off_policy < math.inf:
        sampled = next(x for x in (rollout, behaviour, old) if x is not None)
        away = at.sums(_known(sampled - logprobs)) / at.count
        dropped = (advantages < 0) & at.spread(away > numbers.off_policy)
        applied = _times(applied, ~dropped)
    if token_weights is not None:
        applied = _times(applied, at.tokens(token_weights))

    terms = _terms(logprobs, old, advantages, ratio, phi, numbers, words)
    idle = advantages == 0 if applied is None else (advantages == 0) | (applied == 0)
    # exactly nothing, even at a ratio of inf
    term, slope = (_times(applied, x).masked_fill(idle, 0) for x in (terms.value, terms.slope))
    moves = words.family in ("clip", "gmpo", "sapo")  # through the ratio; the others' gradient is their log-prob's own
    own, pull = (torch.zeros_like(slope), slope) if moves else (slope, None)
    kl = None
    if reference is not None:
        kl, steep = _kl(at, at.tokens(reference) - logprobs, numbers, words)
        if words.kl_importance:
            kl, steep = kl * ratio, steep * ratio
            if numbers.kl_coef:
                pull = numbers.kl_coef * kl + (0 if pull is None else pull)
        if numbers.kl_coef:
            term, own = term + numbers.kl_coef * kl, own + numbers.kl_coef * steep

    if pull is not None:
        if words.ratio == "sequence":  # rho = exp(mean of log-ratios): each token holds its share of the slope
            pull = at.spread(at.sums(pull) / at.count)
        own = own + pull.where(inside, 0)
    divisor = _given(normalizer, numbers.divisor, at.divisor(words.aggregate))
    if words.aggregate == "seq_mean_token_mean":
        share = at.spread(1 / (at.count * divisor))
        loss, grad = at.total(term * share), at.kept(own * share)
    else:
        loss, grad = at.total(term) / divisor, at.kept(own / divisor)
    entropy_grad, mean_entropy = grad.new_zeros(0), None
    if entropy is not None:
        mean_entropy = at.total(at.tokens(entropy)) / at.token_count
        step = numbers.entropy_coef / _given(entropy_normalizer, numbers.entropy_divisor, at.token_count)
        loss, entropy_grad = loss - step * mean_entropy * at.token_count, -step * at.live.double()
    metrics = _metrics(at, terms, ratio, kl, mean_entropy, phi, dropped, weights, corrections, numbers, words)
    return loss, grad, entropy_grad, metrics


def _ratio(at: Layout, change: Tensor, advantages: Tensor, numbers: Numbers, words: Words) -> tuple[Tensor, Tensor]:
    """(rho [N], whether it moves with the token's log-prob)."""
    if words.family == "gmpo":  # clamped on the side that the advantage pushes to
        kept = torch.where(advantages > 0, change.clamp(max=numbers.change_high), change.clamp(min=-numbers.change_low))
        inside = (kept == change) & (advantages != 0) & ~(change.abs() > numbers.bound)
        kept = kept.clamp(-numbers.bound, numbers.bound).where(advantages != 0, 0)
        return at.spread(at.sums(kept) / at.count).exp(), inside
    if words.ratio != "token":
        change = at.spread(at.sums(change) / at.count)
    return change.clamp(-numbers.bound, numbers.bound).exp(), ~(change.abs() > numbers.bound)  # a NaN passes


def _corrections(
    at: Layout, old: Tensor, importance: Tensor | None, rollout: Tensor | None, behaviour: Tensor | None,
    numbers: Numbers, words: Words,
) -> Corrections:  # fmt: skip
    tokens, sequences = torch.ones_like(old), old.new_ones(at.sequences)
    if importance is not None and importance.numel() == at.sequences:
        sequences = sequences * importance.double().view(-1)
    elif importance is not None:
        tokens = tokens * at.tokens(importance)
    if behaviour is not None:
        change = (old - behaviour).clamp(-numbers.bound, numbers.bound)
        tokens = tokens * change.exp().clamp(max=numbers.behaviour_cap)
    difference, scored = torch.zeros_like(old), at.live
    if rollout is not None:  # NaN, a token that the sampler could not score, counts as on-policy
        scored = at.live & ~rollout.isnan()
        difference = (old - rollout).where(scored, 0)
        if words.rollout_mode.startswith("sequence"):
            sequences = sequences * _bounded(at.sums(difference), numbers, words)
        else:
            tokens = tokens * _bounded(difference, numbers, words)
    return Corrections(tokens, sequences, difference, scored)


def _bounded(difference: Tensor, numbers: Numbers, words: Words) -> Tensor:
    """exp of a log difference of samplers, truncated or masked."""
    weight = difference.clamp(-numbers.bound, numbers.bound).exp()
    if words.rollout_mode.endswith("truncate"):
        return weight.clamp(numbers.rollout_min, numbers.rollout_cap)
    return weight.where((weight >= numbers.rollout_min) & (weight <= numbers.rollout_cap), 0)


def _phi(at: Layout, change: Tensor, advantages: Tensor, corrections: Corrections, numbers: Numbers) -> Tensor:
    token_logs, sequence_logs = (x.log().clamp(LOG_SMALL, LOG_LARGE) for x in corrections[:2])
    log_w = at.sums(change.clamp(-LOG_LARGE, LOG_LARGE)) + at.sums(token_logs) + sequence_logs
    log_w = at.spread(log_w.clamp(LOG_SMALL, LOG_LARGE))
    shape = _choose(advantages >= 0, numbers.k_positive, numbers.k_negative)
    rate = _choose(advantages >= 0, numbers.rate_positive, numbers.rate_negative)
    return (rate + shape * log_w - rate * log_w.exp()).exp()


def _terms(
    logprobs: Tensor, old: Tensor, advantages: Tensor, ratio: Tensor, phi: Tensor | None, numbers: Numbers, words: Words
) -> Terms:
    below, above, dual = ratio < numbers.low, ratio > numbers.high, torch.zeros_like(ratio, dtype=torch.bool)
    if words.family == "clip":
        plain = ratio.clamp(max=numbers.ratio_cap) * advantages
        clipped = ratio.clamp(numbers.low, numbers.high) * advantages
        value = -torch.minimum(plain, clipped)
        # the slope of the smaller side, whole where both are equal: autograd's minimum takes half of each
        whole = ((plain <= clipped) & (ratio <= numbers.ratio_cap)) | ((clipped <= plain) & ~(below | above))
        if numbers.dual_clip < math.inf:
            dual = (advantages < 0) & (value > -advantages * numbers.dual_clip)
            value = torch.where(dual, -advantages * numbers.dual_clip, value)
        slope = (-ratio * advantages).where((whole & ~dual) | plain.isnan(), 0)
        return Terms(value, slope, below & (advantages < 0), above & (advantages > 0), dual)
    if words.family == "gmpo":
        change, value = logprobs - old, -ratio * advantages
        low, high = change < -numbers.change_low, change > numbers.change_high
        return Terms(value, value, low & (advantages < 0), high & (advantages > 0), dual)
    if words.family == "sapo":
        tau = _choose(advantages > 0, numbers.tau_positive, numbers.tau_other)
        gate = (tau * (ratio - 1)).sigmoid()
        slope = -advantages * 4 * gate * (tau * (1 - ratio)).sigmoid() * ratio
        return Terms(-advantages * (4 / tau) * gate, slope.where(ratio != math.inf, 0), dual, dual, dual)
    if phi is not None:
        return Terms(-phi * advantages * logprobs, -phi * advantages, dual, dual, dual)
    if words.family == "cispo":
        slope = -ratio.clamp(numbers.low, numbers.high) * advantages
        capped = above & (advantages > 0) if numbers.low == -math.inf else below | above
        return Terms(slope * logprobs, slope, dual, capped, dual)
    moved = logprobs.exp() - old.exp()
    low, high = (advantages <= 0) & (moved < -numbers.tv_low), (advantages > 0) & (moved > numbers.tv_high)
    slope = (-ratio.clamp(max=numbers.ratio_cap) * advantages).masked_fill(low | high, 0)
    return Terms(slope * logprobs, slope, low, high, dual)


def _kl(at: Layout, away: Tensor, numbers: Numbers, words: Words) -> tuple[Tensor, Tensor]:
    """(KL of away = ref - logprob, its slope in the log-prob)."""
    free, away = ~(away.abs() > numbers.bound) & at.live, at.kept(away.clamp(-numbers.bound, numbers.bound))
    if words.kl_kind == "k1":
        value, slope = -away, torch.ones_like(away)
    elif words.kl_kind == "k2":
        value, slope = away.square() / 2, -away
    else:
        grown = torch.expm1(away)
        value, slope = grown - away, -grown
    return value, slope.where(free, 0)


def _metrics(
    at: Layout, terms: Terms, ratio: Tensor, kl: Tensor | None, mean_entropy: Tensor | None, phi: Tensor | None,
    dropped: Tensor | None, weights: Tensor | None, corrections: Corrections, numbers: Numbers, words: Words,
) -> Tensor:  # fmt: skip
    """In METRICS' order; 0 for what means nothing here."""

    def of_tokens(values: Tensor) -> Tensor:
        return at.total(values) / at.token_count

    def of_sequences(values: Tensor) -> Tensor:
        return (at.sums(values) / at.count).sum() / at.nonempty

    def extreme(values: Tensor, sign: float) -> Tensor:
        if not values.numel():
            return at.token_count.new_zeros(())
        return ((values * sign).amax() * sign).where(at.lengths.sum() > 0, 0)

    def of_a_sequence(values: Tensor, empty: float) -> Tensor:
        return (at.sums(values) / at.count).where(at.lengths > 0, empty)

    of_ratio = of_tokens if words.ratio == "token" else of_sequences  # a sequence's ratio counts once
    found = {"ratio/mean": of_ratio(ratio)}
    if words.family in ("clip", "gmpo", "dppo_tv"):
        found["clip_ratio/low_mean"], found["clip_ratio/high_mean"] = of_ratio(terms.low), of_ratio(terms.high)
        found["clip_ratio/region_mean"] = found["clip_ratio/low_mean"] + found["clip_ratio/high_mean"]
        found["clip_ratio/low_min"] = extreme(of_a_sequence(terms.low, math.inf), -1)
        found["clip_ratio/high_max"] = extreme(of_a_sequence(terms.high, -math.inf), 1)
    if numbers.dual_clip < math.inf:
        found["clip_ratio/dual_mean"] = of_ratio(terms.dual)
    if words.family == "cispo":
        found["cispo_clip_ratio"] = of_ratio(terms.high)
    if phi is not None:
        found["vespo/phi_seq_mean"] = of_sequences(phi)
    if kl is not None:
        found["kl"] = of_tokens(kl)
    if mean_entropy is not None:
        found["entropy"] = mean_entropy
    if dropped is not None:
        found["off_policy_mask/dropped"] = of_sequences(dropped)
    if weights is not None:
        by_sequence = words.rollout_mode.startswith("sequence")
        found["sampling/importance_sampling_ratio/mean"] = (of_sequences if by_sequence else of_tokens)(weights)
        found["sampling/importance_sampling_ratio/min"] = extreme(at.kept(weights, math.inf), -1)
        found["sampling/importance_sampling_ratio/max"] = extreme(at.kept(weights, -math.inf), 1)
    if words.rollout_mode:
        difference, scored = corrections.difference.abs(), at.total(corrections.scored).clamp(min=1)
        found["sampling/sampling_logp_difference/mean"] = at.total(difference) / scored
        found["sampling/sampling_logp_difference/max"] = extreme(difference, 1)
    nothing = ratio.new_zeros(())
    return torch.stack([found.get(name, nothing) for name in METRICS])


def _times(weights: Tensor | None, values: Tensor) -> Tensor:
    return values if weights is None else values * weights


def _known(values: Tensor) -> Tensor:
    return values.masked_fill(values.isnan(), 0)


def _choose(condition: Tensor, yes: float, no: float) -> Tensor:
    """In fp64, where torch.where of two numbers rounds them to fp32."""
    return torch.full_like(condition, no, dtype=torch.float64).masked_fill(condition, yes)


def _given(tensor: Tensor | None, number: float, otherwise: Tensor | float) -> Tensor | float:
    if tensor is not None:
        return tensor.double()
    return otherwise if math.isnan(number) else number
