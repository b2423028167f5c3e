"""The row pass: statistics of n rows of logits and, in place of the logits, what the gradient matmul multiplies.

n rows of a chunk, V vocabulary. c_n = logit_scale / temperature, f = 1 - (s / softcap)^2, t the target.
With K = p f, its target column zeroed, and a = (1 - p_t) f_t:  d logprob / d hidden = c (a W_t - K W).
With E = p (log p + entropy) f:                                d entropy / d hidden = -c (E W).
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    logprobs: torch.Tensor  # [n]
    entropy: torch.Tensor | None  # [n]
    is_top1: torch.Tensor | None  # [n] bool
    mean_logits: torch.Tensor | None  # [n]
    log_sum_sq_probs: torch.Tensor | None  # [n]
    target_weight: torch.Tensor | None  # a [n]
    kept: torch.Tensor | None  # K [n, V], over the logits' memory
    entropy_kept: torch.Tensor | None  # E [n, V]


def row_pass(
    logits_nV: torch.Tensor,
    targets_n: torch.Tensor,
    inverse_temperature: torch.Tensor | float,  # [n, 1], or one for all
    logit_scale: float,
    softcap: float | None,
    forbidden: torch.Tensor | None,
    outputs: tuple[str, ...],
    grad: bool,
    entropy_grad: bool,
) -> Rows:
    """`logits_nV` is the matmul with its bias, fp32 or fp64, and is overwritten."""
    z = logits_nV
    factor = None
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if softcap is not None:
        z.div_(softcap).tanh_()
        if grad or entropy_grad:
            factor = 1 - z.square()
        z.mul_(softcap)
    if isinstance(inverse_temperature, torch.Tensor) or inverse_temperature != 1.0:
        z.mul_(inverse_temperature)
    index = targets_n[:, None]
    mean_logits = None
    if "mean_logits" in outputs:
        total, count = z.sum(1), z.shape[1]
        if forbidden is not None:
            total, count = total - z[:, forbidden].sum(1), count - len(forbidden)
        mean_logits = total / count
    if forbidden is not None:
        z.index_fill_(1, forbidden, -torch.inf)
    target_logits = z.gather(1, index).squeeze(1)
    is_top1 = None
    if "is_top1" in outputs:
        top, first = z.max(1)
        is_top1 = first == targets_n
    else:
        top = z.amax(1)
    p = torch.softmax(z, 1, out=z)
    entropy = entropy_kept = log_sum_sq_probs = None
    if "entropy" in outputs or entropy_grad:
        log_p_times_p = torch.xlogy(p, p)
        entropy = -log_p_times_p.sum(1)
        if entropy_grad:
            entropy_kept = log_p_times_p.addcmul_(p, entropy[:, None])
            if factor is not None:
                entropy_kept.mul_(factor)
    if "log_sum_sq_probs" in outputs:
        log_sum_sq_probs = torch.linalg.vecdot(p, p).log()
    target_probs = p.gather(1, index).squeeze(1)
    log_total = -p.amax(1).log()  # the largest probability is 1 / sum of exp(z - max)
    p.scatter_(1, index, 0.0)
    # 1 - p_t as a sum of the others: subtracting loses everything near p_t = 1
    others = p.sum(1)
    logprobs = torch.where(target_logits == top, -torch.log1p(others / target_probs), (target_logits - top) - log_total)
    target_weight = kept = None
    if grad:
        target_weight, kept = others, p
        if factor is not None:
            target_weight = others * factor.gather(1, index).squeeze(1)
            kept.mul_(factor)
    return Rows(
        logprobs,
        entropy if "entropy" in outputs else None,
        is_top1,
        mean_logits,
        log_sum_sq_probs,
        target_weight,
        kept,
        entropy_kept,
    )
