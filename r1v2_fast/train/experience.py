"""Experience: sampled responses and what each reward says of them, components kept apart.

N = B x G responses of B prompts, R reward components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1v2_fast.config import RewardTerm, Sampling
from r1v2_fast.data.collate import Sequence
from r1v2_fast.data.records import Dataset, Record, draw
from r1v2_fast.judge.panel import Panel
from r1v2_fast.rollout.engine import Prompt, Response
from r1v2_fast.train.batching import Single, micro_batches
from r1v2_fast.train.context import Context


@dataclass(frozen=True)
class Experience:
    records: list[Record]  # B
    prompts: list[Prompt]  # B
    group_size: int
    responses: list[Response]  # N
    completions: list[str]  # N
    rewards_NR: torch.Tensor  # fp32, NaN where unscorable
    names: list[str]  # R

    def record(self, i: int) -> Record:
        return self.records[i // self.group_size]

    def sequence(self, i: int) -> Sequence:
        prompt = self.prompts[i // self.group_size]
        return Sequence(prompt.ids, self.responses[i].ids, prompt.image_keys)

    def groups(self, indices: list[int]) -> Experience:
        """These groups alone."""
        size = self.group_size
        rows = [g * size + i for g in indices for i in range(size)]
        return Experience(
            [self.records[g] for g in indices],
            [self.prompts[g] for g in indices],
            size,
            [self.responses[i] for i in rows],
            [self.completions[i] for i in rows],
            self.rewards_NR[rows],
            self.names,
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
        for part in micro_batches(samples, budget, packed=context.reader.packing):
            batch = context.reader.batch([sample.sequence for sample in part], context.device)
            scores |= zip(map(id, part), model.scores(batch).cpu(), strict=True)
        return torch.stack([scores[id(sample)] for sample in samples])

    return Panel(terms, model_scores=model_scores if model else None, overlong=overlong)


def collect(
    context: Context, judge: Panel, dataset: Dataset, sampling: Sampling, *, stage: str, round: int
) -> Experience:
    """Draw the records of the run's `round`-th rollout of this stage, roll out G responses each, and score them."""
    indices = draw(len(dataset), sampling.prompts, seed=context.recipe.run.seed, step=round)
    records = [dataset[index] for index in indices]
    prompts = context.reader.prompts(dataset, records)
    context.engine.sync()
    responses = context.engine.generate(
        prompts,
        group_size=sampling.group_size,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seeds=[context.seed(f"{stage}/rollout {i}", round) for i in range(len(prompts))],
    )
    completions = [context.reader.encoder.decode(response.ids) for response in responses]
    repeated = [record for record in records for _ in range(sampling.group_size)]
    sequences = [
        Sequence(p.ids, responses[g * sampling.group_size + i].ids, p.image_keys)
        for g, p in enumerate(prompts)
        for i in range(sampling.group_size)
    ]
    rewards_NR = judge(repeated, sequences, completions)
    return Experience(records, prompts, sampling.group_size, responses, completions, rewards_NR, judge.names)


def joined(rounds: list[Experience]) -> Experience:
    """Several rollouts of one stage as one."""
    first = rounds[0]
    return Experience(
        [record for e in rounds for record in e.records],
        [prompt for e in rounds for prompt in e.prompts],
        first.group_size,
        [response for e in rounds for response in e.responses],
        [completion for e in rounds for completion in e.completions],
        torch.cat([e.rewards_NR for e in rounds]),
        first.names,
    )


def pairs_by_gap(totals_N: torch.Tensor, group_size: int, *, min_gap: float, max_pairs: int) -> list[tuple[int, int]]:
    """(chosen, rejected) of each group with a reward gap above `min_gap`, the widest gaps first."""
    pairs = []
    for start in range(0, len(totals_N), group_size):
        values = totals_N[start : start + group_size].tolist()
        gaps = [
            (values[i] - values[j], start + i, start + j)
            for i in range(group_size)
            for j in range(group_size)
            if values[i] - values[j] > min_gap
        ]
        gaps.sort(key=lambda gap: -gap[0])
        pairs += [(chosen, rejected) for _, chosen, rejected in gaps[:max_pairs]]
    return pairs


def reward_metrics(experience: Experience, weights: torch.Tensor, max_new_tokens: int) -> dict[str, float]:
    """TRL's names: reward, reward_std, rewards/<name>/mean|std, completions/*."""
    totals = (experience.rewards_NR.nan_to_num() * weights).sum(1)
    scored = experience.rewards_NR.isfinite().any(1)
    groups = totals.view(-1, experience.group_size)
    metrics = {"reward": totals[scored].mean().item(), "reward_std": groups.std(1).mean().item()}
    metrics["frac_reward_zero_std"] = ((groups.amax(1) - groups.amin(1)) == 0).float().mean().item()
    for index, name in enumerate(experience.names):
        values = experience.rewards_NR[:, index]
        values = values[values.isfinite()]
        metrics[f"rewards/{name}/mean"] = values.mean().item()
        metrics[f"rewards/{name}/std"] = values.std().item()
        if len(values) < len(experience.rewards_NR):
            metrics[f"rewards/{name}/unscored"] = 1 - len(values) / len(experience.rewards_NR)
    lengths = torch.tensor([len(response.ids) for response in experience.responses], dtype=torch.float32)
    finished = torch.tensor([response.finished for response in experience.responses])
    metrics["completions/mean_length"] = lengths.mean().item()
    metrics["completions/min_length"] = lengths.min().item()
    metrics["completions/max_length"] = lengths.max().item()
    metrics["completions/clipped_ratio"] = 1 - finished.float().mean().item()
    if finished.any():
        metrics["completions/mean_terminated_length"] = lengths[finished].mean().item()
    return metrics
