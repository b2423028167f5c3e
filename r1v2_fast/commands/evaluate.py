"""r1v2-fast evaluate: greedy accuracy of a model folder on a file of records."""

from __future__ import annotations

from pathlib import Path

from r1v2_fast.commands.model import open_model
from r1v2_fast.config import Evaluation
from r1v2_fast.train.context import Corpus
from r1v2_fast.train.evaluate import evaluate


def run(
    model: str, data: str, *, score: str, max_new_tokens: int, batch_size: int, records: int | None, device: str
) -> dict[str, float]:
    """The metrics of `train.evaluate` over the first `records` records."""
    path = Path(data)
    corpus = Corpus(path.parent)
    policy, reader = open_model(model, corpus, device)
    settings = Evaluation(
        sets={path.stem: path.name}, batch_size=batch_size, max_new_tokens=max_new_tokens, score=score
    )
    return evaluate(policy, reader, corpus.dataset(path.name), settings, records=records).metrics
