"""Mixed preference optimization over packed pairs: the definition, differentiable, pair by pair."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F


def mpo_loss(
    logprobs_N,
    ref_N,
    offsets,
    *,
    beta=0.1,
    weights=(0.8, 0.2, 1.0),
    delta=0.0,
    label_smoothing=0.0,
    pair_weights=None,
    generation="sequence",
    normalizer=None,
    generation_normalizer=None,
):
    """w1 DPO + w2 BCO + w3 NLL, rewards r = beta (log pi - log pi_ref) summed over a response.

    DPO -log sigmoid(r_c - r_r); BCO -log sigmoid(r_c - delta) - log sigmoid(-(r_r - delta)); NLL of the chosen.
    returns  loss, preference, quality, generation, chosen_rewards [P], rejected_rewards [P]
    source   Skywork R1V2 (2504.16656) eq. 2 to 5; InternVL2-MPO (2411.10442)
    """
    pairs = (len(offsets) - 1) // 2
    spans = list(itertools.pairwise(offsets))
    rewards = [beta * (logprobs_N[a:b] - ref_N[a:b]).sum() for a, b in spans]
    preference = quality = generated = logprobs_N.new_zeros(())
    for p in range(pairs):
        w = 1.0 if pair_weights is None else pair_weights[p]
        chosen, rejected = rewards[p], rewards[pairs + p]
        gap = chosen - rejected
        preference = preference - w * ((1 - label_smoothing) * F.logsigmoid(gap) + label_smoothing * F.logsigmoid(-gap))
        quality = quality - w * (F.logsigmoid(chosen - delta) + F.logsigmoid(-(rejected - delta)))
        start, end = spans[p]
        nll = -logprobs_N[start:end].sum()
        generated = generated + w * (nll / (end - start) if generation == "sequence" else nll)
    tokens = offsets[pairs] - offsets[0]
    preference, quality = preference / (normalizer or pairs), quality / (normalizer or pairs)
    generated = generated / (generation_normalizer or (pairs if generation == "sequence" else tokens))
    loss = weights[0] * preference + weights[1] * quality + weights[2] * generated
    return loss, preference, quality, generated, torch.stack(rewards[:pairs]), torch.stack(rewards[pairs:])
