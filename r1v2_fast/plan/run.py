"""`r1v2-fast plan`: the memory and time that a recipe's policy stages take on given GPUs, computed from shapes."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import InternVLConfig

from r1v2_fast import config
from r1v2_fast.data import digits
from r1v2_fast.models import presets, toy_tokenizer
from r1v2_fast.plan import gpus, report, shapes
from r1v2_fast.plan.memory import Shard
from r1v2_fast.plan.stages import COUNTS, Stage, remedies

POLICY = ("mpo", "grpo")
TEXT_TOKENS = 200  # of a prompt, beside its picture


def run(
    recipe: str,
    overrides: list[str],
    *,
    gpus: int,
    gpu: str,
    bandwidth: float,
    shard: Shard | None,
    prompt_tokens: int | None,
    response_tokens: int | None,
) -> int:
    """Print the plan; 0 where every policy stage fits, else 1.

    bandwidth        GB/s into and out of a node of eight GPUs
    shard            None: run.shard where the recipe sets it, else none where the whole model fits and trains, full where not
    prompt_tokens    None: the image tokens of the most tiles and the thumbnail, and 200 of text
    response_tokens  None: the stage's max_new_tokens
    raises           ValueError on an unknown GPU, a number below 1, a recipe without policy stages
    """
    stages = plan(
        config.load(recipe, overrides), count=gpus, gpu=gpu, bandwidth=bandwidth, shard=shard,
        prompt_tokens=prompt_tokens, response_tokens=response_tokens,
    )  # fmt: skip
    console = Console(width=report.WIDTH, file=sys.stdout, highlight=False)
    report.render([(stage, remedies(stage)) for stage in stages], console)
    return int(any(stage.over for stage in stages))


def plan(
    recipe: config.Recipe,
    *,
    count: int,
    gpu: str,
    bandwidth: float = 400.0,
    shard: Shard | None = None,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
) -> list[Stage]:
    """The recipe's policy stages on `count` GPUs; arguments and errors are those of `run`."""
    found = gpus.find(gpu)
    if not 1 <= count <= COUNTS[-1]:
        raise ValueError(f"expected --gpus from 1 to {COUNTS[-1]}, got {count}")
    if bandwidth <= 0:
        raise ValueError(f"expected --bandwidth above 0 GB/s, got {bandwidth}")
    names = [name for name in POLICY if name in recipe.run.stages]
    if not names:
        raise ValueError(f"expected a recipe with a stage among {POLICY} in run.stages, got {recipe.run.stages}")
    of = model_config(recipe.model)
    model, tiles = shapes.of(of), _tiles(recipe)
    prompt = tiles * model.image_tokens + TEXT_TOKENS if prompt_tokens is None else prompt_tokens
    stages = []
    for name in names:
        longest = _longest(getattr(recipe, name))
        response = response_tokens if response_tokens is not None else longest
        if response is None:
            raise ValueError(f"expected --response-tokens for the ready pairs of {name}, got none")
        stage = Stage(
            name=name, recipe=recipe, shapes=model, gpu=found, efficiency=gpus.efficiency(gpu), count=count,
            between_nodes=bandwidth * 1e9, prompt=prompt, response=response, tiles=tiles, shard="none",
        )  # fmt: skip
        stages.append(stage)
    whole = count == 1 or not any({"held", "training"} & {*stage.over} for stage in stages)
    chosen = shard or _set(recipe) or ("none" if whole else "full")
    return [replace(stage, shard=chosen) for stage in stages]


def model_config(model: config.Model) -> Any:
    """The `InternVLConfig` of a recipe's model, from its preset or its folder's config.json.

    raises  ValueError on an unknown preset, or a folder that holds no InternVL config
    """
    if model.preset == "digits":
        tokenizer = toy_tokenizer.build(digits.WORDS)
        return presets.digits(len(tokenizer), tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    if model.preset is not None:
        return presets.architecture(model.preset, model.architecture)
    path = Path(str(model.path)) / "config.json"
    if not path.is_file():
        raise ValueError(f"expected config.json in model.path, got {str(model.path)!r} without one")
    values = json.loads(path.read_text(encoding="utf-8"))
    if (kind := values.get("model_type")) != "internvl":
        raise ValueError(f"{path}: expected model_type 'internvl', got {kind!r}")
    return InternVLConfig.from_dict(values)


def _tiles(recipe: config.Recipe) -> int:
    """Of a prompt's picture: the most, and the thumbnail behind several; the toy does not tile."""
    most = recipe.data.max_tiles
    return 1 if recipe.model.preset == "digits" or most == 1 else most + 1


def _longest(stage: config.MPO | config.GRPO) -> int | None:
    return stage.sampling.max_new_tokens if stage.sampling else None


def _set(recipe: config.Recipe) -> Shard | None:
    return getattr(recipe.run, "shard", None) if "shard" in recipe.run.model_fields_set else None
