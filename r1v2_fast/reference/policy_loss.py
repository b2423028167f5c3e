"""Policy losses over packed tokens: the definition, differentiable, sequence by sequence."""

from __future__ import annotations

import itertools
import math

import torch


def policy_loss(
    logprobs_N,
    old_N,
    advantages_N,
    offsets,
    *,
    kind="grpo",
    ratio_level="token",
    clip_low=0.2,
    clip_high=0.2,
    ratio_cap=None,
    dual_clip=None,
    log_ratio_clamp=20.0,
    ref_N=None,
    kl_coef=0.0,
    kl_kind="k3",
    kl_importance=False,
    importance_N=None,
    importance_B=None,
    rollout_N=None,
    rollout_mode="token_truncate",
    rollout_cap=3.0,
    rollout_min=None,
    behaviour_N=None,
    behaviour_cap=2.0,
    off_policy_threshold=None,
    token_weights_N=None,
    entropy_N=None,
    entropy_coef=0.0,
    entropy_normalizer=None,
    cispo_low=None,
    sapo_tau=(1.0, 1.05),
    vespo=(2.0, 3.0, 3.0, 2.0),
    gmpo_clamp=(0.4, 0.4),
    dppo_threshold=(0.2, 0.2),
    aggregate="seq_mean_token_mean",
    normalizer=None,
    longest=None,
    anchor_N=None,
):
    """Per token w f(rho, A) + kl_coef KL, aggregated; less entropy_coef times the mean entropy. f by kind:

    clipped   -min(min(rho, cap) A, clip(rho, 1 - low, 1 + high) A), for A < 0 at most -A dual_clip
    cispo     -sg(min(rho, clip_high)) A logprob         sapo  -A (4 / tau) sigmoid(tau (rho - 1))
    vespo     -sg(phi) A logprob                         gmpo  -A rho
    dppo_tv   -sg(min(rho, cap)) A logprob where the probability moved by at most the threshold in A's direction

    rho is exp(logprob - old), or exp of its mean over the sequence. What stands under a stop-gradient sg takes its
    log-probs from anchor_N, by default the same detached: given apart, the loss is the function that its gradient is of.
    source  see docs/losses.md, which names each kind's paper
    """
    anchor_N = logprobs_N.detach() if anchor_N is None else anchor_N
    bound = math.inf if log_ratio_clamp is None else log_ratio_clamp

    def gap(a, b):
        return (a - b).clamp(-bound, bound)

    def known(values):
        return values.where(~values.isnan(), 0)

    def ratio_of(logprobs, old, advantages, anchor):
        if kind == "gmpo":
            low, high = gmpo_clamp
            change = logprobs - old
            kept = torch.where(advantages > 0, change.clamp(max=high), change.clamp(min=-low)).where(advantages != 0, 0)
            return kept.clamp(-bound, bound).mean().exp().expand(len(old))
        if kind == "gspo":
            return ((anchor - old).mean() + logprobs - anchor).clamp(-bound, bound).exp()
        if ratio_level == "sequence":
            return (logprobs - old).mean().clamp(-bound, bound).exp().expand(len(old))
        return gap(logprobs, old).exp()

    def rollout_weight(old, rollout):
        difference = known(gap(old, rollout))  # a token that the sampler could not score counts as on-policy
        if rollout_mode.startswith("sequence"):
            difference = known(old - rollout).sum().clamp(-bound, bound)
        weight, low = difference.exp(), -math.inf if rollout_min is None else rollout_min
        cap = math.inf if rollout_cap is None else rollout_cap
        if rollout_mode.endswith("truncate"):
            return weight.clamp(low, cap)
        return weight.where((weight >= low) & (weight <= cap), 0)

    def choose(condition, yes, no):
        return torch.full_like(condition, no, dtype=logprobs_N.dtype).masked_fill(condition, yes)

    def log_weight(weight):
        return weight.log().clamp(math.log(1e-8), 20.0)

    terms, entropies = [], []
    for sequence, (start, end) in enumerate(itertools.pairwise(offsets)):
        tokens = slice(start, end)
        logprobs, old, advantages, anchor = logprobs_N[tokens], old_N[tokens], advantages_N[tokens], anchor_N[tokens]
        if start == end:
            terms.append(logprobs)
            continue
        ratio = ratio_of(logprobs, old, advantages, anchor)
        constant = ratio_of(anchor, old, advantages, anchor)
        token_weights, sequence_weight = torch.ones_like(old), torch.ones_like(old[0])
        if importance_N is not None:
            token_weights = token_weights * importance_N[tokens]
        if importance_B is not None:
            sequence_weight = sequence_weight * importance_B[sequence]
        if behaviour_N is not None:
            token_weights = token_weights * gap(old, behaviour_N[tokens]).exp().clamp(max=behaviour_cap)
        if rollout_N is not None:
            weight = rollout_weight(old, rollout_N[tokens])
            if weight.dim():
                token_weights = token_weights * weight
            else:
                sequence_weight = sequence_weight * weight
        if kind == "vespo":
            shape, rate = (choose(advantages >= 0, *vespo[i::2]) for i in (0, 1))
            log_w = (anchor - old).clamp(-20, 20).sum() + log_weight(sequence_weight)
            log_w = (log_w + log_weight(token_weights).sum()).clamp(math.log(1e-8), 20.0)
            phi = (rate + shape * log_w - rate * log_w.exp()).exp()
            term, weights = -phi * advantages * logprobs, torch.ones_like(old)
        else:
            weights = token_weights * sequence_weight
            if kind == "cispo":
                caps = (None, clip_high) if cispo_low is None else (1 - cispo_low, 1 + clip_high)
                term = -constant.clamp(*caps) * advantages * logprobs
            elif kind == "sapo":
                tau = choose(advantages > 0, *sapo_tau)
                term = -advantages * (4 / tau) * (tau * (ratio - 1)).sigmoid()
            elif kind == "gmpo":
                term = -advantages * ratio
            elif kind == "dppo_tv":
                moved = anchor.exp() - old.exp()
                inside = torch.where(advantages > 0, moved <= dppo_threshold[1], moved >= -dppo_threshold[0])
                term = -constant.clamp(max=20.0 if ratio_cap is None else ratio_cap) * advantages * logprobs * inside
            else:
                plain = ratio.clamp(max=ratio_cap) * advantages if ratio_cap is not None else ratio * advantages
                term = -torch.minimum(plain, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)
                if dual_clip is not None:
                    term = torch.where(advantages < 0, torch.minimum(term, -advantages * dual_clip), term)
        if off_policy_threshold is not None:
            sampled = next(x[tokens] for x in (rollout_N, behaviour_N, old_N) if x is not None)
            away = known(sampled - anchor).mean()
            weights = weights * ((advantages >= 0) | (away <= off_policy_threshold))
        if token_weights_N is not None:
            weights = weights * token_weights_N[tokens]
        term = (term * weights).where((advantages != 0) & (weights != 0), 0)
        if kl_coef:
            away = gap(ref_N[tokens], logprobs)
            kl = {"k1": -away, "k2": away.square() / 2, "k3": away.exp() - away - 1}[kl_kind]
            term = term + kl_coef * (kl * ratio if kl_importance else kl)
        terms.append(term)
        if entropy_N is not None:
            entropies.append(entropy_N[tokens].sum())
    sums, lengths = torch.stack([term.sum() for term in terms]), torch.tensor([len(term) for term in terms])
    sequences, length = max(int((lengths > 0).sum()), 1), max(int(lengths.sum()), 1)
    if aggregate == "seq_mean_token_mean":
        sums = sums / lengths.clamp(min=1)
    divisors = {"token_mean": length, "token_sum": 1, "seq_mean_token_sum_norm": len(terms) * (longest or 1)}
    loss = sums.sum() / (normalizer or divisors.get(aggregate, sequences))
    if entropies:
        loss = loss - entropy_coef * torch.stack(entropies).sum() / (entropy_normalizer or length)
    return loss
