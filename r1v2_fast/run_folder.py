"""The run folder: it belongs to one resolved recipe, and says what it was run with."""

from __future__ import annotations

import fnmatch
import json
import platform
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import ValidationError

from r1v2_fast._version import __version__
from r1v2_fast.atomic import digest, write_text
from r1v2_fast.config import Recipe

# what may change between starts: how and where it runs, not what it computes
FREE = (
    "checkpoint.every", "checkpoint.keep", "samples_every",
    "run.name", "run.folder", "data.folder", "run.device", "run.threads", "run.loggers", "run.timeout",
    "run.shard", "data.root", "data.allow_outside",
    "*.micro_batch_tokens", "*.gradient_checkpointing", "model.packing", "model.attention", "model.feature_cache_*",
    "model.fused_layers",
    "rollout.max_rows", "rollout.prefill_tokens", "rollout.cuda_graphs", "rollout.url", "rollout.api_key_env", "rollout.model",
    "rollout.timeout", "rollout.retries", "rollout.concurrency", "rollout.probe_tolerance", "rollout.weight_transfer",
    "*.rewards.*.on_nan", "*.rewards.*.time_limit", "evaluation.time_limit",
)  # fmt: skip


def claim(folder: Path, recipe: Recipe, *, resume: bool, say: Callable[[str], None]) -> None:
    """Make the folder this recipe's, from its first measured step on.

    raises  ValueError where it holds a run and resume is False, or a run of another recipe, with the keys that differ
    """
    path = folder / "recipe.yaml"
    started = any((folder / name).exists() for name in ("metrics.jsonl", "checkpoints", "stages"))
    values = recipe.model_dump(mode="json")
    if started and path.is_file():
        if not resume:
            raise ValueError(f"{folder} holds a run; add --resume to go on with it, or choose another run.folder")
        free = (*FREE, *(f"{stage}.*" for stage in recipe.run.stages if not _begun(folder, stage)))
        before, now = _flat(_filled(yaml.safe_load(path.read_text()))), _flat(values)
        differing = [
            f"{key} ({before.get(key)!r} in the run, {now.get(key)!r} now)"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key) and not any(fnmatch.fnmatch(key, pattern) for pattern in free)
        ]
        if differing:
            raise ValueError(f"{folder} holds a run of another recipe, it differs in {', '.join(differing)}")
    elif resume:
        say(f"{folder} holds nothing to resume; starting")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(path, yaml.safe_dump(values, sort_keys=False))
    _note_environment(folder / "environment.json", resume and started, say)


def _filled(values: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of keys that came after the run began; as it is where a key is no longer known."""
    try:
        return Recipe.model_validate(values).model_dump(mode="json")
    except ValidationError:
        return values


def _begun(folder: Path, stage: str) -> bool:
    """Until then a stage's keys may change: what an earlier one took days for is not lost to a bad value in a later."""
    return (folder / "stages" / stage).is_dir() or any((folder / "checkpoints").glob(f"{stage}-*"))


def _note_environment(path: Path, resumed: bool, say: Callable[[str], None]) -> None:
    """Versions, commit and threads of the start; a resume under others may differ in the last bits, and says so."""
    now = {
        "version": __version__,
        **_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }
    if resumed and path.is_file():
        before = json.loads(path.read_text())
        changed = [f"{name} {before.get(name)} -> {value}" for name, value in now.items() if before.get(name) != value]
        if changed:
            say(f"resumed under another environment, the last bits may differ: {', '.join(changed)}")
    write_text(path, json.dumps(now, indent=2))


def note_inputs(path: Path, files: list[Path], say: Callable[[str], None]) -> None:
    """Fingerprints of the data and reward files; a resume on changed ones goes on, and says so."""
    now = {str(file): digest(file) for file in files}
    if path.is_file():
        before = json.loads(path.read_text())
        for name in sorted(now.keys() & before.keys()):
            if before[name] != now[name]:
                say(f"{name} has changed since the run began: it goes on, and differs from one that was not stopped")
        now = {**now, **before}
    write_text(path, json.dumps(now, indent=2))


def _commit() -> dict[str, Any]:
    """The commit of the package's own checkout, and whether it was changed since; None for an installed package."""
    here = Path(__file__).resolve().parents[1]
    if not (here / ".git").exists():
        return {"commit": None, "dirty": None}

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted keys to leaves; an absent section is a leaf."""
    if isinstance(values, dict) and values:
        items = list(values.items())
    elif isinstance(values, list) and values and isinstance(values[0], dict):
        items = list(enumerate(values))
    else:
        return {prefix: values}
    return {key: leaf for name, value in items for key, leaf in _flat(value, f"{prefix}.{name}".lstrip(".")).items()}
