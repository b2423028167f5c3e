"""mpo_loss: loss and gradient of packed pairs, against the same formula on padded PyTorch tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from bench.case import Case, Provider
from r1v2_fast.ops import mpo_loss


class Inputs(NamedTuple):
    logprobs: torch.Tensor  # [2 P T]
    reference: torch.Tensor
    offsets: torch.Tensor


def inputs(pairs: int, length: int):
    def make(device: torch.device) -> Inputs:
        g = torch.Generator().manual_seed(0)
        reference = -torch.rand(2 * pairs * length, generator=g)
        logprobs = (reference + 0.1 * torch.randn(len(reference), generator=g)).to(device).requires_grad_()
        return Inputs(logprobs, reference.to(device), torch.arange(0, len(reference) + 1, length, device=device))

    return make


def ours(given: Inputs):
    loss = mpo_loss(given.logprobs, given.reference, given.offsets).loss
    return loss.detach(), torch.autograd.grad(loss, given.logprobs)[0]


def pytorch(given: Inputs):
    sequences = len(given.offsets) - 1
    logprobs, reference = given.logprobs.view(sequences, -1), given.reference.view(sequences, -1)
    chosen, rejected = (0.1 * (logprobs - reference).sum(1)).chunk(2)
    preference = -F.logsigmoid(chosen - rejected).mean()
    quality = -(F.logsigmoid(chosen) + F.logsigmoid(-rejected)).mean()
    generation = -logprobs[: sequences // 2].mean(1).mean()
    loss = 0.8 * preference + 0.2 * quality + generation
    return loss.detach(), torch.autograd.grad(loss, given.logprobs)[0]


def truth(given: Inputs):
    return pytorch(Inputs(given.logprobs.detach().double().requires_grad_(), given.reference.double(), given.offsets))


CASES = [
    Case(
        stem="mpo_loss",
        name="preference, quality and generation, loss and gradient",
        shape={"P": 32, "T": 1024},
        dtype="float32",
        inputs=inputs(32, 1024),
        truth=truth,
        providers={"ours": Provider(ours), "pytorch": Provider(pytorch)},
        bytes=12.0 * 64 * 1024,
    )
]
