"""Sampling that depends on a response's own seed alone: not on its batch, its place there, its rank or the engine's schedule.

N responses, R new tokens at most, V vocabulary.
"""

from __future__ import annotations

import torch


def uniforms(seeds: list[int], group_size: int, max_new_tokens: int) -> torch.Tensor:
    """One number in [0, 1) for each token of each response, [len(seeds) x group_size, max_new_tokens] fp64 on the CPU.

    A prompt's seed gives its whole group: responses, and tokens of one, are independent.
    """
    return torch.cat(
        [
            torch.rand(
                group_size, max_new_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
            )
            for seed in seeds
        ]
    )  # fmt: skip


def pick(
    logits_NV: torch.Tensor, temperature: float, uniforms_N: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token [N], its log-prob [N] fp32): the inverse of the cumulative distribution at each row's uniform number.

    The distribution is softmax(logits / temperature); a logit of -inf is never picked. temperature 0 takes the likeliest
    token, with its log-prob at temperature 1. The cumulative sum is fp64: at V = 152,064 fp32's would skip rare tokens.
    """
    if temperature == 0:
        token = logits_NV.argmax(1)
        logprobs = logits_NV.log_softmax(1)
    else:
        assert uniforms_N is not None, "sampling needs seeds"
        logprobs = (logits_NV / temperature).log_softmax(1)
        cumulative = logprobs.double().exp().cumsum(1)
        # below the total: rounding up to it would pick whatever stands last, even a token of probability 0
        total = cumulative[:, -1:]
        threshold = torch.minimum(uniforms_N[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
        token = torch.searchsorted(cumulative, threshold, right=True).squeeze(1)
    return token, logprobs.gather(1, token[:, None]).squeeze(1)
