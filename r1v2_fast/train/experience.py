"""Experience: sampled responses and what each reward says of them, components kept apart.

N = B x G responses of B prompts, R reward components.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch

from r1v2_fast.config import RewardTerm, Sampling
from r1v2_fast.data.collate import Sequence
from r1v2_fast.data.records import Dataset, Record, draw
from r1v2_fast.judge.panel import Panel
from r1v2_fast.judge.summary import reward_metrics
from r1v2_fast.rollout.engine import Prompt, Response
from r1v2_fast.train.batching import Single, micro_batches
from r1v2_fast.train.context import Context


@dataclass(frozen=True)
class Group:
    """A prompt and its G responses, on the rank that rolled them out."""

    prompt: Prompt
    responses: list[Response]  # G
    completions: list[str]  # G


@dataclass(frozen=True)
class Experience:
    """Of all ranks, but each knows its own groups alone."""

    records: list[Record]  # B
    own: list[Group | None]  # B, None where another rank's
    group_size: int
    lengths_N: torch.Tensor  # of the responses, int64
    finished_N: torch.Tensor  # bool
    rewards_NR: torch.Tensor  # fp32, NaN where unscorable
    names: list[str]  # R

    def here(self, i: int) -> bool:
        return self.own[i // self.group_size] is not None

    def group(self, i: int) -> Group:
        """Of response i, which is here."""
        group = self.own[i // self.group_size]
        assert group is not None, f"response {i} is another rank's"
        return group

    def record(self, i: int) -> Record:
        return self.records[i // self.group_size]

    def response(self, i: int) -> Response:
        return self.group(i).responses[i % self.group_size]

    def completion(self, i: int) -> str:
        return self.group(i).completions[i % self.group_size]

    def sequence(self, i: int) -> Sequence:
        prompt = self.group(i).prompt
        return Sequence(prompt.ids, self.response(i).ids, prompt.image_keys)

    def groups(self, indices: list[int]) -> Experience:
        """These groups alone."""
        size = self.group_size
        rows = [g * size + i for g in indices for i in range(size)]
        return Experience(
            [self.records[g] for g in indices],
            [self.own[g] for g in indices],
            size,
            self.lengths_N[rows],
            self.finished_N[rows],
            self.rewards_NR[rows],
            self.names,
        )

    def metrics(self, weights: torch.Tensor) -> dict[str, float]:
        return reward_metrics(
            self.rewards_NR, self.names, weights, self.group_size, lengths_N=self.lengths_N, finished_N=self.finished_N
        )

    def component(self, name: str) -> torch.Tensor:
        return self.rewards_NR[:, self.names.index(name)]


def panel(
    context: Context, terms: list[RewardTerm], budget: int | None, *, overlong: tuple[int, int] | None = None
) -> Panel:
    """The reward components of a stage, with the run's reward model where it has one, in micro-batches of `budget`."""
    model = context.reward_model

    @torch.no_grad()
    def model_scores(sequences: list[Sequence]) -> torch.Tensor:
        assert model is not None
        samples = [Single(sequence) for sequence in sequences]
        scores: dict[int, torch.Tensor] = {}
        parts = micro_batches(samples, budget, packed=context.reader.packing) if samples else []
        for part in context.joined(model, parts):
            batch = context.reader.batch([sample.sequence for sample in part], context.device)
            scores |= zip(map(id, part), model.scores(batch).cpu(), strict=True)
        return torch.stack([scores[id(sample)] for sample in samples]) if samples else torch.empty(0)

    scores = model_scores if model else None
    return Panel(terms, model_scores=scores, overlong=overlong, together=context.world.together)


def collect(
    context: Context, judge: Panel, dataset: Dataset, sampling: Sampling, *, stage: str, round: int
) -> Experience:
    """Draw the records of the run's `round`-th rollout of this stage, roll out G responses each, and score them.

    Each rank takes a run of the prompts; a response follows from its prompt's place among all, whichever rank samples it.
    """
    world, size = context.world, sampling.group_size
    indices = draw(len(dataset), sampling.prompts, seed=context.recipe.run.seed, step=round)
    records = [dataset[index] for index in indices]
    mine = range(len(records))[world.slice(len(records))]
    with world.together():
        prompts = context.reader.prompts(dataset, [records[g] for g in mine])
    context.engine.sync()
    with nullcontext() if context.sharded else world.together():  # sharded, sampling is collective itself
        responses = context.engine.generate(
            prompts,
            group_size=size,
            max_new_tokens=sampling.max_new_tokens,
            temperature=sampling.temperature,
            seeds=[context.seed(f"{stage}/rollout {g}", round) for g in mine],
        )
    completions = [context.reader.encoder.decode(response.ids) for response in responses]
    repeated = [records[g] for g in mine for _ in range(size)]
    each = [prompt for prompt in prompts for _ in range(size)]
    sequences = [Sequence(p.ids, r.ids, p.image_keys) for p, r in zip(each, responses, strict=True)]
    rewards_NR = judge(repeated, sequences, completions)
    lengths = torch.tensor([len(response.ids) for response in responses], dtype=torch.int64)
    finished = torch.tensor([response.finished for response in responses], dtype=torch.bool)
    lengths_N, finished_N, rewards_NR = map(torch.cat, zip(*world.gather((lengths, finished, rewards_NR)), strict=True))
    own: list[Group | None] = [None] * len(records)
    for g, prompt, start in zip(mine, prompts, range(0, len(responses), size), strict=True):
        own[g] = Group(prompt, responses[start : start + size], completions[start : start + size])
    return Experience(records, own, size, lengths_N, finished_N, rewards_NR, judge.names)


def joined(rounds: list[Experience]) -> Experience:
    """Several rollouts of one stage as one."""
    first = rounds[0]
    return Experience(
        [record for e in rounds for record in e.records],
        [group for e in rounds for group in e.own],
        first.group_size,
        torch.cat([e.lengths_N for e in rounds]),
        torch.cat([e.finished_N for e in rounds]),
        torch.cat([e.rewards_NR for e in rounds]),
        first.names,
    )
