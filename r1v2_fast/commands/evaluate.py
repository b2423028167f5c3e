"""r1v2-fast evaluate: greedy accuracy of a model folder on a file of records."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from r1v2_fast.commands.model import check_at_least, open_model
from r1v2_fast.config import Evaluation
from r1v2_fast.judge.reward import load_reward
from r1v2_fast.rollout.generation import LocalEngine
from r1v2_fast.train.context import Corpus
from r1v2_fast.train.evaluate import evaluate


def run(
    model: str,
    data: str,
    *,
    score: str,
    time_limit: float,
    on_nan: Literal["stop", "skip"],
    max_new_tokens: int,
    batch_size: int,
    records: int | None,
    root: str | None,
    allow_outside: bool,
    max_tiles: int | None,
    device: str,
) -> dict[str, float]:
    """The metrics of `train.evaluate` over the first `records` records."""
    check_at_least(1, records=records, batch_size=batch_size, max_new_tokens=max_new_tokens, max_tiles=max_tiles)
    check_at_least(0, time_limit=time_limit)
    load_reward(score)
    path = Path(data)
    corpus = Corpus(path.parent, root=root, allow_outside=allow_outside)
    dataset = corpus.dataset(path.name)
    policy, reader = open_model(model, corpus, device, max_tiles=max_tiles)
    settings = Evaluation(
        sets={path.stem: path.name}, batch_size=batch_size, max_new_tokens=max_new_tokens, score=score,
        time_limit=time_limit or None, on_nan=on_nan,
    )  # fmt: skip
    return evaluate(LocalEngine(policy), reader, dataset, settings, records=records).metrics
