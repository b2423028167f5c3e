"""The training loop: the map of the system.

records -> rollout (a prompt prefilled once for its G responses) -> rewards, components apart
        -> group advantages -> Selective Sample Buffer -> batch          stage.collect, no gradient
        -> hidden states -> response log-probs -> loss                   stage.loss
        -> backward -> clip -> optimizer -> log, evaluation, checkpoint  here
"""

from __future__ import annotations

import time

import torch
from torch import nn

from r1v2_fast.train.checkpoint import Checkpoints
from r1v2_fast.train.config import Optimizer
from r1v2_fast.train.context import Context
from r1v2_fast.train.evaluate import evaluate
from r1v2_fast.train.stages.base import Metrics, Stage


def run_stage(context: Context, stage: Stage, *, later: list[str]) -> None:
    """Train one stage from its newest checkpoint, or from the start."""
    config, recipe = stage.optimizer_config, context.recipe
    parameters = list(stage.named_parameters().values())
    optimizer = torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, foreach=True
    )
    checkpoints = Checkpoints(context.folder / "checkpoints")
    stage.prepare()
    done = checkpoints.load(stage, optimizer)
    context.log.rewind(stage.name, done, later)
    idle = 0
    context.log.start(stage.name, stage.steps, done)
    try:
        for step in range(done, stage.steps):
            metrics: Metrics = {}
            started = time.perf_counter()
            batch = stage.collect(step, metrics)
            if batch is None:
                idle += 1
                _explain_idle(context, stage, step, metrics, idle)
            else:
                idle = 0
                _update(stage, batch, parameters, optimizer, config, step, metrics)
            metrics["step_time"] = time.perf_counter() - started
            context.log.step(stage.name, step, metrics)
            if stage.trains_policy and (step + 1) % recipe.evaluation.every == 0 and step + 1 < stage.steps:
                evaluate_sets(context, stage.name, step + 1, records=recipe.evaluation.records)
            if (step + 1) % recipe.checkpoint.every == 0 and step + 1 < stage.steps:
                checkpoints.save(stage, optimizer, step + 1)
    finally:
        context.log.stop()


def _update(
    stage: Stage,
    batch,
    parameters: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    config: Optimizer,
    step: int,
    metrics: Metrics,
) -> None:
    rate = learning_rate(config, step, stage.steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss = stage.loss(batch, metrics)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    if not torch.isfinite(norm):
        raise RuntimeError(
            f"stage {stage.name}, step {step}: the gradient norm is {norm.item()}; the last checkpoint is intact"
        )
    if norm == 0:
        stage.context.log.say(
            f"[{stage.name} step {step}] the gradient is exactly 0: nothing reaches the parts that train. The adapter "
            "learns only from records with images.",
            once="zero gradient",
        )
    optimizer.step()
    stage.after_step()
    metrics.update({"loss": loss.detach(), "grad_norm": norm, "learning_rate": rate})


def learning_rate(config: Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then constant or linear to zero: a pure function of the step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.decay == "none":
        return config.lr
    return config.lr * (steps - step) / max(1, steps - config.warmup_steps)


def evaluate_sets(context: Context, stage: str, step: int, *, records: int | None) -> dict[str, float]:
    """Every evaluation set, logged as eval/<set>/<metric>."""
    metrics: dict[str, float] = {}
    for name, file in context.recipe.evaluation.sets.items():
        dataset = context.corpus.dataset(file)
        result = evaluate(context.policy, context.reader, dataset, context.recipe.evaluation, records=records)
        metrics |= {f"eval/{name}/{key}": value for key, value in result.metrics.items()}
        if records is None:
            for record, completion, right in zip(dataset.records[:24], result.completions, result.right, strict=False):
                context.log.sample(
                    stage=stage, step=step, set=name, id=record.id, prompt=record.prompt, images=dataset.image_keys(record),
                    completion=completion, answer=record.answer, right=right,
                )  # fmt: skip
    context.log.evaluation(stage, step, metrics)
    return metrics


def _explain_idle(context: Context, stage: Stage, step: int, metrics: Metrics, idle: int) -> None:
    """Users ask why loss or reward stays 0: say it in a plain sentence, the first time and then now and again."""
    if idle in (1, 10, 100):
        share = metrics.get("frac_reward_zero_std", 1.0)
        context.log.say(
            f"[{stage.name} step {step}] nothing to learn from: {share:.0%} of the groups have equal rewards in all their "
            f"responses and none is informative ({idle} such steps in a row). Harder prompts, more responses a prompt or "
            "a higher temperature help."
        )
