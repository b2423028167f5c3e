"""What the loop asks of a stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

import torch

from r1v2_fast import config
from r1v2_fast.data.collate import Sequence
from r1v2_fast.data.layouts import text_of
from r1v2_fast.data.records import Record
from r1v2_fast.models.policy import Backbone
from r1v2_fast.parallel.stored import Stored
from r1v2_fast.rollout.engine import Prompt
from r1v2_fast.train.batching import Sample, micro_batches
from r1v2_fast.train.context import Context

Metrics = dict[str, Any]  # floats, or device tensors that the log reads at the end of the step
S = TypeVar("S", bound=Sample)


class Stage(Generic[S]):
    """A stage of training; subclasses say which samples a step trains on and what the loss on some of them is.

    Among several ranks, samples are this rank's own, and `whole` counts all ranks' mini-batch.
    """

    name: str
    trains_policy = True
    shares: tuple[str, ...] = ()  # metrics that a loss on some samples gives as shares of the whole

    def __init__(self, context: Context, config: config.Stage, model: Backbone):
        self.context = context
        self.settings = config
        self.steps = config.steps
        self.model = model
        self.dataset = context.corpus.dataset(config.data)
        if context.reward_model is not None and "vision" in {*config.train, *config.lora}:
            context.reward_model.own_tower()
        model.train_parts(list(config.train), config.lora, seed=context.recipe.run.seed)
        model.checkpointing = config.gradient_checkpointing
        context.shard(model)

    def prepare(self) -> None:
        """Work before the first step, such as reference log-probs; the initial parameters are in place."""

    def collect(self, step: int, metrics: Metrics) -> list[S]:
        """This step's samples, made without gradients; none where there is nothing to learn from. Metrics are all ranks'."""
        raise NotImplementedError

    def mini_batches(self, samples: list[S], step: int) -> Iterator[list[S]]:
        """What each optimizer step of this step trains on."""
        yield samples

    def counts(self, samples: list[S]) -> dict[str, float]:
        """What losses are divided by; the counts of parts, on whatever rank, add up to the whole's."""
        return {"samples": float(len(samples)), "tokens": float(response_tokens(samples))}

    def loss(self, samples: list[S], whole: dict[str, float], metrics: Metrics) -> torch.Tensor:
        """The share that `samples` have in the loss of a mini-batch with the counts `whole`: shares add up exactly."""
        raise NotImplementedError

    def largest(self) -> list[S]:
        """The samples of the largest step that this stage can meet, to see whether it fits into memory."""
        raise NotImplementedError

    def weight(self, samples: list[S]) -> float:
        """What the metrics of a loss on `samples` are means over: their response tokens."""
        return response_tokens(samples)

    def weights(self, samples: list[S]) -> dict[str, float]:
        """The same of metrics that are means over something else, by name."""
        return {}

    def largest_sequences(self, sampling: config.Sampling, per_prompt: int, count: int) -> list[Sequence]:
        """`count` responses that use all of max_new_tokens, `per_prompt` to each of the longest prompts."""
        response = [self.context.policy.tokenizer.eos_token_id] * sampling.max_new_tokens
        prompts = self.longest_prompts(-(-count // per_prompt))
        sequences = [Sequence(prompt.ids, response, prompt.image_keys) for prompt in prompts for _ in range(per_prompt)]
        return sequences[:count]

    def longest_prompts(self, count: int) -> list[Prompt]:
        """The longest by either of two estimates, of a token a character and of one in four; only those are encoded."""
        reader = self.context.reader
        found: dict[str, Record] = {}
        for tokens in (1.0, 0.25):
            estimates = [(reader.image_tokens(r) + tokens * len(text_of(r.prompt)), r) for r in self.dataset.records]
            found |= {r.id: r for _, r in sorted(estimates, key=lambda pair: -pair[0])[:count]}
        longest = sorted(reader.prompts(self.dataset, list(found.values())), key=lambda prompt: -len(prompt.ids))
        return (longest * -(-count // len(longest)))[:count]

    def micro_batches(self, samples: list[S]) -> list[list[S]]:
        """What each forward and backward of an optimizer step takes."""
        if not samples:
            return []
        return micro_batches(samples, self.settings.micro_batch_tokens, packed=self.context.reader.packing)

    @torch.no_grad()
    def response_logprobs(self, samples: list[S], *, temperature: float) -> list[list[torch.Tensor]]:
        """Per-token log-probs of each sequence of each sample, without gradient, in micro-batches; on the CPU."""
        found: dict[int, list[torch.Tensor]] = {}
        for part in self.context.joined(self.context.policy, self.micro_batches(samples)):
            batch = self.context.reader.batch([s for sample in part for s in sample.sequences], self.context.device)
            logprobs = self.context.policy.response_logprobs(batch, temperature=temperature).logprobs
            pieces = iter(logprobs.cpu().split(batch.offsets.diff().tolist()))
            found |= {id(sample): [next(pieces) for _ in sample.sequences] for sample in part}
        return [found[id(sample)] for sample in samples]

    def after_update(self) -> None:
        """Once the optimizer has stepped."""

    def forget_update(self) -> None:
        """Drop what losses left behind for `after_update`: they were a rehearsal."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a checkpoint must hold besides parameters and optimizer: tensors, and JSON values of this rank."""
        return {}, {}

    def load_state(self, tensors: Stored, metas: list[dict[str, Any]]) -> None:
        """What `state` gave on all the ranks that saved, however many."""


def response_tokens(samples: Iterable[Sample]) -> int:
    return sum(len(sequence.response_ids) for sample in samples for sequence in sample.sequences)
