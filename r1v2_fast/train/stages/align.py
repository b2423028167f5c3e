"""Align: supervised warm start on the records' own responses. The toy has no pretrained weights; real models skip it."""

from __future__ import annotations

import torch

from r1v2_fast.data.collate import Batch, Sequence
from r1v2_fast.data.records import draw
from r1v2_fast.train.config import Align
from r1v2_fast.train.context import Context
from r1v2_fast.train.stages.base import Metrics, Stage


class AlignStage(Stage):
    name = "align"

    def __init__(self, context: Context, config: Align):
        super().__init__(context, config)
        self.batch_size = config.batch_size
        context.policy.train_parts(list(config.train))
        for record in self.dataset.records:
            if not isinstance(record.columns.get("response"), str):
                raise ValueError(
                    f"{record.where}, field 'response': align needs a string to learn, got {record.columns.get('response')!r}"
                )

    def collect(self, step: int, metrics: Metrics) -> Batch:
        context = self.context
        indices = draw(len(self.dataset), self.batch_size, seed=context.recipe.run.seed, step=step)
        records = [self.dataset[index] for index in indices]
        prompts = context.reader.prompts(self.dataset, records)
        sequences = [
            Sequence(prompt.ids, context.reader.encoder.response(record.columns["response"]), prompt.image_keys)
            for prompt, record in zip(prompts, records, strict=True)
        ]
        return context.reader.batch(sequences, context.device)

    def loss(self, batch: Batch, metrics: Metrics) -> torch.Tensor:
        output = self.context.policy.response_logprobs(batch, outputs=("is_top1",))
        assert output.is_top1 is not None
        metrics["mean_token_accuracy"] = output.is_top1.float().mean()
        metrics["num_tokens"] = len(output.logprobs)
        return -output.logprobs.mean()
