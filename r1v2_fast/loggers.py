"""External loggers: a run's metrics also in TensorBoard, Weights & Biases or Trackio."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Protocol


class Logger(Protocol):
    def log(self, metrics: dict[str, float], step: int) -> None:
        """`step` counts the steps of all stages; it may repeat, and go back when a run resumes."""

    def close(self) -> None: ...


@dataclass(frozen=True)
class _Run:
    project: str
    name: str
    folder: Path
    config: dict[str, Any]
    resume: bool


class _TensorBoard:
    def __init__(self, run: _Run):
        self.run = run
        self.writer: Any = None

    def log(self, metrics: dict[str, float], step: int) -> None:
        if self.writer is None:
            # opened here, where the first step is known: what the resumed run wrote from it on is hidden
            from torch.utils.tensorboard import SummaryWriter

            folder = str(self.run.folder / "tensorboard")
            self.writer = SummaryWriter(folder, purge_step=step if self.run.resume else None)
            self.writer.add_text("config", f"```\n{json.dumps(self.run.config, indent=2, default=str)}\n```", step)
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()


class _Wandb:
    def __init__(self, run: _Run):
        wandb = importlib.import_module("wandb")
        kept = run.folder / "wandb_id.txt"
        known = kept.read_text().strip() if run.resume and kept.is_file() else None
        self.run = wandb.init(
            project=run.project, name=run.name, config=run.config, dir=str(run.folder), id=known, resume="allow"
        )
        kept.write_text(self.run.id)
        # wandb's own step drops whatever comes after a resume until it is past the last step of before
        self.run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.run.log({**metrics, "step": step})

    def close(self) -> None:
        self.run.finish()


class _Trackio:
    """A resumed run is the project's last run of this name; its steps since the checkpoint stay, beside the new ones."""

    def __init__(self, run: _Run):
        self.trackio = importlib.import_module("trackio")
        resume = "allow" if run.resume else "never"
        self.trackio.init(project=run.project, name=run.name, config=run.config, resume=resume)

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.trackio.log(metrics, step=step)

    def close(self) -> None:
        self.trackio.finish()


BACKENDS: dict[str, Callable[[_Run], Logger]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


class _Guarded:
    """A logger that is dropped with one sentence where it raises: a network must not end hours of training."""

    def __init__(self, name: str, logger: Logger, warn: Callable[[str], None]):
        self.name, self.warn = name, warn
        self.logger: Logger | None = logger

    def log(self, metrics: dict[str, float], step: int) -> None:
        known = {name: value for name, value in metrics.items() if isinstance(value, Real) and value == value}
        if known:
            self._try(lambda logger: logger.log(known, step), f"failed at step {step} and gets no more metrics")

    def close(self) -> None:
        self._try(lambda logger: logger.close(), "could not be closed")
        self.logger = None

    def _try(self, call: Callable[[Logger], None], otherwise: str) -> None:
        if self.logger is None:
            return
        try:
            call(self.logger)
        except Exception as error:
            self.logger = None
            self.warn(f"logger {self.name!r} {otherwise}: {type(error).__name__}: {error}")


def open_loggers(
    names: list[str],
    *,
    project: str,
    run: str,
    folder: Path,
    config: dict[str, Any],
    resume: bool,
    warn: Callable[[str], None],
) -> list[Logger]:
    """The loggers of these names, opened for a run; NaN and None are not logged, a failure later only warns.

    resume  go on with the run that `folder` holds
    raises  ValueError for an unknown name, ImportError that says what to install; whatever opening one raises
    """
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"a logger must be one of {list(BACKENDS)}, got {name!r}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ImportError(f"logger {name!r} needs {name}: pip install 'r1v2-fast[{name}]'") from error
    folder.mkdir(parents=True, exist_ok=True)
    opened = _Run(project, run, folder, config, resume)
    return [_Guarded(name, BACKENDS[name](opened), warn) for name in names]
