"""The run's log: metrics.jsonl and samples.jsonl in the run folder, progress and plain sentences on the terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Log:
    """Appends to the run's files; a resumed stage drops the lines behind its checkpoint first."""

    def __init__(self, folder: Path, console: Console | None = None):
        self.metrics_path = folder / "metrics.jsonl"
        self.samples_path = folder / "samples.jsonl"
        self.console = console or Console(highlight=False)
        self._said: set[str] = set()
        self._progress: Progress | None = None
        self._task: Any = None

    def say(self, sentence: str, *, once: str | None = None) -> None:
        """Print a sentence; one with the same `once` is said a single time."""
        if once is None or once not in self._said:
            self.console.print(sentence)
            self._said.add(once or "")

    def start(self, stage: str, total: int, completed: int) -> None:
        self._progress = Progress(
            TextColumn(f"{stage:>7}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[shown]}"),
            console=self.console,
        )
        self._progress.start()
        self._task = self._progress.add_task(stage, total=total, completed=completed, shown="")

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def step(self, stage: str, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """Write one step's metrics; device tensors are read here, once."""
        values = {name: _number(value) for name, value in metrics.items()}
        self._append(self.metrics_path, {"stage": stage, "step": step, "time": time.time(), **values})
        if self._progress is not None:
            shown = " ".join(
                f"{name} {values[name]:.3f}" for name in ("loss", "reward", "mean_token_accuracy") if name in values
            )
            self._progress.update(self._task, completed=step + 1, shown=shown)
        return values

    def evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self._append(self.metrics_path, {"stage": stage, "step": step, "time": time.time(), **metrics})

    def sample(self, **fields: Any) -> None:
        self._append(self.samples_path, fields)

    def rewind(self, stage: str, done: int, later: Sequence[str]) -> None:
        """Drop what was written behind the first `done` steps of `stage`, and in `later` stages: it comes again.

        An evaluation's step counts the steps done before it, a training line's is its own index.
        """

        def keep(line: dict) -> bool:
            evaluated = "set" in line or any(name.startswith("eval/") for name in line)
            before = line["step"] <= done if evaluated else line["step"] < done
            return line["stage"] not in later and (line["stage"] != stage or before)

        for path in (self.metrics_path, self.samples_path):
            self._keep(path, keep)

    @staticmethod
    def _keep(path: Path, keep: Callable[[dict], bool]) -> None:
        if not path.is_file():
            return
        kept = [line for line in read(path) if keep(line)]
        temporary = path.with_suffix(".partial")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        temporary.replace(path)

    @staticmethod
    def _append(path: Path, line: dict) -> None:
        with path.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({k: None if _is_nan(v) else v for k, v in line.items()}) + "\n")


def read(path: Path) -> list[dict]:
    """The lines of a log; a last line that a kill cut short is left out."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def _number(value: Any) -> float:
    return value.item() if isinstance(value, torch.Tensor) else value


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)
