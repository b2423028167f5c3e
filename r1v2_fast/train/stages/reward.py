"""Reward: a Bradley-Terry reward model on pairs sampled from the aligned policy, -log sigmoid(s_chosen - s_rejected).

Source: Skywork-VL Reward (arXiv 2505.07263): vision tower frozen; adapter, language model and head train.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from r1v2_fast import config
from r1v2_fast.data.collate import Sequence
from r1v2_fast.judge.summary import pairs_by_gap
from r1v2_fast.models.reward_model import RewardModel
from r1v2_fast.train.context import Context
from r1v2_fast.train.experience import collect, panel
from r1v2_fast.train.stages.base import Metrics, Stage


@dataclass(frozen=True)
class Pair:
    chosen: Sequence
    rejected: Sequence

    @property
    def sequences(self) -> list[Sequence]:
        return [self.chosen, self.rejected]


class RewardStage(Stage[Pair]):
    name = "reward"
    trains_policy = False
    model: RewardModel

    def __init__(self, context: Context, config: config.Reward):
        model = RewardModel.from_policy(context.policy)
        if "vision" in {*config.train, *config.lora}:
            model.own_tower()
        super().__init__(context, config, model)
        context.shard(context.policy)
        self.config = config
        self.judge = panel(context, config.rewards, config.micro_batch_tokens)

    def collect(self, step: int, metrics: Metrics) -> list[Pair]:
        experience = collect(self.context, self.judge, self.dataset, self.config.sampling, stage=self.name, round=step)
        metrics.update(experience.metrics(self.judge.weights))
        totals = (experience.rewards_NR * self.judge.weights).sum(1)  # NaN, unscored, is in no pair
        pairs = pairs_by_gap(totals, experience.group_size, min_gap=0.0, max_pairs=self.config.max_pairs)
        metrics["pairs"] = len(pairs)
        mine = [(chosen, rejected) for chosen, rejected in pairs if experience.here(chosen)]
        return [Pair(experience.sequence(chosen), experience.sequence(rejected)) for chosen, rejected in mine]

    def weight(self, samples: list[Pair]) -> float:
        return len(samples)

    def largest(self) -> list[Pair]:
        sampling = self.config.sampling
        sides = self.largest_sequences(sampling, self.config.max_pairs, sampling.prompts * self.config.max_pairs)
        return [Pair(side, side) for side in sides]

    def loss(self, samples: list[Pair], whole: dict[str, float], metrics: Metrics) -> torch.Tensor:
        sequences = [pair.chosen for pair in samples] + [pair.rejected for pair in samples]
        chosen, rejected = self.model.scores(self.context.reader.batch(sequences, self.context.device)).chunk(2)
        metrics["rewards/accuracies"] = (chosen > rejected).float().mean()
        metrics["rewards/margins"] = (chosen - rejected).mean()
        metrics["num_tokens"] = sum(len(s.response_ids) for s in sequences)
        return -F.logsigmoid(chosen - rejected).sum() / whole["samples"]
