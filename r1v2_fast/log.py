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

from r1v2_fast.loggers import Logger


class Log:
    """Appends to the run's files; a resumed stage drops the lines behind its checkpoint first."""

    def __init__(self, folder: Path, console: Console | None = None):
        self.loggers: list[Logger] = []  # further places for the metrics
        self.first_step: dict[str, int] = {}  # of each stage on the axis of all stages, for the loggers
        self.metrics_path = folder / "metrics.jsonl"
        self.samples_path = folder / "samples.jsonl"
        self.console = console or Console(highlight=False)
        self._said: set[str] = set()
        self._progress: Progress | None = None
        self._task: Any = None

    def say(self, sentence: str, *, once: str | None = None) -> None:
        """Print a sentence; one with the same `once` is said a single time."""
        if once is None or once not in self._said:
            self.console.print(sentence, markup=False)
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
        self._pass_on(stage, step + 1, values)  # loggers count steps done, as an evaluation does
        if self._progress is not None:
            shown = " ".join(
                f"{name} {values[name]:.3f}" for name in ("loss", "reward", "mean_token_accuracy") if name in values
            )
            self._progress.update(self._task, completed=step + 1, shown=shown)
        return values

    def evaluation(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self._append(self.metrics_path, {"stage": stage, "step": step, "time": time.time(), **metrics})
        self._pass_on(stage, step, metrics)

    def sample(self, **fields: Any) -> None:
        self._append(self.samples_path, fields)

    def close(self) -> None:
        self.stop()
        for logger in self.loggers:
            logger.close()

    def _pass_on(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        for logger in self.loggers:
            logger.log(metrics, self.first_step.get(stage, 0) + step)

    def rewind(self, stage: str, done: int, later: Sequence[str], *, steps: int) -> None:
        """Drop what was written behind the first `done` of the `steps` of `stage`, and in `later` stages: it comes again.

        An evaluation's step counts the steps done before it, a training line's is its own index. The evaluation after
        the last step follows the last checkpoint.
        """

        def keep(line: dict) -> bool:
            evaluated = "set" in line or any(name.startswith("eval/") for name in line)
            before = line["step"] <= min(done, steps - 1) if evaluated else line["step"] < done
            return line["stage"] not in later and (line["stage"] != stage or before)

        self._keep(keep)

    def evaluated(self, stage: str) -> bool:
        """Whether an evaluation of `stage` stands; one that a kill cut short is dropped."""
        if self.metrics_path.is_file() and any(line["stage"] == stage for line in read(self.metrics_path)):
            return True
        self._keep(lambda line: line["stage"] != stage)
        return False

    def _keep(self, keep: Callable[[dict], bool]) -> None:
        for path in (self.metrics_path, self.samples_path):
            if path.is_file():
                kept = [line for line in read(path) if keep(line)]
                temporary = path.with_suffix(".partial")
                temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
                temporary.replace(path)

    @staticmethod
    def _append(path: Path, line: dict) -> None:
        try:
            with path.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps({k: None if _no_json(v) else v for k, v in line.items()}) + "\n")
        except OSError as error:
            raise RuntimeError(
                f"cannot write {path}: {error}; make room and resume from the last checkpoint"
            ) from error


class Silent(Log):
    """Of a rank that is not the first: it prints and writes nothing."""

    def say(self, sentence: str, *, once: str | None = None) -> None:
        pass

    def start(self, stage: str, total: int, completed: int) -> None:
        pass

    def step(self, stage: str, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        return {}

    def _keep(self, keep: Callable[[dict], bool]) -> None:
        pass

    @staticmethod
    def _append(path: Path, line: dict) -> None:
        pass


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


def _no_json(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)
