"""MPO: preference + quality + generation over pairs, on responses sampled as training goes, or on ready pairs.

Source: R1V2 (arXiv 2504.16656) section 3.2; the reference is the policy as the stage found it. With the adapter alone
training, its copy is the reference: no second model is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from r1v2_fast import ops
from r1v2_fast.data.collate import Batch, Sequence
from r1v2_fast.data.records import draw
from r1v2_fast.models.freeze import snapshot, swapped
from r1v2_fast.train import config
from r1v2_fast.train.context import Context
from r1v2_fast.train.experience import Judge, collect, pairs_by_gap, reward_metrics
from r1v2_fast.train.stages.base import Metrics, Stage


@dataclass(frozen=True)
class Pairs:
    batch: Batch  # P chosen sequences, then their P rejected ones
    ref_logprobs: torch.Tensor  # [N], packed


class MPOStage(Stage):
    name = "mpo"

    def __init__(self, context: Context, config: config.MPO):
        super().__init__(context, config)
        self.config = config
        context.policy.train_parts(list(config.train))
        self.initial = snapshot(context.policy.parameters)
        self.shift = ops.RewardShift()
        self.temperature = config.sampling.temperature if config.sampling else 1.0
        self.judge = Judge(context, config.rewards) if config.sampling else None
        self._ready_logprobs: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._rewards: tuple[torch.Tensor, torch.Tensor] | None = None

    def prepare(self) -> None:
        """Reference log-probs of ready pairs, once, before training."""
        if self.config.sampling is not None:
            return
        steps = (draw(len(self.dataset), self.config.pairs, seed=self._seed, step=s) for s in range(self.steps))
        indices = sorted({index for step in steps for index in step})
        for start in range(0, len(indices), self.config.pairs):
            part = indices[start : start + self.config.pairs]
            batch = self._ready_batch(part)
            logprobs = self._reference(batch).split(batch.offsets.diff().tolist())
            for i, index in enumerate(part):
                self._ready_logprobs[index] = (logprobs[i], logprobs[len(part) + i])

    def collect(self, step: int, metrics: Metrics) -> Pairs | None:
        return self._ready(step) if self.judge is None else self._sampled(self.judge, step, metrics)

    def loss(self, pairs: Pairs, metrics: Metrics) -> torch.Tensor:
        logprobs = self.context.policy.response_logprobs(pairs.batch, temperature=self.temperature).logprobs
        output = ops.mpo_loss(
            logprobs,
            pairs.ref_logprobs,
            pairs.batch.offsets,
            beta=self.config.beta,
            weights=self.config.weights,
            delta=self.shift.delta,
            label_smoothing=self.config.label_smoothing,
            generation=self.config.generation,
        )
        chosen, rejected = output.chosen_rewards.detach(), output.rejected_rewards.detach()
        self._rewards = (chosen, rejected)
        metrics["rewards/chosen"] = chosen.mean()
        metrics["rewards/rejected"] = rejected.mean()
        metrics["rewards/accuracies"] = (chosen > rejected).float().mean()
        metrics["rewards/margins"] = (chosen - rejected).mean()
        metrics["mpo/preference"], metrics["mpo/quality"] = output.preference, output.quality
        metrics["mpo/generation"], metrics["mpo/delta"] = output.generation, self.shift.delta
        metrics["num_tokens"] = len(logprobs)
        return output.loss

    def after_step(self) -> None:
        assert self._rewards is not None
        self.shift.update(*self._rewards)

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        initial = {f"initial/{index}": value for index, value in enumerate(self.initial)}
        return initial, {"shift": self.shift.state_dict()}

    def load_state(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        self.initial = [tensors[f"initial/{index}"].to(self.context.device) for index in range(len(self.initial))]
        self.shift.load_state_dict(meta["shift"])

    @property
    def _seed(self) -> int:
        return self.context.recipe.run.seed

    @torch.no_grad()
    def _reference(self, batch: Batch) -> torch.Tensor:
        policy = self.context.policy
        with swapped(policy.parameters, self.initial):
            return policy.response_logprobs(batch, temperature=self.temperature).logprobs

    def _sampled(self, judge: Judge, step: int, metrics: Metrics) -> Pairs | None:
        assert self.config.sampling is not None
        experience = collect(self.context, judge, self.dataset, self.config.sampling, stage=self.name, step=step)
        metrics.update(reward_metrics(experience, judge.weights, self.config.sampling.max_new_tokens))
        totals = (experience.rewards_NR.nan_to_num() * judge.weights).sum(1)
        pairs = pairs_by_gap(
            totals, experience.group_size, min_gap=self.config.min_reward_gap, max_pairs=self.config.max_pairs
        )
        metrics["pairs"] = len(pairs)
        if not pairs:
            return None
        order = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        batch = self.context.reader.batch([experience.sequence(i) for i in order], self.context.device)
        return Pairs(batch, self._reference(batch))

    def _ready(self, step: int) -> Pairs:
        indices = draw(len(self.dataset), self.config.pairs, seed=self._seed, step=step)
        logprobs = [self._ready_logprobs[index] for index in indices]
        return Pairs(self._ready_batch(indices), torch.cat([c for c, _ in logprobs] + [r for _, r in logprobs]))

    def _ready_batch(self, indices: list[int]) -> Batch:
        records = [self.dataset[index] for index in indices]
        prompts = self.context.reader.prompts(self.dataset, records)
        sequences = []
        for side in ("chosen", "rejected"):
            for prompt, record in zip(prompts, records, strict=True):
                text = getattr(record, side)
                if text is None:
                    raise ValueError(f"{record.where}, field {side!r}: mpo on ready pairs needs it, got none")
                sequences.append(Sequence(prompt.ids, self.context.reader.encoder.response(text), prompt.image_keys))
        return self.context.reader.batch(sequences, self.context.device)
