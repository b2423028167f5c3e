"""Align: supervised warm start on the records' own responses. The toy has no pretrained weights; real models skip it."""

from __future__ import annotations

import torch

from r1v2_fast import config
from r1v2_fast.data.collate import Sequence
from r1v2_fast.data.records import Record, draw
from r1v2_fast.rollout.engine import Prompt
from r1v2_fast.train.batching import Single
from r1v2_fast.train.context import Context
from r1v2_fast.train.stages.base import Metrics, Stage


class AlignStage(Stage[Single]):
    name = "align"

    def __init__(self, context: Context, config: config.Align):
        super().__init__(context, config, context.policy)
        self.batch_size = config.batch_size
        for record in self.dataset.records:
            if not isinstance(record.columns.get("response"), str):
                raise ValueError(
                    f"{record.where}, field 'response': align needs a string to learn, got {record.columns.get('response')!r}"
                )

    def collect(self, step: int, metrics: Metrics) -> list[Single]:
        indices = draw(len(self.dataset), self.batch_size, seed=self.context.recipe.run.seed, step=step)
        records = [self.dataset[index] for index in indices[self.context.world.slice(len(indices))]]
        prompts = self.context.reader.prompts(self.dataset, records)
        return [self._example(prompt, record) for prompt, record in zip(prompts, records, strict=True)]

    def largest(self) -> list[Single]:
        record = max(self.dataset.records, key=lambda record: len(record.columns["response"]))
        return [self._example(prompt, record) for prompt in self.longest_prompts(self.batch_size)]

    def _example(self, prompt: Prompt, record: Record) -> Single:
        response = self.context.reader.encoder.response(record.columns["response"], where=record.where)
        return Single(Sequence(prompt.ids, response, prompt.image_keys))

    def loss(self, samples: list[Single], whole: dict[str, float], metrics: Metrics) -> torch.Tensor:
        batch = self.context.reader.batch([sample.sequence for sample in samples], self.context.device)
        output = self.context.policy.response_logprobs(batch, outputs=("is_top1",))
        assert output.is_top1 is not None
        metrics["mean_token_accuracy"] = output.is_top1.float().mean()
        metrics["num_tokens"] = len(output.logprobs)
        return -output.logprobs.sum() / whole["tokens"]
