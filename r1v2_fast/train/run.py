"""A run: its folder, its stages in order, and picking up where it was stopped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import yaml

from r1v2_fast.models import load
from r1v2_fast.models.reward_model import RewardModel
from r1v2_fast.train.checkpoint import Checkpoints
from r1v2_fast.train.config import Recipe
from r1v2_fast.train.context import Context
from r1v2_fast.train.log import Log
from r1v2_fast.train.loop import evaluate_sets, run_stage
from r1v2_fast.train.stages.align import AlignStage
from r1v2_fast.train.stages.base import Stage
from r1v2_fast.train.stages.grpo import GRPOStage
from r1v2_fast.train.stages.mpo import MPOStage
from r1v2_fast.train.stages.reward import RewardStage

STAGES: dict[str, type[Stage]] = {stage.name: stage for stage in (AlignStage, RewardStage, MPOStage, GRPOStage)}


def train(recipe: Recipe, *, resume: bool = False, log: Log | None = None) -> Path:
    """Run the recipe's stages; returns the run folder. A stage's product stands in stages/, the last policy in final/.

    raises  ValueError where the folder holds a run and resume is False, or another recipe's run
    """
    folder = Path(recipe.run.folder)
    _claim(folder, recipe, resume)
    if recipe.run.threads is not None:
        torch.set_num_threads(recipe.run.threads)
    log = log or Log(folder)
    context = Context(recipe, folder, log)
    loaded = context.initial()
    fresh = True
    for index, name in enumerate(recipe.run.stages):
        product = folder / "stages" / name
        if product.is_dir():  # written whole by an earlier start
            if name == "reward":
                context.reward_model = RewardModel.load(product, context.reader.pixels, device=context.device)
            else:
                loaded = load.from_folder(product, dtype=getattr(torch, recipe.model.dtype))
                context.use(loaded)
            fresh = False
            continue
        if fresh:
            context.use(loaded)
            if name != "align":  # a model that can answer already is measured before it changes
                log.rewind(name, -1, ["start"])
                _report(context, "start", evaluate_sets(context, "start", 0, records=None))
            fresh = False
        stage = STAGES[name](context, getattr(recipe, name))
        run_stage(context, stage, later=list(recipe.run.stages[index + 1 :]))
        if isinstance(stage, RewardStage):
            stage.model.train_parts([])
            for parameter in stage.model.head.parameters():
                parameter.requires_grad_(False)
            context.reward_model = stage.model
        else:
            _report(context, name, evaluate_sets(context, name, stage.steps, records=None))
        _write_whole(product, stage.save)
        Checkpoints(folder / "checkpoints").clear()
    _write_whole(folder / "final", lambda path: load.save_folder(path, context.policy.loaded))
    return folder


def _claim(folder: Path, recipe: Recipe, resume: bool) -> None:
    """The run folder belongs to one resolved recipe, from its first measured step on."""
    path = folder / "recipe.yaml"
    started = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "stages"))
    text = yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)
    if started and path.is_file():
        if not resume:
            raise ValueError(f"{folder} holds a run; add --resume to go on with it, or choose another run.folder")
        if path.read_text() != text:
            raise ValueError(f"{folder} holds a run of another recipe (see {path}); resume with the same one")
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _write_whole(path: Path, write) -> None:
    partial = path.with_name(path.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    shutil.rmtree(path, ignore_errors=True)
    os.replace(partial, path)


def _report(context: Context, stage: str, metrics: dict[str, float]) -> None:
    for name in context.recipe.evaluation.sets:
        text = f"{stage:>7}  {name:<14} accuracy {metrics[f'eval/{name}/accuracy']:6.1%}"
        if f"eval/{name}/hallucination" in metrics:
            text += f"   hallucination {metrics[f'eval/{name}/hallucination']:6.1%}"
        context.log.say(text)
