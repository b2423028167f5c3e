"""linear_logprobs: what it makes under a frozen, a trainable and no gradient, against its peers on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from bench.case import Case, Outputs, Provider
from bench.matmuls import matmuls
from bench.peers_linear_logprob import PEERS, LogProb, compiled
from bench.peers_linear_logprob import pytorch as plain
from r1v2_fast.ops import _linear_logprob_native as native
from r1v2_fast.ops import linear_logprobs
from r1v2_fast.reference import linear_logprob as reference
from r1v2_fast.testing.peaked import TAU, peaked_policy

# kind: (name, head matmuls in NHV FLOPs that the answer costs)
KINDS = {
    "frozen": ("frozen head, forward and backward", 4),
    "trainable": ("trainable head, forward and backward", 6),
    "no gradient": ("no gradient", 2),
    "half": ("frozen head, half the rows without a gradient", 3),
    "tolerance": ("frozen head, peaked policy, grad_tolerance 2^-10", 2),
}
WORKSPACE = 2 << 30  # on CUDA, where the trainable head keeps N x V probabilities
TRUTH_ROWS = 256  # at a time: fp64 logits of every row would be gigabytes


class Inputs(NamedTuple):
    hidden: torch.Tensor
    weight: torch.Tensor
    targets: torch.Tensor
    upstream: torch.Tensor
    needs_grad: torch.Tensor | None = None  # on the CPU, where it costs no sync
    """Which of hidden and weight require a gradient says what a provider makes."""


def inputs(kind: str, n: int, h: int, v: int, dtype: torch.dtype) -> Callable[[torch.device], Inputs]:
    def make(device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        if kind == "tolerance":
            hidden, weight, targets = peaked_policy(n, h, v, dtype=dtype, device=device)
        else:
            hidden = torch.randn(n, h, generator=g, device=device).to(dtype)
            weight = (torch.randn(v, h, generator=g, device=device) / h**0.5).to(dtype)
            targets = torch.randint(0, v, (n,), generator=g, device=device)
        upstream = torch.randn(n, generator=g, device=device)
        wanted = torch.arange(n) % 2 == 0 if kind == "half" else None
        if wanted is not None:
            upstream = upstream.where(wanted.to(device), 0)
        hidden.requires_grad_(kind != "no gradient")
        return Inputs(hidden, weight.requires_grad_(kind == "trainable"), targets, upstream, wanted)

    return make


def with_gradients(given: Inputs, logprobs: torch.Tensor) -> Outputs:
    leaves = [leaf for leaf in (given.hidden, given.weight) if leaf.requires_grad]
    grads = torch.autograd.grad(logprobs, leaves, given.upstream.to(logprobs.dtype)) if leaves else ()
    return (logprobs.detach(), *grads)


def provider(function: LogProb, why_not=None) -> Provider:
    def run(given: Inputs) -> Outputs:
        return with_gradients(given, function(given.hidden, given.weight, given.targets))

    return Provider(run, why_not) if why_not else Provider(run)


def ours(given: Inputs, **options) -> Outputs:
    if given.weight.requires_grad and given.weight.is_cuda:
        options["workspace_bytes"] = WORKSPACE
    out = linear_logprobs(given.hidden, given.weight, given.targets, needs_grad=given.needs_grad, **options)
    return with_gradients(given, out.logprobs)


def truth(given: Inputs) -> Outputs:
    weight = given.weight.detach().double().requires_grad_(given.weight.requires_grad)
    parts, head = [], None
    for hidden, targets, upstream in zip(
        *(tensor.split(TRUTH_ROWS) for tensor in (given.hidden, given.targets, given.upstream)), strict=True
    ):
        wide = Inputs(hidden.detach().double().requires_grad_(hidden.requires_grad), weight, targets, upstream)
        outputs = with_gradients(wide, reference.linear_logprobs(wide.hidden, weight, targets)["logprobs"])
        parts.append(outputs[:2])
        if len(outputs) > 2:
            head = outputs[2] if head is None else head.add_(outputs[2])
    rows = tuple(torch.cat(part) for part in zip(*parts, strict=True))
    return rows if head is None else (*rows, head)


def tolerated(given: Inputs) -> Outputs:
    """grad_tolerance's promise: d logprob / d hidden errs by at most tau max_v |W_v|, scaled by what arrives."""
    longest = torch.linalg.vector_norm(given.weight.detach(), dim=1, dtype=torch.float32).max().double()
    return torch.zeros_like(given.upstream, dtype=torch.float64), TAU * longest * given.upstream.double().abs()


def traffic(n: int, h: int, v: int, size: int, products: int) -> float:
    """Bytes at the least, with logits too many for any cache and each product a vendor's matmul.

    weight     read by the logits' product and the hidden gradient's, its gradient written
    logits     written by the product in fp32, read by the row pass: 8 a logit
    gradient   of the logits, for rows that need one: written by the row pass, read by each product that takes it
    hidden     read, its gradient written; the head's gradient reads it once more
    the rest   targets read, log-probs written, upstream read
    """
    rows = {2: 0, 3: n // 2, 4: n, 6: n}[products]
    weights = 1 + (rows > 0) + (products == 6)
    hiddens = n + rows + (n if products == 6 else 0)
    return size * (weights * v * h + hiddens * h + (3 if products == 6 else 2) * rows * v) + 8.0 * n * v + 16.0 * n


def case(kind: str, n: int, h: int, v: int, dtype: torch.dtype, devices: tuple[str, ...]) -> Case:
    name, products = KINDS[kind]
    mine = {"ours": Provider(ours)}
    if kind == "tolerance":
        mine = {"ours": Provider(partial(ours, grad_tolerance=TAU)), "exact": Provider(ours)}
    if "cuda" in devices:  # the backend that `ours`, which is `auto`, takes where `bench tune` found it faster
        mine["cluster rows"] = Provider(
            partial(ours, backend="cuda"),
            lambda device: native.why_not(device) or native.lacks(torch.empty(0, device=device), v),
        )
    peers = {peer: provider(found.function, found.why_not) for peer, found in PEERS.items()}
    floor = Provider(lambda given: matmuls(given.hidden, given.weight, products), floor=True)
    return Case(
        stem="linear_logprob",
        name=name,
        shape={"N": n, "H": h, "V": v},
        dtype=str(dtype).removeprefix("torch."),
        inputs=inputs(kind, n, h, v, dtype),
        truth=truth,
        providers=mine
        | {"pytorch": provider(plain), "compile": provider(compiled(plain))}
        | peers
        | ({"matmuls": floor} if "cuda" in devices else {}),
        devices=devices,
        flops=float(products) * n * h * v,
        bytes=traffic(n, h, v, dtype.itemsize, products),
        allowed=tolerated if kind == "tolerance" else None,
    )


CPU, CUDA = ("cpu",), ("cuda",)
CASES = [
    case("frozen", 1024, 512, 32768, torch.float32, CPU),
    case("trainable", 1024, 512, 32768, torch.float32, CPU),
    case("no gradient", 1024, 512, 32768, torch.float32, CPU),
    case("tolerance", 512, 2048, 32768, torch.float32, CPU),
    *(case(kind, 4096, 5120, 152064, torch.bfloat16, CUDA) for kind in KINDS),
    case("frozen", 4096, 5120, 151674, torch.bfloat16, CUDA),  # a vocabulary that no wide access divides
    case("frozen", 4096, 5120, 128256, torch.bfloat16, CUDA),
]
