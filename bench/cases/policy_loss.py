"""policy_loss: loss, gradient and metrics of packed responses, against padded PyTorch and trainers' own code."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench.case import Case, Outputs, Provider
from bench.peers_linear_logprob import compiled
from bench.peers_losses import PEERS
from r1v2_fast.ops import policy_loss

Loss = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor
]  # log-probs and old ones [B, T], advantages [B]


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


def ours(kind: str, given: Inputs) -> Outputs:
    normalizer = float(len(given.logprobs) if kind == "dapo" else len(given.advantages))
    loss = policy_loss(
        given.logprobs, given.old, given.advantages, offsets=given.offsets, kind=kind, normalizer=normalizer
    ).loss
    return loss.detach(), torch.autograd.grad(loss, given.logprobs)[0]


def formula(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    """The mean over responses of equal length of each one's mean clipped loss, which is the mean over all tokens."""
    logprobs, old, advantages = logprobs.view(len(advantages), -1), old.view(len(advantages), -1), advantages[:, None]
    ratio = (logprobs - old).exp()
    term = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return term.mean(1).mean()


def gspo_formula(logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    logprobs, old = logprobs.view(len(advantages), -1), old.view(len(advantages), -1)
    ratio = (logprobs - old).mean(1).exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages).mean()


def padded(loss: Loss) -> Callable[[Inputs], Outputs]:
    def run(given: Inputs) -> Outputs:
        shape = len(given.advantages), -1
        value = loss(given.logprobs.view(shape), given.old.view(shape), given.advantages)
        return value.detach(), torch.autograd.grad(value, given.logprobs)[0]

    return run


def truth(loss: Loss) -> Callable[[Inputs], Outputs]:
    def run(given: Inputs) -> Outputs:
        wide = given.logprobs.detach().double().requires_grad_()
        return padded(loss)(Inputs(wide, given.old.double(), given.advantages.double(), given.offsets))

    return run


def peers(kind: str, level: str, loss: str, mode: str) -> dict[str, Provider]:
    """TRL's loss_type and importance_sampling_level, verl's policy loss and loss_agg_mode."""
    words = {"trl": (kind, level), "verl": (loss, mode)}
    return {n: Provider(padded(partial(p.function, *words[n])), p.why_not) for n, p in PEERS.items()}


def case(kind: str, loss: Loss, sequences: int, length: int, **others: Provider) -> Case:
    return Case(
        stem="policy_loss",
        name=f"{kind}, loss, gradient and metrics",
        shape={"B": sequences, "T": length},
        dtype="float32",
        inputs=inputs(sequences, length),
        truth=truth(loss),
        providers={
            "ours": Provider(partial(ours, kind)),
            "pytorch": Provider(padded(loss)),
            "compile": Provider(padded(compiled(loss))),
            **others,
        },
        bytes=12.0 * sequences * length,
    )


CASES = [
    case("grpo", formula, 64, 1024, **peers("grpo", "token", "vanilla", "seq-mean-token-mean")),
    case("dapo", formula, 8, 8192, **peers("dapo", "token", "vanilla", "token-mean")),
    case("gspo", gspo_formula, 64, 1024, **peers("grpo", "sequence", "gspo", "seq-mean-token-mean")),
]
