"""mpo_loss: loss and gradient of packed pairs, against the same formula on padded PyTorch tensors and TRL's loss code.

P pairs, T padded length, N tokens: P chosen sequences, then their rejected ones. Everybody takes packed log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.case import Case, Outputs, Provider
from bench.peers_linear_logprob import compiled
from bench.peers_losses import PEERS, trl_dpo
from r1v2_fast.ops import mpo_loss


class Inputs(NamedTuple):
    logprobs: torch.Tensor  # [N]
    reference: torch.Tensor  # [N]
    offsets: torch.Tensor  # [2P + 1]
    places: torch.Tensor  # [N] in 2P x T
    mask: torch.Tensor  # [2P, T]
    chosen_tokens: int


def inputs(pairs: int, shortest: int, longest: int):
    def make(device: torch.device) -> Inputs:
        g = torch.Generator().manual_seed(0)
        lengths = torch.randint(shortest, longest + 1, (2 * pairs,), generator=g)
        reference = -torch.rand(int(lengths.sum()), generator=g)
        logprobs = (reference + 0.1 * torch.randn(len(reference), generator=g)).to(device).requires_grad_()
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        places, offsets = mask.flatten().nonzero().squeeze(1), F.pad(lengths.cumsum(0), (1, 0))
        reference, offsets, places, mask = (tensor.to(device) for tensor in (reference, offsets, places, mask))
        return Inputs(logprobs, reference, offsets, places, mask, chosen_tokens=int(lengths[:pairs].sum()))

    return make


def ours(given: Inputs) -> Outputs:
    return with_gradient(mpo_loss(given.logprobs, given.reference, given.offsets, generation="token").loss, given)


def with_gradient(loss: torch.Tensor, given: Inputs) -> Outputs:
    return loss.detach(), torch.autograd.grad(loss, given.logprobs)[0]


def padded(values: torch.Tensor, places: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if len(values) == mask.numel():
        return values.view(mask.shape)
    return values.new_zeros(mask.numel()).index_copy(0, places, values).view(mask.shape)


def formula(logprobs, reference, places, mask, chosen_tokens):
    logprobs, reference = padded(logprobs, places, mask), padded(reference, places, mask)
    chosen, rejected = (0.1 * (logprobs - reference).sum(1)).chunk(2)
    preference = -F.logsigmoid(chosen - rejected).mean()
    quality = -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean()
    return 0.8 * preference + 0.2 * quality - logprobs.chunk(2)[0].sum() / chosen_tokens


def plain(function: Callable[..., torch.Tensor]) -> Callable[[Inputs], Outputs]:
    def run(given: Inputs) -> Outputs:
        arguments = (given.logprobs, given.reference, given.places, given.mask, given.chosen_tokens)
        return with_gradient(function(*arguments), given)

    return run


def truth(given: Inputs) -> Outputs:
    exact = given._replace(
        logprobs=given.logprobs.detach().double().requires_grad_(), reference=given.reference.double()
    )
    return plain(formula)(exact)


def trl(logprobs, reference, places, mask, chosen_tokens):
    rows = padded(logprobs, places, mask), padded(reference, places, mask)
    return trl_dpo(*rows, mask, ["sigmoid", "bco_pair", "sft"], [0.8, 0.2, 1.0])[0]


def case(name: str, pairs: int, shortest: int, longest: int) -> Case:
    make = inputs(pairs, shortest, longest)
    tokens = len(make(torch.device("cpu")).places)
    return Case(
        stem="mpo_loss",
        name=f"preference, quality and generation, loss and gradient, {name}",
        shape={"P": pairs, "T": longest, "N": tokens},
        dtype="float32",
        inputs=make,
        truth=truth,
        providers={
            "ours": Provider(ours),
            "pytorch": Provider(plain(formula)),
            "compile": Provider(plain(compiled(formula))),
            "trl": Provider(plain(trl), PEERS["trl"].why_not),
        },
        bytes=12.0 * tokens,
    )


CASES = [case("equal lengths", 32, 1024, 1024), case("ragged", 32, 64, 1024)]
