"""linear_logprobs under a loss, for the peers that fuse one: the GRPO loss (Liger) and the sum of log-probs (QuACK)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from bench.case import Case, Outputs, Provider
from bench.cases import linear_logprob as logprob
from bench.cases import policy_loss as policy
from bench.matmuls import matmuls
from bench.peers_linear_logprob import PEERS, QUACK_SUM, LogProb, Peer, compiled, liger_grpo
from bench.peers_linear_logprob import pytorch as plain
from r1v2_fast.ops import linear_logprobs, policy_loss

SEQUENCES = 8


class GRPO(NamedTuple):
    hidden: torch.Tensor  # [N, H], SEQUENCES responses of equal length
    weight: torch.Tensor
    targets: torch.Tensor
    old: torch.Tensor  # [N] within 0.1 nat of the log-probs: ratios stay off the clip's kinks, where rounding decides
    advantages: torch.Tensor


def grpo_inputs(n: int, h: int, v: int, dtype: torch.dtype) -> Callable[[torch.device], GRPO]:
    def make(device: torch.device) -> GRPO:
        given = logprob.inputs("frozen", n, h, v, dtype)(device)
        with torch.no_grad():
            logprobs = linear_logprobs(given.hidden, given.weight, given.targets).logprobs
        g = torch.Generator(device).manual_seed(1)
        old = logprobs + 0.2 * torch.rand(n, generator=g, device=device) - 0.1
        advantages = torch.randn(SEQUENCES, generator=g, device=device)
        return GRPO(given.hidden, given.weight, given.targets, old, advantages)

    return make


def grpo_ours(given: GRPO) -> Outputs:
    logprobs = linear_logprobs(given.hidden, given.weight, given.targets).logprobs
    offsets = torch.arange(0, len(given.old) + 1, len(given.old) // SEQUENCES, device=given.old.device)
    loss = policy_loss(logprobs, given.old, given.advantages, offsets=offsets, kind="grpo").loss
    return loss.detach(), torch.autograd.grad(loss, given.hidden)[0]


def grpo(function: LogProb) -> Callable[[GRPO], Outputs]:
    """Anybody's log-probs under the plain formula."""

    def run(given: GRPO) -> Outputs:
        logprobs = function(given.hidden, given.weight, given.targets)
        loss = policy.formula(logprobs, given.old, given.advantages)
        return loss.detach(), torch.autograd.grad(loss, given.hidden)[0]

    return run


def grpo_truth(given: GRPO) -> Outputs:
    upstream = torch.ones_like(given.old)
    logprobs, unit = logprob.truth(logprob.Inputs(given.hidden, given.weight, given.targets, upstream))
    logprobs.requires_grad_()
    loss = policy.formula(logprobs, given.old.double(), given.advantages.double())
    return loss.detach(), unit * torch.autograd.grad(loss, logprobs)[0][:, None]


def grpo_liger(given: GRPO) -> Outputs:
    loss = liger_grpo(given.hidden, given.weight, given.targets, given.old, given.advantages)
    return loss.detach(), torch.autograd.grad(loss, given.hidden)[0]


def sum_inputs(n: int, h: int, v: int, dtype: torch.dtype) -> Callable[[torch.device], logprob.Inputs]:
    def make(device: torch.device) -> logprob.Inputs:
        given = logprob.inputs("frozen", n, h, v, dtype)(device)
        return given._replace(upstream=torch.ones_like(given.upstream))

    return make


def summed(run: Callable[[logprob.Inputs], Outputs]) -> Callable[[logprob.Inputs], Outputs]:
    """With an upstream gradient of ones, what a provider of log-probs makes is the sum's gradient."""

    def total(given: logprob.Inputs) -> Outputs:
        logprobs, grad = run(given)
        return logprobs.sum(), grad

    return total


def sum_quack(given: logprob.Inputs) -> Outputs:
    total = QUACK_SUM.function(given.hidden, given.weight, given.targets)
    return total.detach(), torch.autograd.grad(total, given.hidden)[0]


def case(kind: str, n: int, h: int, v: int, dtype: torch.dtype, devices: tuple[str, ...]) -> Case:
    is_grpo = kind == "grpo"

    def wrapped(function: LogProb, peer: Peer | None = None) -> Provider:
        run = grpo(function) if is_grpo else summed(logprob.provider(function).run)
        return Provider(run, peer.why_not) if peer else Provider(run)

    providers = {
        "ours": Provider(grpo_ours if is_grpo else summed(logprob.ours)),
        "pytorch": wrapped(plain),
        "compile": wrapped(compiled(plain)),
        **{name: wrapped(peer.function, peer) for name, peer in PEERS.items()},
    }
    if is_grpo:
        providers["liger"] = Provider(grpo_liger, PEERS["liger"].why_not)  # its fused loss in its log-probs' place
    else:
        providers["quack"] = Provider(sum_quack, QUACK_SUM.why_not)
    if "cuda" in devices:
        providers["matmuls"] = Provider(lambda given: matmuls(given.hidden, given.weight, 4), floor=True)
    return Case(
        stem="linear_logprob",
        name=f"frozen head, {'GRPO loss of the' if is_grpo else 'sum of'} log-probs and gradient",
        shape={"N": n, "H": h, "V": v} | ({"B": SEQUENCES} if is_grpo else {}),
        dtype=str(dtype).removeprefix("torch."),
        inputs=(grpo_inputs if is_grpo else sum_inputs)(n, h, v, dtype),
        truth=grpo_truth if is_grpo else summed(logprob.truth),
        providers=providers,
        devices=devices,
        flops=4.0 * n * h * v,
        bytes=logprob.traffic(n, h, v, dtype.itemsize, 4),
    )


CASES = [
    case("grpo", 1024, 512, 32768, torch.float32, ("cpu",)),
    case("grpo", 4096, 5120, 152064, torch.bfloat16, ("cuda",)),
    case("sum", 4096, 5120, 152064, torch.bfloat16, ("cuda",)),  # on the CPU it would repeat the frozen case
]
