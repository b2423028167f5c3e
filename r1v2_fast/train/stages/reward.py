"""Reward: a Bradley-Terry reward model on pairs sampled from the aligned policy, -log sigmoid(s_chosen - s_rejected).

Source: Skywork-VL Reward (arXiv 2505.07263): vision tower frozen; adapter, language model and head train.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from r1v2_fast.data.collate import Batch
from r1v2_fast.models.reward_model import RewardModel
from r1v2_fast.train import config
from r1v2_fast.train.context import Context
from r1v2_fast.train.experience import Judge, collect, pairs_by_gap, reward_metrics
from r1v2_fast.train.stages.base import Metrics, Stage


class RewardStage(Stage):
    name = "reward"
    trains_policy = False

    def __init__(self, context: Context, config: config.Reward):
        super().__init__(context, config)
        self.config = config
        context.policy.train_parts([])
        self.judge = Judge(context, config.rewards)
        self.model = RewardModel.from_policy(context.policy)
        self.model.train_parts(list(config.train))

    def named_parameters(self) -> dict[str, nn.Parameter]:
        backbone = {f"backbone.{n}": p for n, p in self.model.internvl.named_parameters() if p.requires_grad}
        return {**backbone, **{f"head.{n}": p for n, p in self.model.head.named_parameters()}}

    def collect(self, step: int, metrics: Metrics) -> Batch | None:
        experience = collect(self.context, self.judge, self.dataset, self.config.sampling, stage=self.name, step=step)
        metrics.update(reward_metrics(experience, self.judge.weights, self.config.sampling.max_new_tokens))
        totals = (experience.rewards_NR.nan_to_num() * self.judge.weights).sum(1)
        pairs = pairs_by_gap(totals, experience.group_size, min_gap=0.0, max_pairs=self.config.max_pairs)
        metrics["pairs"] = len(pairs)
        if not pairs:
            return None
        order = [chosen for chosen, _ in pairs] + [rejected for _, rejected in pairs]
        return self.context.reader.batch([experience.sequence(i) for i in order], self.context.device)

    def loss(self, batch: Batch, metrics: Metrics) -> torch.Tensor:
        chosen, rejected = self.model.scores(batch).chunk(2)
        metrics["rewards/accuracies"] = (chosen > rejected).float().mean()
        metrics["rewards/margins"] = (chosen - rejected).mean()
        return -F.logsigmoid(chosen - rejected).mean()

    def save(self, folder: Any) -> None:
        self.model.save(folder)
