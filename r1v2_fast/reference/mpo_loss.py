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
    returns  loss, preference, quality, generation, chosen_rewards [P], rejected_rewards [P], accuracy, margin
    source   Skywork R1V2 (2504.16656) eq. 2 to 5; InternVL2-MPO (2411.10442)
    """
    pairs = (len(offsets) - 1) // 2
    spans = list(itertools.pairwise(offsets))
    rewards = torch.stack([beta * (logprobs_N[a:b] - ref_N[a:b]).sum() for a, b in spans])
    chosen, rejected = rewards.split(pairs)
    nll = torch.stack(
        [-(logprobs_N[a:b].mean() if generation == "sequence" else logprobs_N[a:b].sum()) for a, b in spans]
    )
    w = 1.0 if pair_weights is None else pair_weights
    e, gap = label_smoothing, chosen - rejected
    preference = -(w * ((1 - e) * F.logsigmoid(gap) + e * F.logsigmoid(-gap))).sum() / (normalizer or pairs)
    quality = -(w * (F.logsigmoid(chosen - delta) + F.logsigmoid(-(rejected - delta)))).sum() / (normalizer or pairs)
    number = pairs if generation == "sequence" else offsets[pairs] - offsets[0]
    generated = (w * nll[:pairs]).sum() / (generation_normalizer or number)
    loss = weights[0] * preference + weights[1] * quality + weights[2] * generated
    return loss, preference, quality, generated, chosen, rejected, (gap > 0).to(gap).mean(), gap.mean()
