"""Trainers' own losses on given log-probs, padded [B, T], as they call them: TRL's and verl's code, not their formulas."""

from __future__ import annotations

import functools
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F

from bench.peers_linear_logprob import Peer, _from


@functools.cache
def _trl_trainer(kind: str, level: str, sequences: int, length: int):
    """A GRPOTrainer without its __init__, whose model is log-probs that somebody else made."""
    base, config = _from("trl", "GRPOTrainer"), _from("trl", "GRPOConfig")
    ready_made = lambda self, *_, **__: (self.logprobs, self.entropies, None)  # noqa: E731
    made = {"__init__": lambda self: None, "_get_per_token_logps_and_entropies": ready_made}
    trainer = type("Trainer", (base,), made)()
    args = config(
        output_dir="unused", report_to=[], num_generations=sequences, per_device_train_batch_size=sequences, bf16=False,
        loss_type=kind, beta=0.0, max_completion_length=length, use_bias_correction_kl=False,
    )  # fmt: skip
    accelerator = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, num_processes=1, sync_gradients=True
    )
    for name, value in {
        "args": args, "loss_type": kind, "importance_sampling_level": level, "beta": 0.0, "epsilon_low": 0.2,
        "epsilon_high": 0.2, "off_policy_mask_threshold": None, "top_entropy_quantile": 1.0, "use_vllm": False,
        "aux_loss_enabled": False, "_entropy_bonus_enabled": False, "max_completion_length": length,
        "current_gradient_accumulation_steps": 1, "accelerator": accelerator, "model": SimpleNamespace(training=True),
    }.items():  # fmt: skip
        setattr(trainer, name, value)
    return trainer


def trl(kind: str, level: str, logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    trainer, device = _trl_trainer(kind, level, *logprobs.shape), logprobs.device
    trainer.logprobs, trainer.entropies = logprobs, torch.zeros_like(logprobs)
    trainer._metrics = {"train": defaultdict(list)}
    ones, none = (
        torch.ones_like(logprobs, dtype=torch.int64),
        torch.zeros(len(logprobs), 0, dtype=torch.int64, device=device),
    )
    return trainer._compute_loss(
        None,
        {
            "prompt_ids": none, "prompt_mask": none, "completion_ids": ones, "completion_mask": ones,
            "advantages": advantages, "old_per_token_logps": old, "num_items_in_batch": ones.sum(),
        },
    )  # fmt: skip


@functools.cache
def _verl_config():
    actor = _from("verl.workers.config", "ActorConfig")
    return actor(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=0.2)


def verl(loss: str, mode: str, logprobs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor) -> torch.Tensor:
    function = _from("verl.trainer.ppo.core_algos", "get_policy_loss_fn")(loss)
    ones = torch.ones_like(logprobs)
    return function(old, logprobs, advantages[:, None].expand_as(ones), ones, mode, _verl_config())[0]


def trl_dpo(
    logprobs_PT: torch.Tensor, reference_PT: torch.Tensor, mask: torch.Tensor, types: list[str], weights: list[float],
    *, beta: float = 0.1, label_smoothing: float = 0.0, log_sum_sq_probs: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, float]]:  # fmt: skip
    """DPOTrainer's own code, and what it logs, which it does not leave out: the stub's model hands out the log-probs."""
    zeros, same = torch.zeros_like(logprobs_PT), lambda value: value
    logged: dict[str, list] = defaultdict(list)
    outputs = SimpleNamespace(log_probs=logprobs_PT, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool())
    outputs.log_sum_sq_probs = log_sum_sq_probs
    accelerator = SimpleNamespace(device=mask.device, gather=same, gather_for_metrics=same)
    stub: Any = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, aux_loss_enabled=False, ld_alpha=None,
        precompute_ref_logps=True, f_divergence_type="reverse_kl", loss_types=types, loss_weights=weights, beta=beta,
        label_smoothing=label_smoothing, use_weighting=log_sum_sq_probs is not None, _metrics={"train": logged},
        _total_train_tokens=0, _tp_size=1,
    )  # fmt: skip
    chosen, rejected = reference_PT.sum(1).chunk(2)
    tokens = F.pad(mask.long(), (1, 0))  # behind a prompt of one
    batch = {"input_ids": tokens, "attention_mask": tokens, "completion_mask": tokens}
    batch |= {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
    loss = _from("trl.trainer.dpo_trainer", "DPOTrainer")._compute_loss(stub, lambda **_: outputs, batch, False)
    return loss, {name: values[-1] for name, values in logged.items()}


PEERS = {
    "trl": Peer("trl", "1.16.0", trl, needs_cuda=False),
    "verl": Peer("verl", "0.9.1", verl, needs_cuda=False),
}
