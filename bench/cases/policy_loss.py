"""policy_loss: loss and gradient of packed responses, against the same formula in padded PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.case import Case, Provider
from r1v2_fast.ops import policy_loss


class Inputs(NamedTuple):
    logprobs: torch.Tensor  # [N]
    old: torch.Tensor
    advantages: torch.Tensor  # [B]
    offsets: torch.Tensor


def inputs(sequences: int, length: int):
    def make(device: torch.device) -> Inputs:
        g = torch.Generator().manual_seed(0)
        old = -torch.rand(sequences * length, generator=g)
        logprobs = (old + 0.2 * torch.randn(len(old), generator=g)).to(device).requires_grad_()
        advantages = torch.randn(sequences, generator=g).to(device)
        return Inputs(logprobs, old.to(device), advantages, torch.arange(0, len(old) + 1, length, device=device))

    return make


def ours(given: Inputs):
    loss = policy_loss(given.logprobs, given.old, given.advantages, offsets=given.offsets).loss
    return loss.detach(), torch.autograd.grad(loss, given.logprobs)[0]


def formula(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The mean over responses of equal length of each one's mean clipped loss."""
    logprobs, old, advantages = logprobs.view(len(advantages), -1), old.view(len(advantages), -1), advantages[:, None]
    ratio = (logprobs - old).exp()
    term = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return term.mean(1).mean()


def pytorch(given: Inputs):
    loss = formula(given.logprobs, given.old, given.advantages)
    return loss.detach(), torch.autograd.grad(loss, given.logprobs)[0]


def truth(given: Inputs):
    wide = given.logprobs.detach().double().requires_grad_()
    return pytorch(Inputs(wide, given.old.double(), given.advantages.double(), given.offsets))


CASES = [
    Case(
        stem="policy_loss",
        name="grpo, loss and gradient",
        shape={"B": 64, "T": 1024},
        dtype="float32",
        inputs=inputs(64, 1024),
        truth=truth,
        providers={"ours": Provider(ours), "pytorch": Provider(pytorch)},
        bytes=16.0 * 64 * 1024,
    )
]
