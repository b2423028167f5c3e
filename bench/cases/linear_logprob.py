"""linear_logprobs: forward and backward under a frozen head, against PyTorch's own ops and TRL's chunked function."""

from __future__ import annotations

import importlib.util
from typing import NamedTuple

import torch

from bench.case import Case, Provider
from r1v2_fast.ops import linear_logprobs
from r1v2_fast.reference import linear_logprob as reference


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor


def inputs(n: int, h: int, v: int, dtype: torch.dtype):
    def make(device: torch.device) -> Inputs:
        g = torch.Generator().manual_seed(0)
        hidden = torch.randn(n, h, generator=g).to(device, dtype).requires_grad_()
        weight = (torch.randn(v, h, generator=g) / h**0.5).to(device, dtype)
        targets, upstream = torch.randint(0, v, (n,), generator=g), torch.randn(n, generator=g)
        return Inputs(hidden, weight, targets.to(device), upstream.to(device))

    return make


def _with_gradient(given: Inputs, logprobs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    (grad,) = torch.autograd.grad(logprobs, given.hidden, given.upstream.to(logprobs.dtype))
    return logprobs.detach(), grad


def ours(given: Inputs):
    return _with_gradient(given, linear_logprobs(given.hidden, given.weight, given.targets).logprobs)


def pytorch(given: Inputs):
    return _with_gradient(given, reference.linear_logprobs(given.hidden, given.weight, given.targets)["logprobs"])


def truth(given: Inputs):
    wide = Inputs(given.hidden.detach().double().requires_grad_(), given.weight.double(), given.targets, given.upstream)
    return pytorch(wide)


def trl(given: Inputs):
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as CHUNK  # what its trainers pass

    arguments = (given.hidden, given.weight, None, given.targets, 1.0, CHUNK, None, 1.0, ())
    return _with_gradient(given, ChunkedLogProbFunction.apply(*arguments)[0])


def trl_why_not(device: str) -> str | None:
    return None if importlib.util.find_spec("trl") else "trl is not installed; pip install trl==1.16.0"


def case(name: str, n: int, h: int, v: int, dtype: torch.dtype, devices: tuple[str, ...]) -> Case:
    return Case(
        stem="linear_logprob",
        name=name,
        shape={"N": n, "H": h, "V": v},
        dtype=str(dtype).removeprefix("torch."),
        inputs=inputs(n, h, v, dtype),
        truth=truth,
        providers={"ours": Provider(ours), "pytorch": Provider(pytorch), "trl": Provider(trl, trl_why_not)},
        devices=devices,
        flops=4.0 * n * h * v,
    )


CASES = [
    case("frozen head, forward and backward", 1024, 512, 32768, torch.float32, ("cpu",)),
    case("frozen head, forward and backward", 4096, 5120, 152064, torch.bfloat16, ("cuda",)),
]
