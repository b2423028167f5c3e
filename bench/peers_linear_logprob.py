"""Peers of linear_logprobs, called as their own trainers do: (hidden [N, H], head [V, H], targets [N]) -> [N]."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench.record import installed

LogProb = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    package: str
    version: str
    """The release whose signature the call follows; another may take the same arguments to mean something else."""
    function: Callable[..., Any]
    needs_cuda: bool = True

    def why_not(self, device: str) -> str | None:
        if self.needs_cuda and device != "cuda":
            return f"{self.package} needs CUDA"
        command = f"pip install {self.package}=={self.version}"
        if (found := installed(self.package)) is None:
            return f"{self.package} is not installed; {command}"
        if found != self.version:
            return f"{self.package} {found} is installed, but its call here follows {self.version}; {command}"
        return None


def _from(module: str, name: str) -> Any:
    """Imported at the call: whoever lacks a peer runs the rest."""
    return getattr(importlib.import_module(module), name)


def pytorch(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = hidden @ weight.T
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide.log_softmax(1).gather(1, targets[:, None]).squeeze(1)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile of `function`, afresh: one case's variants must not count against another's recompile limit."""

    @functools.cache
    def made() -> Callable[..., Any]:
        torch.compiler.reset()
        return torch.compile(function, dynamic=False)

    return lambda *arguments: made()(*arguments)


def trl(hidden, weight, targets):
    chunk = _from("trl.trainer.utils", "_CHUNKED_LOGPROB_CHUNK_SIZE")  # what its trainers pass
    apply = _from("trl.kernels", "ChunkedLogProbFunction").apply
    return apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ())[0]


def liger(hidden, weight, targets):
    return -_from("liger_kernel.ops", "LigerFusedLinearScaledCrossEntropyFunction").apply(hidden, weight, targets, 1.0)


def verl(hidden, weight, targets):
    return _from("verl.utils.kernel.linear_cross_entropy", "linear_cross_entropy")(hidden, weight, targets, 1.0)[0]


def cce(hidden, weight, targets):
    return -_from("cut_cross_entropy", "linear_cross_entropy")(hidden, weight, targets, reduction="none")


def unsloth(hidden, weight, targets):
    return _from("unsloth_zoo.fused_losses.fused_linear", "fused_linear_logprobs")(hidden, weight, targets)


def liger_grpo(hidden, weight, targets, old, advantages):
    """The mean over sequences of each one's mean clipped loss; its log-probs stay inside."""
    sequences = len(advantages)
    loss = _from("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")(
        beta=0.0, compiled=False, use_ref_model=False, loss_type="grpo"
    )
    mask = torch.ones(sequences, len(targets) // sequences, device=hidden.device)
    rows = hidden.view(sequences, -1, hidden.shape[-1])
    return loss(rows, weight, targets.view_as(mask), mask, advantages, old_per_token_logps=old.view_as(mask))[0]


def quack_sum(hidden, weight, targets):
    """A scalar: it has no log-probs per token."""
    function = _from("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return -function(hidden, weight, targets, reduction="sum")


PEERS = {
    "trl": Peer("trl", "1.16.0", trl, needs_cuda=False),
    "liger": Peer("liger-kernel", "0.8.5", liger, needs_cuda=False),
    "verl": Peer("verl", "0.9.1", verl),
    "cce": Peer("cut-cross-entropy", "25.1.1", cce),
    "unsloth": Peer("unsloth-zoo", "2026.10.9", unsloth),
}
QUACK_SUM = Peer("quack-kernels", "0.6.5", quack_sum)
