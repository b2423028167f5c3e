"""GRPO's loss for a caller that holds logits [B, T + 1, V], which is what Liger's Triton GRPO loss takes."""

from __future__ import annotations

from typing import NamedTuple

import torch

from bench.case import Case, Outputs, Provider
from bench.cases.policy_loss import formula
from bench.peers_linear_logprob import Peer, _from, compiled
from r1v2_fast.ops import logprobs_from_logits, policy_loss


class Inputs(NamedTuple):
    logits: torch.Tensor  # [B, T + 1, V]; the last position predicts nothing
    ids: torch.Tensor  # [B, T]
    old: torch.Tensor  # [B, T]
    advantages: torch.Tensor  # [B]


def inputs(sequences: int, length: int, vocabulary: int, dtype: torch.dtype):
    def make(device: torch.device) -> Inputs:
        g = torch.Generator(device).manual_seed(0)
        logits = (4 * torch.randn(sequences, length + 1, vocabulary, generator=g, device=device)).to(dtype)
        ids = torch.randint(0, vocabulary, (sequences, length), generator=g, device=device)
        noise = 0.2 * torch.rand(sequences, length, generator=g, device=device) - 0.1  # off the clip's kinks
        with torch.no_grad():
            old = logprobs_from_logits(logits[:, :-1], ids).logprobs + noise
        return Inputs(logits.requires_grad_(), ids, old, torch.randn(sequences, generator=g, device=device))

    return make


def with_gradient(loss: torch.Tensor, given: Inputs) -> Outputs:
    return loss.detach(), torch.autograd.grad(loss, given.logits)[0]


def ours(given: Inputs) -> Outputs:
    logprobs = logprobs_from_logits(given.logits[:, :-1], given.ids).logprobs
    mask = torch.ones_like(given.ids, dtype=torch.bool)
    normalizer = float(len(given.ids))
    return with_gradient(
        policy_loss(logprobs, given.old, given.advantages, mask=mask, normalizer=normalizer).loss, given
    )


def plain(logits: torch.Tensor, ids: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    wide = logits[:, :-1].to(torch.promote_types(logits.dtype, torch.float32))
    return formula(wide.log_softmax(2).gather(2, ids[:, :, None]).squeeze(2), old, advantages)


def pytorch(given: Inputs) -> Outputs:
    return with_gradient(plain(*given), given)


PLAIN_COMPILED = compiled(plain)


def pytorch_compiled(given: Inputs) -> Outputs:
    return with_gradient(PLAIN_COMPILED(*given), given)


def truth(given: Inputs) -> Outputs:
    exact = given._replace(
        logits=given.logits.detach().double().requires_grad_(), old=given.old.double(), advantages=given.advantages.double()
    )  # fmt: skip
    return pytorch(exact)


def liger(given: Inputs) -> Outputs:
    loss, _ = _from("liger_kernel.transformers.grpo_loss", "triton_grpo_loss")(
        given.logits, given.old, None, given.ids, given.advantages, temperature=1.0, beta=0.0, eps_low=0.2, eps_high=0.2,
        inplace=False, loss_type="grpo", reduce=True,
    )  # fmt: skip
    return with_gradient(loss, given)


LIGER = Peer("liger-kernel", "0.8.5", liger)


def case(sequences: int, length: int, vocabulary: int, dtype: torch.dtype, devices: tuple[str, ...]) -> Case:
    return Case(
        stem="policy_loss",
        name="grpo from logits, loss and gradient",
        shape={"B": sequences, "T": length, "V": vocabulary},
        dtype=str(dtype).removeprefix("torch."),
        inputs=inputs(sequences, length, vocabulary, dtype),
        truth=truth,
        providers={
            "ours": Provider(ours),
            "pytorch": Provider(pytorch),
            "compile": Provider(pytorch_compiled),
            "liger": Provider(liger, LIGER.why_not),
        },
        devices=devices,
        bytes=3.0 * dtype.itemsize * sequences * length * vocabulary,
    )


CASES = [case(8, 64, 32768, torch.float32, ("cpu",)), case(8, 512, 151936, torch.bfloat16, ("cuda",))]
