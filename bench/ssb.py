"""The SSB study: GRPO with and without the Selective Sample Buffer, the same aligned model and data seed by seed.

Every run is a JSON line: its evaluations by step and by optimizer step, and whether what its buffer logged in every
step (shares, staleness, replayed tokens) equals `ssb_simulation`. `bench.ssb_report` makes the tables.
"""

from __future__ import annotations

import math
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import record, ssb_report
from bench.ssb_simulation import Simulation, Step, replay

RECIPE = "digits-ssb"
ARMS: dict[str, list[str]] = {
    "plain": ["grpo.buffer=null"],
    "buffer": [],
    "samples": ["grpo.buffer.granularity=sample", "grpo.buffer.capacity=2048"],
    "fresher": ["grpo.buffer.max_staleness=5"],
    "any age": ["grpo.buffer.max_staleness=null"],
    "uniform": ["grpo.buffer.alpha=0"],
    "sharper": ["grpo.buffer.alpha=2"],
    "stored ratio": ["grpo.buffer.ratio=stored"],
    "to 60 %": ["grpo.buffer.share=0.6"],
    "signal": ["grpo.buffer.deficit=signal"],
    "plain, all averaged": ["grpo.buffer=null", "grpo.average_over=all"],
}
MAIN = ("plain", "buffer")
PROMPTS = (8, 16, 32)
VARIANTS_AT = 16


def plan(seeds: int) -> list[dict[str, Any]]:
    """Both main arms at every batch size, then the variants at one."""
    runs = [{"arm": a, "prompts": p, "seed": s} for p in PROMPTS for s in range(seeds) for a in MAIN]
    return runs + [{"arm": a, "prompts": VARIANTS_AT, "seed": s} for a in ARMS if a not in MAIN for s in range(seeds)]


def study(work: Path, output: Path, *, seeds: int, jobs: int, overrides: list[str], console: Console) -> None:
    """Run what `output` does not hold yet; a study that was stopped goes on."""
    done = record.read(output) if output.is_file() else []
    held = [{key: line[key] for key in ("arm", "prompts", "seed")} for line in done]
    missing = [run for run in plan(seeds) if run not in held]
    work.mkdir(parents=True, exist_ok=True)
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        pool.starmap(_align, [(work, seed, overrides) for seed in sorted({run["seed"] for run in missing})])
        for line in pool.imap(_run, [(work, run, overrides) for run in missing]):
            record.write([line], output)
            console.print(f"{line['arm']:<14} prompts {line['prompts']:<3} seed {line['seed']}  {line['final']:.1%}")
    ssb_report.show(record.read(output), console)


def _align(work: Path, seed: int, overrides: list[str]) -> Path:
    """The aligned model that all runs of a seed start from."""
    folder = work / f"align-{seed}"
    _train(folder, ["run.stages=[align]", f"run.seed={seed}", *overrides])
    return folder / "final"


def _run(arguments: tuple[Path, dict[str, Any], list[str]]) -> dict[str, Any]:
    from r1v2_fast import buffer, log
    from r1v2_fast.train.stages import grpo

    work, run, overrides = arguments
    pushes: list[dict] = []

    class Recorded(buffer.SelectiveSampleBuffer):
        def push(self, samples, advantages, offsets, step):
            lengths = [len(sample["response_ids"]) for sample in samples]
            pushes.append({"lengths": lengths, "advantages": advantages.tolist(), "offsets": offsets.tolist()})
            super().push(samples, advantages, offsets, step)

    grpo.SelectiveSampleBuffer = Recorded  # type: ignore[misc]
    folder = work / f"{run['arm']}-{run['prompts']}-{run['seed']}".replace(" ", "_")
    start = work / f"align-{run['seed']}"
    recipe = _train(
        folder,
        [
            "run.stages=[grpo]",
            f"run.seed={run['seed']}",
            "model.preset=null",
            f"model.path={start / 'final'}",
            "data.make=null",
            f"data.folder={start / 'data'}",
            f"grpo.sampling.prompts={run['prompts']}",
            *overrides,
            *ARMS[run["arm"]],
        ],
    )
    lines = [line for line in log.read(folder / "metrics.jsonl") if line["stage"] in ("start", "grpo")]
    return {**run, **_measured(lines), "mechanism": _mechanism(recipe, lines, pushes), **_environment()}


def _train(folder: Path, overrides: list[str]):
    from r1v2_fast import config
    from r1v2_fast.log import Log
    from r1v2_fast.train import run

    recipe = config.load(RECIPE, [f"run.folder={folder}", *overrides])
    if not (folder / "final").is_dir():
        with (folder.parent / f"{folder.name}.log").open("w") as output:
            run.train(recipe, resume=(folder / "recipe.yaml").is_file(), log=Log(folder, Console(file=output)))
    return recipe


def _measured(lines: list[dict]) -> dict[str, Any]:
    """Evaluations as [steps, optimizer steps, accuracy], the last of them over all records."""
    steps = [line for line in lines if "step_time" in line]
    updates = {line["step"]: line.get("updates", 0) for line in steps}
    curve = [
        [line["step"], sum(updates[s] for s in range(line["step"])), line["eval/low_contrast/accuracy"]]
        for line in lines
        if "eval/low_contrast/accuracy" in line
    ]
    last = steps[-len(steps) // 3 :]
    return {
        "curve": curve,
        "final": curve[-1][2],
        "updates": sum(updates.values()),
        "informative": sum(line["frac_informative"] for line in steps) / len(steps),
        "informative_last_third": sum(line["frac_informative"] for line in last) / len(last),
        "tokens": sum(line.get("num_tokens", 0) for line in steps),
    }


def _mechanism(recipe, lines: list[dict], pushes: list[dict]) -> dict[str, Any] | None:
    """Means over the steps, and in how many steps the log and the simulation differ."""
    settings = recipe.grpo.buffer
    steps = [line for line in lines if "step_time" in line]
    if settings is None or len(pushes) != len(steps):  # a run that was resumed pushed in more than one process
        return None
    simulation = Simulation(
        settings.capacity, settings.granularity, settings.alpha, settings.max_staleness, recipe.run.seed
    )
    sampling = recipe.grpo.sampling
    expected = replay(pushes, simulation, prompts=sampling.prompts, share=settings.share, deficit=settings.deficit)
    logged = [
        Step(
            line["buffer/effective_share_without"],
            line["buffer/effective_share"],
            line.get("buffer/staleness"),
            line["buffer/replayed_tokens"],
        )
        for line in steps
    ]
    ages = [step.staleness for step in logged if step.staleness is not None]
    return {
        "steps": len(steps),
        "differing": sum(a != b for a, b in zip(expected, logged, strict=True)),
        "share_without": sum(step.share_without for step in logged) / len(logged),
        "share": sum(step.share for step in logged) / len(logged),
        "staleness": sum(ages) / len(ages) if ages else math.nan,
        "replayed_tokens": sum(step.replayed_tokens for step in logged),
    }


def _environment() -> dict[str, Any]:
    return record.environment(torch.device("cpu"))
