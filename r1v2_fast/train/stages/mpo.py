"""MPO: preference + quality + generation over pairs, on responses sampled as training goes, or on ready pairs.

Source: R1V2 (arXiv 2504.16656) section 3.2; the reference is the policy as the stage found it. With the adapter alone
training, its copy is the reference: no second model is held.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from r1v2_fast import config, ops
from r1v2_fast.data.collate import Sequence
from r1v2_fast.data.records import draw
from r1v2_fast.judge.summary import pairs_by_gap
from r1v2_fast.parallel.stored import Stored
from r1v2_fast.train.batching import tokens
from r1v2_fast.train.context import Context
from r1v2_fast.train.experience import collect, panel
from r1v2_fast.train.stages.base import Metrics, Stage


@dataclass
class Pair:
    chosen: Sequence
    rejected: Sequence
    ref_logprobs: tuple[torch.Tensor, torch.Tensor] | None = None  # per token, of both sides

    @property
    def sequences(self) -> list[Sequence]:
        return [self.chosen, self.rejected]


class MPOStage(Stage[Pair]):
    name = "mpo"
    shares = ("mpo/preference", "mpo/quality", "mpo/generation")

    def __init__(self, context: Context, config: config.MPO):
        super().__init__(context, config, context.policy)
        self.config = config
        self.model.keep_reference()
        self.shift = ops.RewardShift()
        self.temperature = config.sampling.temperature if config.sampling else 1.0
        self.judge = panel(context, config.rewards, config.micro_batch_tokens) if config.sampling else None
        self._ready: dict[int, Pair] = {}
        self._rewards: list[tuple[torch.Tensor, torch.Tensor]] = []

    def prepare(self) -> None:
        """Reference log-probs of ready pairs, once, before training."""
        if self.config.sampling is not None:
            return
        indices = sorted({index for step in range(self.steps) for index in self._drawn(step)})
        for start in range(0, self.context.world.most(len(indices)), self.config.pairs):
            part = indices[start : start + self.config.pairs]
            pairs = self._pairs(part)
            self._add_reference(pairs)
            self._ready |= zip(part, pairs, strict=True)

    def collect(self, step: int, metrics: Metrics) -> list[Pair]:
        if self.judge is None:
            return [self._ready[index] for index in self._drawn(step)]
        assert self.config.sampling is not None
        experience = collect(self.context, self.judge, self.dataset, self.config.sampling, stage=self.name, round=step)
        metrics.update(experience.metrics(self.judge.weights))
        totals = (experience.rewards_NR * self.judge.weights).sum(1)  # NaN, unscored, is in no pair
        found = pairs_by_gap(
            totals, experience.group_size, min_gap=self.config.min_reward_gap, max_pairs=self.config.max_pairs
        )
        metrics["pairs"] = len(found)
        mine = [(chosen, rejected) for chosen, rejected in found if experience.here(chosen)]
        pairs = [Pair(experience.sequence(chosen), experience.sequence(rejected)) for chosen, rejected in mine]
        self._add_reference(pairs)
        return pairs

    def counts(self, samples: list[Pair]) -> dict[str, float]:
        return {**super().counts(samples), "chosen_tokens": float(sum(len(p.chosen.response_ids) for p in samples))}

    def weight(self, samples: list[Pair]) -> float:
        return len(samples)

    def largest(self) -> list[Pair]:
        sampling = self.config.sampling
        if sampling is None:
            packed = self.context.reader.packing
            pairs = sorted(self._ready.values(), key=lambda pair: -tokens([pair], packed=packed))
            return pairs[: self.config.pairs]
        sides = self.largest_sequences(sampling, self.config.max_pairs, sampling.prompts * self.config.max_pairs)
        zeros = torch.zeros(sampling.max_new_tokens)
        return [Pair(side, side, (zeros, zeros)) for side in sides]

    def loss(self, samples: list[Pair], whole: dict[str, float], metrics: Metrics) -> torch.Tensor:
        batch = self.context.reader.batch(_sides(samples), self.context.device)
        logprobs = self.context.policy.response_logprobs(batch, temperature=self.temperature).logprobs
        output = ops.mpo_loss(
            logprobs,
            _packed([pair.ref_logprobs for pair in samples]).to(logprobs.device),
            batch.offsets,
            beta=self.config.beta,
            weights=self.config.weights,
            delta=self._delta,
            label_smoothing=self.config.label_smoothing,
            generation=self.config.generation,
            normalizer=whole["samples"],
            generation_normalizer=whole["samples" if self.config.generation == "sequence" else "chosen_tokens"],
        )
        chosen, rejected = output.chosen_rewards.detach(), output.rejected_rewards.detach()
        self._rewards.append((chosen, rejected))
        metrics["rewards/chosen"] = chosen.mean()
        metrics["rewards/rejected"] = rejected.mean()
        metrics["rewards/accuracies"], metrics["rewards/margins"] = output.accuracy, output.margin
        metrics["mpo/preference"], metrics["mpo/quality"] = output.preference, output.quality
        metrics["mpo/generation"], metrics["mpo/delta"] = output.generation, self._delta
        metrics["num_tokens"] = len(logprobs)
        return output.loss

    def after_update(self) -> None:
        none = torch.empty(0, device=self.context.device)  # a rank without a pair joins the others' sum
        sides = list(zip(*self._rewards, strict=True)) or [(), ()]
        self.shift.update(*(torch.cat([none, *side]) for side in sides))
        self.forget_update()

    def forget_update(self) -> None:
        self._rewards.clear()

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return self.model.reference_state(), {"shift": self.shift.state_dict()}

    def load_state(self, tensors: Stored, metas: list[dict[str, Any]]) -> None:
        self.model.load_reference_state(tensors.like)
        self.shift.load_state_dict(metas[0]["shift"])

    @property
    def _delta(self) -> float | torch.Tensor:
        return self.shift.delta if self.config.shift == "running" else 0.0

    @property
    def _seed(self) -> int:
        return self.context.recipe.run.seed

    def _add_reference(self, pairs: list[Pair]) -> None:
        """The reference's log-probs of both sides of each pair."""
        with self.model.reference():
            logprobs = self.response_logprobs(pairs, temperature=self.temperature)
        for pair, (chosen, rejected) in zip(pairs, logprobs, strict=True):
            pair.ref_logprobs = (chosen, rejected)

    def _drawn(self, step: int) -> list[int]:
        """This rank's ready pairs of a step."""
        indices = draw(len(self.dataset), self.config.pairs, seed=self._seed, step=step)
        return indices[self.context.world.slice(len(indices))]

    def _pairs(self, indices: list[int]) -> list[Pair]:
        """Ready pairs of these records."""
        records = [self.dataset[index] for index in indices]
        prompts = self.context.reader.prompts(self.dataset, records)
        pairs = []
        for prompt, record in zip(prompts, records, strict=True):
            sides: list[Sequence] = []
            for side in ("chosen", "rejected"):
                text = getattr(record, side)
                if text is None:
                    raise ValueError(f"{record.where}, field {side!r}: mpo on ready pairs needs it, got none")
                ids = self.context.reader.encoder.response(text, where=record.where, field=side)
                sides.append(Sequence(prompt.ids, ids, prompt.image_keys))
            pairs.append(Pair(sides[0], sides[1]))
        return pairs


def _sides(pairs: list[Pair]) -> list[Sequence]:
    """All chosen sequences, then all rejected ones, as ops.mpo_loss takes them."""
    return [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]


def _packed(logprobs: list) -> torch.Tensor:
    return torch.cat([chosen for chosen, _ in logprobs] + [rejected for _, rejected in logprobs])
