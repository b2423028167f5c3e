"""Experience: sampled responses and what each reward says of them, components kept apart.

N = B x G responses of B prompts, R reward components.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1v2_fast.data.collate import Sequence
from r1v2_fast.data.records import Dataset, Record, draw
from r1v2_fast.judge.reward import load_reward, score
from r1v2_fast.train.config import RewardTerm, Sampling
from r1v2_fast.train.context import Context
from r1v2_fast.train.rollout import Prompt, Response, rollout

REWARD_MODEL = "reward_model"


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

    def component(self, name: str) -> torch.Tensor:
        return self.rewards_NR[:, self.names.index(name)]


class Judge:
    """The reward components of a stage."""

    def __init__(self, context: Context, terms: list[RewardTerm]):
        self.context = context
        self.terms = terms
        self.functions = {t.name: load_reward(t.function) for t in terms if t.function != REWARD_MODEL}
        if len(self.functions) < len(terms) and context.reward_model is None:
            raise ValueError("a reward uses reward_model, but no reward stage ran before this one")

    @property
    def names(self) -> list[str]:
        return [term.name for term in self.terms]

    @property
    def weights(self) -> torch.Tensor:
        return torch.tensor([term.weight for term in self.terms])

    def __call__(self, records: list[Record], sequences: list[Sequence], completions: list[str]) -> torch.Tensor:
        """Rewards [N, R], squashed but not weighted; `records` has one entry a completion."""
        columns: dict[str, list] = {"answer": [r.answer for r in records]}
        for name in records[0].columns:
            columns[name] = [record.columns.get(name) for record in records]
        prompts = [r.prompt if isinstance(r.prompt, str) else str(r.prompt) for r in records]
        ids = [record.id for record in records]
        values = []
        for term in self.terms:
            if term.function == REWARD_MODEL:
                value = self._model_scores(sequences)
            else:
                function = self.functions[term.name]
                value = torch.tensor(score(term.name, function, prompts, completions, columns, ids))
            values.append(value.sigmoid() if term.squash == "sigmoid" else value)
        return torch.stack(values, 1)

    @torch.no_grad()
    def _model_scores(self, sequences: list[Sequence]) -> torch.Tensor:
        assert self.context.reward_model is not None
        return self.context.reward_model.scores(self.context.reader.batch(sequences, self.context.device)).cpu()


def collect(
    context: Context, judge: Judge, dataset: Dataset, sampling: Sampling, *, stage: str, step: int
) -> Experience:
    """Draw this step's records, roll out G responses each, and score them."""
    indices = draw(len(dataset), sampling.prompts, seed=context.recipe.run.seed, step=step)
    records = [dataset[index] for index in indices]
    prompts = context.reader.prompts(dataset, records)
    responses = rollout(
        context.policy,
        prompts,
        group_size=sampling.group_size,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        generator=context.generator(stage, step),
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
    groups = totals.view(-1, experience.group_size)
    metrics = {"reward": totals.mean().item(), "reward_std": groups.std(1).mean().item()}
    metrics["frac_reward_zero_std"] = ((groups.amax(1) - groups.amin(1)) == 0).float().mean().item()
    for index, name in enumerate(experience.names):
        values = experience.rewards_NR[:, index]
        values = values[values.isfinite()]
        metrics[f"rewards/{name}/mean"] = values.mean().item()
        metrics[f"rewards/{name}/std"] = values.std().item()
    lengths = torch.tensor([len(response.ids) for response in experience.responses], dtype=torch.float32)
    finished = torch.tensor([response.finished for response in experience.responses])
    metrics["completions/mean_length"] = lengths.mean().item()
    metrics["completions/min_length"] = lengths.min().item()
    metrics["completions/max_length"] = lengths.max().item()
    metrics["completions/clipped_ratio"] = 1 - finished.float().mean().item()
    if finished.any():
        metrics["completions/mean_terminated_length"] = lengths[finished].mean().item()
    return metrics
