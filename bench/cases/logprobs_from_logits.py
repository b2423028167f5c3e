"""logprobs_from_logits: log-probs, entropy and the logits' gradient for a caller that holds logits."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.case import Case, Outputs, Provider
from bench.peers_linear_logprob import compiled
from r1v2_fast.ops import logprobs_from_logits
from r1v2_fast.reference import linear_logprob as reference

TRUTH_ROWS = 256  # at a time: fp64 copies of every row's logits would be gigabytes


class Inputs(NamedTuple):
    logits: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor  # [2, N], of log-probs and entropy


def inputs(n: int, v: int, dtype: torch.dtype):
    def make(device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        logits = (4 * torch.randn(n, v, generator=g, device=device)).to(dtype).requires_grad_()
        targets = torch.randint(0, v, (n,), generator=g, device=device)
        return Inputs(logits, targets, torch.randn(2, n, generator=g, device=device))

    return make


def _with_gradient(given: Inputs, logprobs: torch.Tensor, entropy: torch.Tensor) -> Outputs:
    (grad,) = torch.autograd.grad((logprobs, entropy), given.logits, tuple(given.upstream.to(logprobs.dtype)))
    return logprobs.detach(), entropy.detach(), grad


def ours(given: Inputs) -> Outputs:
    out = logprobs_from_logits(given.logits, given.targets, outputs=("entropy",), entropy_grad=True)
    assert out.entropy is not None
    return _with_gradient(given, out.logprobs, out.entropy)


def formula(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    logp = logits.float().log_softmax(1)
    return logp.gather(1, targets[:, None]).squeeze(1), -(logp.exp() * logp).sum(1)


def pytorch(given: Inputs) -> Outputs:
    return _with_gradient(given, *formula(given.logits, given.targets))


def truth(given: Inputs) -> Outputs:
    parts = []
    for logits, targets, upstream in zip(
        given.logits.split(TRUTH_ROWS),
        given.targets.split(TRUTH_ROWS),
        given.upstream.split(TRUTH_ROWS, 1),
        strict=True,
    ):
        wide = Inputs(logits.detach().double().requires_grad_(), targets, upstream)
        found = reference.statistics(wide.logits, targets)
        parts.append(_with_gradient(wide, found["logprobs"], found["entropy"]))
    return tuple(torch.cat(part) for part in zip(*parts, strict=True))


def case(n: int, v: int, dtype: torch.dtype, devices: tuple[str, ...]) -> Case:
    fast = compiled(formula)
    return Case(
        stem="logprobs_from_logits",
        name="with entropy, forward and backward",
        shape={"N": n, "V": v},
        dtype=str(dtype).removeprefix("torch."),
        inputs=inputs(n, v, dtype),
        truth=truth,
        providers={
            "ours": Provider(ours),
            "pytorch": Provider(pytorch),
            "compile": Provider(lambda given: _with_gradient(given, *fast(given.logits, given.targets))),
        },
        devices=devices,
        # logits read forward and again backward, where the gradient is written; targets, two upstreams, two outputs
        bytes=3.0 * n * v * dtype.itemsize + 24.0 * n,
    )


CASES = [case(1024, 32768, torch.float32, ("cpu",)), case(4096, 152064, torch.bfloat16, ("cuda",))]
