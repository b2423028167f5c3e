"""The training loop: the map of the system.

records -> rollout (a prompt prefilled once for its G responses) -> rewards, components apart
        -> group advantages -> Selective Sample Buffer -> samples        stage.collect, no gradient
        -> mini-batches -> micro-batches under a token budget            stage.mini_batches, batching
        -> hidden states -> response log-probs -> loss -> backward       stage.loss
        -> clip -> optimizer -> log, evaluation, checkpoint              here
"""

from __future__ import annotations

import time

import torch

from r1v2_fast.parallel.metrics import Mean
from r1v2_fast.stop import Stopped, StopRequest
from r1v2_fast.train.batching import fullest, tokens
from r1v2_fast.train.checkpoint import Checkpoints
from r1v2_fast.train.context import Context
from r1v2_fast.train.evaluate import evaluate_sets
from r1v2_fast.train.optimizer import Optimizer, learning_rate
from r1v2_fast.train.stages.base import Metrics, Stage


def run_stage(context: Context, stage: Stage, stop: StopRequest, *, later: list[str]) -> None:
    """Train one stage from its newest checkpoint, or from the start; the last step is a checkpoint too.

    raises  Stopped at a signal, with the step checkpointed
    """
    recipe, log, world = context.recipe, context.log, context.world
    optimizer = Optimizer(stage.model.parameters, stage.settings.optimizer, dtype=stage.model.dtype, world=world)
    checkpoints = Checkpoints(context.folder / "checkpoints", keep=recipe.checkpoint.keep, say=log.say, world=world)
    stage.prepare()
    done = checkpoints.load(stage, optimizer)
    log.rewind(stage.name, done, later, steps=stage.steps)
    if done < stage.steps:
        _rehearse(stage, optimizer)
    idle = 0
    log.start(stage.name, stage.steps, done)
    try:
        for step in range(done, stage.steps):
            metrics: Metrics = {}
            started = time.perf_counter()
            context.seed_globals(stage.name, step)
            samples = stage.collect(step, metrics)
            if world.any(bool(samples)):
                idle = 0
                _learn(stage, samples, optimizer, step, metrics)
            else:
                idle += 1
                _explain_idle(context, stage, step, metrics, idle)
            metrics["step_time"] = time.perf_counter() - started
            log.step(stage.name, step, metrics)
            after = step + 1
            if stage.trains_policy and after % recipe.evaluation.every == 0 and after < stage.steps:
                metrics = evaluate_sets(context, stage.name, after, recipe.evaluation.records)
                context.best.offer(context.policy, stage.name, after, metrics)
            signum = world.most(stop.signum)  # of whichever rank was told
            if after % recipe.checkpoint.every == 0 or after == stage.steps or signum:
                checkpoints.save(stage, optimizer, after)
            if signum:
                raise Stopped(f"stopped after step {after} of {stage.name}, checkpointed", signum)
    finally:
        log.stop()


def _learn(stage: Stage, samples: list, optimizer: Optimizer, step: int, metrics: Metrics) -> None:
    """The optimizer steps of one step's samples."""
    rate = learning_rate(stage.settings.optimizer, step, stage.steps)
    world = stage.context.world
    parts, mean = Mean(sums=("num_tokens", *stage.shares)), Mean(sums=())
    updates = 0
    for mini_batch in stage.mini_batches(samples, step):
        loss = torch.zeros((), dtype=torch.promote_types(stage.model.dtype, torch.float32), device=stage.context.device)
        whole = world.sums(stage.counts(mini_batch))
        for part in stage.context.joined(stage.model, stage.micro_batches(mini_batch), optimizer.backward):
            own: Metrics = {}
            loss += _add_gradient(stage, part, whole, optimizer, own)
            parts.add(own, weight=stage.weight(part), weights=stage.weights(part))
        norm = optimizer.step(rate)
        if optimizer.lost(norm):
            raise RuntimeError(
                f"stage {stage.name}, step {step}: the gradient norm is {norm.item()}; the last checkpoint is intact"
            )
        if norm == 0:
            stage.context.log.say(
                f"[{stage.name} step {step}] the gradient is exactly 0: no response had an advantage, or nothing reaches "
                "the parts that train. The adapter learns only from records with images.",
                once="zero gradient",
            )
        if norm.isfinite():
            stage.after_update()
        else:  # fp16 overflowed: the loss scale goes down, and nothing was updated
            stage.forget_update()
        mean.add({"loss": world.total(loss), "grad_norm": norm})
        updates += 1
    metrics.update({**parts.gathered(world).values(), **mean.values(), "learning_rate": rate, "updates": updates})


def _rehearse(stage: Stage, optimizer: Optimizer) -> None:
    """The largest forward and backward that the stage is expected to meet, thrown away: memory runs out now, not later."""
    largest = stage.largest()
    largest = largest[: -(-len(largest) // stage.context.world.size)]
    full = fullest(largest, stage.settings.micro_batch_tokens, packed=stage.context.reader.packing)
    for part in stage.context.joined(stage.model, [full], optimizer.backward):
        _add_gradient(stage, part, stage.counts(largest), optimizer, {})
    optimizer.adamw.zero_grad(set_to_none=True)
    stage.forget_update()


def _add_gradient(
    stage: Stage, part: list, whole: dict[str, float], optimizer: Optimizer, metrics: Metrics
) -> torch.Tensor:
    """The gradient of the part's share in the loss joins what has come before; returns the share."""
    try:
        share = stage.loss(part, whole, metrics)
        optimizer.backward(share)
    except torch.OutOfMemoryError as error:
        packed = stage.context.reader.packing
        raise RuntimeError(
            f"stage {stage.name}: out of memory in a forward and backward of {tokens(part, packed=packed)} "
            f"{'packed' if packed else 'padded'} tokens; "
            f"{stage.name}.micro_batch_tokens below that, {stage.name}.gradient_checkpointing=true or a smaller "
            "max_new_tokens help. The last checkpoint is intact"
        ) from error
    return share.detach()


def _explain_idle(context: Context, stage: Stage, step: int, metrics: Metrics, idle: int) -> None:
    """Users ask why loss or reward stays 0: say it in a plain sentence, the first time and then now and again."""
    if idle in (1, 10, 100):
        share = metrics.get("frac_reward_zero_std", 1.0)
        unscored = max((v for k, v in metrics.items() if k.endswith("/unscored")), default=0.0)
        context.log.say(
            f"[{stage.name} step {step}] nothing to learn from: {share:.0%} of the groups have equal rewards in all their "
            f"responses and none is informative ({idle} such steps in a row). Harder prompts, more responses a prompt or "
            "a higher temperature help." + (f" {unscored:.0%} of the responses got no score." if unscored else "")
        )
