"""A run: its folder, its stages in order, and picking up where it was stopped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch

from r1v2_fast.atomic import write_folder
from r1v2_fast.config import Recipe
from r1v2_fast.judge.panel import REWARD_MODEL
from r1v2_fast.judge.reward import COMPARE, load_reward
from r1v2_fast.log import Log, Silent
from r1v2_fast.loggers import open_loggers
from r1v2_fast.models import lora
from r1v2_fast.models.policy import Backbone
from r1v2_fast.models.reward_model import RewardModel
from r1v2_fast.parallel.failure import named
from r1v2_fast.parallel.world import World, opened
from r1v2_fast.run_folder import claim, note_inputs
from r1v2_fast.stop import Stopped, StopRequest
from r1v2_fast.train.checkpoint import Checkpoints
from r1v2_fast.train.context import Context
from r1v2_fast.train.evaluate import evaluate_sets
from r1v2_fast.train.loop import run_stage
from r1v2_fast.train.stages.align import AlignStage
from r1v2_fast.train.stages.base import Stage
from r1v2_fast.train.stages.grpo import GRPOStage
from r1v2_fast.train.stages.mpo import MPOStage
from r1v2_fast.train.stages.reward import RewardStage
from r1v2_fast.train.stand_in import stand_in

STAGES: dict[str, Callable[[Context, Any], Stage]] = {
    stage.name: stage for stage in (AlignStage, RewardStage, MPOStage, GRPOStage)
}


def train(recipe: Recipe, *, resume: bool = False, log: Log | None = None) -> Path:
    """Run the recipe's stages; returns the run folder. A stage's product stands in stages/, the last policy in final/.

    raises  ValueError where the folder holds a run and resume is False, or another recipe's run; Stopped at a signal
    """
    checkpoints = Checkpoints(Path(recipe.run.folder) / "checkpoints")
    with opened(recipe.run.device, timeout=recipe.run.timeout) as world, named(world, checkpoints.newest):
        return _train(recipe, world, resume, log)


def _train(recipe: Recipe, world: World, resume: bool, log: Log | None) -> Path:
    folder = Path(recipe.run.folder)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    torch.zeros(1).exp_()  # PyTorch 2.13's first exp on several threads may err by 1e-4; one thread's does not
    log = log or (Log(folder) if world.first else Silent(folder))
    recipe = stand_in(recipe, log.say)
    world.once(lambda: claim(folder, recipe, resume=resume, say=log.say))
    if world.first:
        log.loggers = open_loggers(
            list(recipe.run.loggers), project="r1v2_fast", run=recipe.run.name, folder=folder,
            config=recipe.model_dump(mode="json"), resume=resume, warn=log.say,
        )  # fmt: skip
    steps = [getattr(recipe, name).steps for name in recipe.run.stages]
    log.first_step = dict(zip(recipe.run.stages, itertools.accumulate(steps, initial=0), strict=False))
    try:
        with StopRequest() as stop, _same_bits(world.device):
            context = Context(recipe, folder, log, world)
            try:
                _check(context)
                _stages(context, stop)
            finally:
                context.close()
    finally:
        log.close()
    return folder


@contextmanager
def _same_bits(device: torch.device) -> Iterator[None]:
    """On a CPU with several threads some of PyTorch's sums take another order in every process, unless told not to."""
    mode, deterministic = torch.get_deterministic_debug_mode(), cast(Any, torch.utils.deterministic)
    filled = deterministic.fill_uninitialized_memory
    if device.type == "cpu":
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = False  # it is for finding bugs, and costs time
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        deterministic.fill_uninitialized_memory = filled


def _check(context: Context) -> None:
    """Every stage's data, rewards and LoRA layers, and the rollout engine, before the first step: a typo must not wait.

    raises  ValueError; RuntimeError where the engine's log-probs are not the policy's
    """
    recipe = context.recipe
    context.open(None)
    files: list[Path] = []
    scored = [(context.corpus.dataset(file), recipe.evaluation.score) for file in recipe.evaluation.sets.values()]
    for section in (getattr(recipe, name) for name in recipe.run.stages):
        dataset = context.corpus.dataset(section.data)
        files.append(dataset.path)
        lora.layers(context.policy.root, section.lora)
        terms = getattr(section, "rewards", [])
        scored += [(dataset, term.function) for term in terms if term.function != REWARD_MODEL]
    for dataset, spec in scored:
        load_reward(spec)
        if spec in COMPARE:
            dataset.check_answers(spec)
    files += [dataset.path for dataset, _ in scored]
    files += [Path(spec.rpartition(":")[0]) for _, spec in scored if ".py:" in spec]
    context.world.once(lambda: note_inputs(context.folder / "inputs.json", files, context.log.say))
    context.engine.sync()
    dataset = context.corpus.dataset(next(iter(recipe.evaluation.sets.values())))
    context.engine.probe(context.reader.prompt(dataset, dataset[0]))


def _stages(context: Context, stop: StopRequest) -> None:
    recipe, folder, log, world = context.recipe, context.folder, context.log, context.world
    fresh = True
    for index, name in enumerate(recipe.run.stages):
        product = folder / "stages" / name
        if world.once(product.is_dir):  # written whole by an earlier start
            _open(context, name, product)
            fresh = False
            continue
        # a model that can answer is measured before it changes
        if fresh and name != "align" and not world.once(lambda: log.evaluated("start")):
            context.shard(context.policy)
            _report(context, "start", evaluate_sets(context, "start", 0, None))
            if context.sharded:  # by what trains, from here on
                context.open(context.opened)
        fresh = False
        stage = STAGES[name](context, getattr(recipe, name))
        run_stage(context, stage, stop, later=list(recipe.run.stages[index + 1 :]))
        stage.model.settle()
        if isinstance(stage, RewardStage):
            context.score_with(stage.model)
        else:
            metrics = evaluate_sets(context, name, stage.steps, None)
            context.best.offer(context.policy, name, stage.steps, metrics)
            _report(context, name, metrics)
        _write(context, product, stage.model)
        if index + 1 < len(recipe.run.stages):
            world.once(Checkpoints(folder / "checkpoints").clear)
            if context.sharded:  # each stage shards by what it trains; this one's shards go first
                del stage
                _open(context, name, product)
        if signum := world.most(stop.signum):
            raise Stopped(f"stopped after stage {name}", signum)
    _write(context, folder / "final", context.policy)


def _open(context: Context, stage: str, product: Path) -> None:
    """What `stage` made, for the stages behind it."""
    if stage != "reward":
        context.open(product)
        return
    device = torch.device("cpu") if context.sharded else context.device
    pixels, features = context.reader.pixels, context.policy.features.like()
    context.score_with(RewardModel.load(product, pixels, features, device=device))
    if context.sharded and context.policy.joins:
        context.open(context.opened)


def _write(context: Context, folder: Path, model: Backbone) -> None:
    state = model.gathered(keep=context.world.first)
    context.world.once(lambda: write_folder(folder, lambda partial: model.save(partial, state)))


def _report(context: Context, stage: str, metrics: dict[str, float]) -> None:
    for name in context.recipe.evaluation.sets:
        text = f"{stage:>7}  {name:<14} accuracy {metrics[f'eval/{name}/accuracy']:6.1%}"
        if f"eval/{name}/hallucination" in metrics:
            text += f"   hallucination {metrics[f'eval/{name}/hallucination']:6.1%}"
        context.log.say(text)
