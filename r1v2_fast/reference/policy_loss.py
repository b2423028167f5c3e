"""Clipped policy losses over packed tokens: the definition, differentiable, sequence by sequence."""

from __future__ import annotations

import itertools

import torch


def policy_loss(
    logprobs_N,
    old_N,
    advantages_N,
    offsets,
    *,
    clip_low=0.2,
    clip_high=0.2,
    log_ratio_clamp=20.0,
    ref_N=None,
    kl_coef=0.0,
    kl_kind="k3",
    behaviour_N=None,
    behaviour_cap=2.0,
    aggregate="seq_mean_token_mean",
    normalizer=None,
    longest=None,
):
    """-min(r A, clip(r, 1 - low, 1 + high) A) per token, r = exp(logprob - old), plus kl_coef KL(policy, reference).

    A replayed token's policy term carries min(exp(old - behaviour), cap), a constant; A = 0 gives exactly 0.
    source  DeepSeekMath (2402.03300) eq. 3; DAPO (2503.14476); Dr. GRPO (2503.20783); decoupled ratio: POPO (2606.01281)
    """
    terms = []
    for start, end in itertools.pairwise(offsets):
        tokens = slice(start, end)
        log_ratio = logprobs_N[tokens] - old_N[tokens]
        if log_ratio_clamp is not None:
            log_ratio = log_ratio.clamp(-log_ratio_clamp, log_ratio_clamp)
        ratio, advantage = log_ratio.exp(), advantages_N[tokens]
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        term = -torch.minimum(ratio * advantage, clipped * advantage)
        if behaviour_N is not None:
            term = term * (old_N[tokens] - behaviour_N[tokens]).exp().clamp(max=behaviour_cap).detach()
        term = term.where(advantage != 0, 0)
        if kl_coef:
            gap = ref_N[tokens] - logprobs_N[tokens]
            if log_ratio_clamp is not None:
                gap = gap.clamp(-log_ratio_clamp, log_ratio_clamp)
            kl = {"k1": -gap, "k2": gap.square() / 2, "k3": gap.exp() - gap - 1}[kl_kind]
            term = term + kl_coef * kl
        terms.append(term)
    sums = torch.stack([term.sum() for term in terms])
    lengths = torch.tensor([len(term) for term in terms])
    sequences = int((lengths > 0).sum())
    if aggregate == "token_mean":
        return sums.sum() / (normalizer or max(int(lengths.sum()), 1))
    if aggregate == "token_sum":
        return sums.sum() / (normalizer or 1)
    if aggregate == "seq_mean_token_sum":
        return sums.sum() / (normalizer or max(sequences, 1))
    if aggregate == "seq_mean_token_sum_norm":
        return sums.sum() / (normalizer or len(terms) * longest)
    assert aggregate == "seq_mean_token_mean", aggregate
    return (sums / lengths.clamp(min=1)).sum() / (normalizer or max(sequences, 1))
