"""The reward components of a stage, each called on all of a step's completions and kept apart.

N completions, R reward components.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from r1v2_fast.config import RewardTerm
from r1v2_fast.judge.reward import checked, load_reward, score
from r1v2_fast.judge.rules import soft_overlong

REWARD_MODEL = "reward_model"
OVERLONG = "overlong"


class Panel:
    """Rules, the user's functions, the reward model (`model_scores`) and DAPO's over-length penalty.

    overlong  (max_length, cache) in tokens: a component more, see `rules.soft_overlong`
    together  a context around each component's call: among several ranks, what one raises there all raise
    raises    ValueError where a term uses reward_model and there is none
    """

    def __init__(
        self,
        terms: list[RewardTerm],
        *,
        model_scores: Callable[[list], torch.Tensor] | None = None,
        overlong: tuple[int, int] | None = None,
        together: Callable[[], AbstractContextManager[None]] = nullcontext,
    ):
        self.terms = terms
        self.model_scores = model_scores
        self.overlong = overlong
        self.together = together
        self.functions = {t.name: load_reward(t.function) for t in terms if t.function != REWARD_MODEL}
        if len(self.functions) < len(terms) and model_scores is None:
            raise ValueError("a reward uses reward_model, but no reward stage ran before this one")

    @property
    def names(self) -> list[str]:
        return [term.name for term in self.terms] + [OVERLONG] * (self.overlong is not None)

    @property
    def weights(self) -> torch.Tensor:
        return torch.tensor([term.weight for term in self.terms] + [1.0] * (self.overlong is not None))

    def __call__(self, records: list, sequences: list, completions: list[str]) -> torch.Tensor:
        """Rewards [N, R], squashed but not weighted, NaN where unscorable; one record and sequence a completion."""
        where = [record.where for record in records]
        arguments = (*arguments_of(records, completions), where)
        values = []
        for term in self.terms:
            if term.function == REWARD_MODEL:
                assert self.model_scores is not None
                scores = self.model_scores(sequences).tolist()
                with self.together():
                    scores = checked(term.name, scores, completions, where, on_nan=term.on_nan)
            else:
                with self.together():
                    scores = self._scores(term, *arguments) if completions else []
            value = torch.tensor(scores)
            values.append(value.sigmoid() if term.squash == "sigmoid" else value)
        if self.overlong is not None:
            length, cache = self.overlong
            penalty = soft_overlong([len(s.response_ids) for s in sequences], max_length=length, cache=cache)
            values.append(torch.tensor(penalty))
        return torch.stack(values, 1)

    def _scores(self, term: RewardTerm, *arguments: Any) -> list[float]:
        return score(term.name, self.functions[term.name], *arguments, time_limit=term.time_limit, on_nan=term.on_nan)


def arguments_of(records: list, completions: list[str]) -> tuple[list, list[str], dict[str, list[Any]]]:
    """(prompts, completions, columns) as rewards take them: columns are `answer` and all further ones of any record."""
    names = dict.fromkeys(name for record in records for name in record.columns)
    columns = {name: [record.columns.get(name) for record in records] for name in names}
    return [r.prompt for r in records], completions, {**columns, "answer": [r.answer for r in records]}
