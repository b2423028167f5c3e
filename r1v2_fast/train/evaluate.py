"""Evaluation: greedy answers to held-out records, the share that is right, and hallucination where it can be told."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

from r1v2_fast.config import Evaluation
from r1v2_fast.data.records import Dataset
from r1v2_fast.judge import hallucination
from r1v2_fast.judge.panel import arguments_of
from r1v2_fast.judge.reward import load_reward, score
from r1v2_fast.judge.rules import think_format
from r1v2_fast.parallel.world import ALONE, World
from r1v2_fast.rollout.engine import Engine
from r1v2_fast.train.context import Context, Reader


class Result(NamedTuple):
    metrics: dict[str, float]
    completions: list[str]
    right: list[bool]


@torch.no_grad()
def evaluate(
    engine: Engine,
    reader: Reader,
    dataset: Dataset,
    config: Evaluation,
    *,
    records: int | None = None,
    world: World = ALONE,
) -> Result:
    """accuracy of the answers that could be scored, and format; hallucination, overall and among right and wrong answers,
    for records with `digits`; the shares that were cut short and that were not scored. Ranks answer a run of records each.
    """
    chosen = dataset.records[:records]
    completions: list[str] = []
    finished: list[bool] = []
    own = chosen[world.slice(len(chosen))]
    for start in range(0, world.most(len(own)), config.batch_size):
        with world.together():
            prompts = reader.prompts(dataset, own[start : start + config.batch_size])
        responses = engine.generate(prompts, group_size=1, max_new_tokens=config.max_new_tokens, temperature=0.0)
        finished += [response.finished for response in responses]
        completions += [reader.encoder.decode(response.ids) for response in responses]
    completions, finished = world.concatenate(completions), world.concatenate(finished)
    arguments = arguments_of(chosen, completions)
    where = [record.where for record in chosen]
    function = load_reward(config.score)
    rule = functools.partial(score, time_limit=config.time_limit, on_nan=config.on_nan)
    scores = world.once(lambda: rule(config.score, function, *arguments, where))
    unscored = sum(map(math.isnan, scores))
    right = [value >= 1.0 for value in scores]
    metrics = {
        "accuracy": sum(right) / (len(right) - unscored) if unscored < len(right) else math.nan,
        "format": sum(think_format(arguments[0], completions)) / len(right),
        "records": float(len(right)),
        "unscored": unscored / len(right),
        "clipped_ratio": 1 - sum(finished) / len(right),
    }
    if all(hallucination.readable(record.columns.get("digits")) for record in chosen):
        metrics |= hallucination.rates(completions, [record.columns["digits"] for record in chosen], right)
    return Result(metrics, completions, right)


def evaluate_sets(context: Context, stage: str, step: int, records: int | None) -> dict[str, float]:
    """Every evaluation set, logged as eval/<set>/<metric>."""
    context.seed_globals(f"{stage}/evaluation", step)  # a score of the user's may draw from them
    context.engine.sync()
    metrics: dict[str, float] = {}
    for name, file in context.recipe.evaluation.sets.items():
        dataset = context.corpus.dataset(file)
        settings, world = context.recipe.evaluation, context.world
        result = evaluate(context.engine, context.reader, dataset, settings, records=records, world=world)
        metrics |= {f"eval/{name}/{key}": value for key, value in result.metrics.items()}
        if records is None:
            for record, completion, right in zip(dataset.records[:24], result.completions, result.right, strict=False):
                context.log.sample(
                    stage=stage, step=step, set=name, id=record.id, prompt=record.prompt, images=dataset.image_keys(record),
                    completion=completion, answer=record.answer, right=right,
                )  # fmt: skip
    context.log.evaluation(stage, step, metrics)
    return metrics
