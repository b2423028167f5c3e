"""Token log-probs under a linear head: the definition."""

from __future__ import annotations

import torch


def logits(hidden_NH, weight_VH, *, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, forbidden=None):
    """z = softcap_(logit_scale (h W^T + b)) / T, with -inf at forbidden ids; softcap_(x) = c tanh(x / c).

    temperature  float, or [N]
    """
    product_NV = hidden_NH @ weight_VH.T
    return shaped(
        product_NV, bias=bias, temperature=temperature, logit_scale=logit_scale, softcap=softcap, forbidden=forbidden
    )


def shaped(product_NV, *, bias=None, temperature=1.0, logit_scale=1.0, softcap=None, forbidden=None):
    """z of a matmul h W^T, or of logits."""
    s_NV = logit_scale * (product_NV + (0 if bias is None else bias))
    if softcap is not None:
        s_NV = softcap * torch.tanh(s_NV / softcap)
    z_NV = s_NV / (temperature[:, None] if isinstance(temperature, torch.Tensor) else temperature)
    if forbidden is not None:
        z_NV = z_NV.index_fill(1, forbidden, -torch.inf)
    return z_NV


def statistics(z_NV, targets_N, *, ignore_index=-100):
    """logprob_t = z[t, target] - logsumexp(z[t]) and what can be asked beside it.

    returns   dict of [N]: logprobs, entropy -sum p log p, is_top1 (the first maximum), mean_logits over allowed ids,
              log_sum_sq_probs; rows whose target is ignore_index hold 0 (False)
    gradient  through logprobs and entropy
    """
    live = targets_N != ignore_index
    index = targets_N.where(live, 0)[:, None]
    logp_NV = z_NV.log_softmax(1)
    allowed = z_NV.isfinite()
    probs_NV = logp_NV.exp()
    finite = logp_NV.where(allowed, 0)
    return {
        "logprobs": logp_NV.gather(1, index).squeeze(1).where(live, 0),
        "entropy": -(probs_NV * finite).sum(1).where(live, 0),
        "is_top1": (z_NV.argmax(1) == index.squeeze(1)) & live,
        "mean_logits": (z_NV.where(allowed, 0).sum(1) / allowed.sum(1)).where(live, 0),
        "log_sum_sq_probs": probs_NV.square().sum(1).log().where(live, 0),
    }


def linear_logprobs(hidden_NH, weight_VH, targets_N, *, ignore_index=-100, **head):
    return statistics(logits(hidden_NH, weight_VH, **head), targets_N, ignore_index=ignore_index)
