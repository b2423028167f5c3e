"""A whole MPO step and a whole GRPO + SSB step of a recipe with random weights: seconds by part, peak memory, MFU.

    python -m bench.full_step r1v2-38b-one-gpu --output bench/results/h200.jsonl
    python -m bench.full_step internvl3-1b grpo.steps=3

Two steps of a stage warm up (the second already replays from the buffer), the third is measured. FLOPs are those that the
matrix products and attention of the step need at the least: 2 a parameter and token forward, as much again backward through
frozen weights (no gradient of theirs), recomputation not counted. MFU is their share of the measured bf16 matmul ceiling.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import ceilings, record
from r1v2_fast import config
from r1v2_fast.log import Log
from r1v2_fast.models.packing import packed_tokens, prompt_key
from r1v2_fast.plan import flops, shapes
from r1v2_fast.train.context import Context
from r1v2_fast.train.loop import _learn
from r1v2_fast.train.optimizer import Optimizer
from r1v2_fast.train.run import STAGES
from r1v2_fast.train.stand_in import stand_in

WARM_UP = 2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.full_step", description=__doc__.split("\n")[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="a.b=c")
    parser.add_argument("--output", type=Path, help="append JSON lines here")
    arguments = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        own = [f"run.folder={folder}", f"data.folder={folder}/none", "model.dummy_weights=true"]
        recipe = config.load(arguments.recipe, [*own, *arguments.overrides])
        for line in measure(recipe, Path(folder)):
            show(line, console)
            if arguments.output is not None:
                record.write([line], arguments.output)
    return 0


def measure(recipe: config.Recipe, folder: Path) -> Iterator[dict[str, Any]]:
    """One line for each policy stage of the recipe."""
    recipe = stand_in(recipe, lambda sentence: None)
    context = Context(recipe, folder, Log(folder))
    context.use(context.initial())
    ceiling = ceilings.matmul_rates(context.device.type, recipe.model.dtype)[recipe.model.dtype]
    for name in recipe.run.stages:
        stage = STAGES[name](context, getattr(recipe, name))
        optimizer = Optimizer(stage.model.parameters, stage.settings.optimizer, dtype=stage.model.dtype)
        for step in range(WARM_UP):
            _learn(stage, stage.collect(step, {}), optimizer, step, {})
        cuda = context.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        metrics: dict[str, Any] = {}
        with parts_of(context, stage, optimizer) as seconds:
            start = _now(context.device)
            samples = stage.collect(WARM_UP, metrics)
            _learn(stage, samples, optimizer, WARM_UP, metrics)
            seconds["step"] = _now(context.device) - start
        sequences = [s for sample in samples for s in sample.sequences]
        count = training_flops(context, sequences)
        learn = seconds["forward"] + seconds["backward"]
        yield {
            "case": "full_step", "recipe": recipe.run.name, "stage": name,
            "parameters": sum(p.numel() for p in context.policy.root.parameters()),
            "sequences": len(sequences), "packed_tokens": packed_tokens(sequences),
            "response_tokens": sum(len(s.response_ids) for s in sequences),
            "replayed": sum(getattr(sample, "replayed", False) for sample in samples),
            "grad_norm": float(metrics["grad_norm"]), "seconds": dict(seconds),
            "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
            "flops": count, "matmul_ceiling": ceiling, "mfu": count / learn / ceiling,
            **record.environment(context.device),
        }  # fmt: skip
        stage.model.settle()
        del optimizer


def training_flops(context: Context, sequences: list) -> float:
    """Of the forward and the backward of the language model and its head over packed rows, attention included."""
    shape = shapes.of(context.policy.internvl.config)
    prompts = {prompt_key(s): len(s.prompt_ids) ** 2 / 2 for s in sequences}
    responses = [(len(s.prompt_ids), len(s.response_ids)) for s in sequences]
    pairs = sum(prompts.values()) + sum(r * p + r * r / 2 for p, r in responses)
    matrices, attention = flops.forward(shape, packed_tokens(sequences), pairs)
    head = 4.0 * sum(r for _, r in responses) * shape.embedding  # frozen: logits and the hidden gradient
    return 2 * matrices + head + 3 * attention  # the backward of attention has twice its forward's products


@contextmanager
def parts_of(context: Context, stage: Any, optimizer: Optimizer) -> Iterator[dict[str, float]]:
    """Seconds by part, the device waited for at each end; the first `vision` of a picture lies within `rollout`."""
    seconds: dict[str, float] = defaultdict(float)
    policy, engine = context.policy, context.engine
    places = [
        (policy, "_encode_each", "vision"), (engine, "generate", "rollout"), (stage, "loss", "forward"),
        (optimizer, "backward", "backward"), (optimizer, "step", "optimizer"), (stage, "response_logprobs", "logprobs"),
    ]  # fmt: skip
    for holder, name, part in places:
        setattr(holder, name, _timed(getattr(holder, name), part, seconds, context.device))
    try:
        yield seconds
    finally:
        for holder, name, _ in places:
            delattr(holder, name)


def _timed(function: Callable, part: str, seconds: dict[str, float], device: torch.device) -> Callable:
    @functools.wraps(function)
    def timed(*arguments, **options):
        start = _now(device)
        try:
            return function(*arguments, **options)
        finally:
            seconds[part] += _now(device) - start

    return timed


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def show(line: dict[str, Any], console: Console) -> None:
    peak = f", peak {line['peak_bytes'] / 2**30:.1f} GiB" if line["peak_bytes"] else ""
    parts = ", ".join(f"{name} {value:.2f}" for name, value in line["seconds"].items() if name != "step")
    console.print(
        f"{line['recipe']} {line['stage']}: {line['seconds']['step']:.2f} s for {line['sequences']} sequences "
        f"({line['replayed']} replayed), {line['packed_tokens']} packed tokens; {parts}{peak}; MFU {line['mfu']:.1%}"
    )


if __name__ == "__main__":
    raise SystemExit(main())
