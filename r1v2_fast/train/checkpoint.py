"""Checkpoints: safetensors and JSON, written beside and renamed, so that a half-written one is never chosen.

What a step draws is a pure function of (seed, stage, step), so a checkpoint holds parameters, optimizer and the
stage's own state (buffer, reward shift, reference, data position), and needs no random state. Its format is
`parallel.stored`'s: any number of ranks can resume it.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from r1v2_fast.parallel import stored
from r1v2_fast.parallel.world import ALONE, World
from r1v2_fast.train.optimizer import Optimizer
from r1v2_fast.train.stages.base import Stage

NAME = re.compile(r"[a-z]+-\d{6,}")


class Checkpoints:
    """The newest `keep` checkpoints of the stage that is running; `say` tells what a reader of the terminal must know."""

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 2,
        say: Callable[[str], None] = lambda sentence: None,
        world: World = ALONE,
    ):
        self.folder = folder
        self.keep = keep
        self.say = say
        self.world = world

    def save(self, stage: Stage, optimizer: Optimizer, step: int) -> None:
        """After `step` steps of `stage`; older checkpoints go once this one stands.

        raises  RuntimeError where it cannot be written; what stood before still stands
        """
        own, meta = stage.state()
        optimizer_tensors, optimizer_meta = optimizer.state()
        tensors = {f"stage/{name}": tensor for name, tensor in own.items()}
        tensors |= {f"parameter/{name}": parameter.detach() for name, parameter in optimizer.parameters.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors.items()}
        metas = self.world.gather(meta)  # each rank's own: its buffer's units differ
        state = {"stage": stage.name, "step": step, "meta": metas, "optimizer": optimizer_meta}
        target = self.folder / f"{stage.name}-{step:06d}"
        try:
            stored.write(target, self.world, tensors, state)
        except RuntimeError as error:
            size = sum(tensor.nbytes for tensor in tensors.values())
            raise RuntimeError(f"{error}. The checkpoint takes {size / 1e6:.0f} MB; {self.intact(stage)}") from error
        self.world.once(lambda: self._clean(stage, target))

    def intact(self, stage: Stage) -> str:
        """A sentence's end on what a resume goes back to."""
        whole = self._found(stage)
        return f"{whole[-1]} is intact" if whole else "there is no earlier one"

    def newest(self) -> str:
        """A sentence's end on the last completed checkpoint of any stage."""
        whole = [path for path in self.folder.glob("*") if NAME.fullmatch(path.name)]
        if not whole:
            return f"{self.folder} holds no checkpoint of a stage yet"
        return f"the last completed checkpoint is {max(whole, key=lambda path: path.stat().st_mtime)}"

    def _clean(self, stage: Stage, newest: Path) -> None:
        found = self._found(stage)
        now = found.index(newest) + 1
        for other in (*found[:now][: -self.keep], *found[now:]):  # the old, and what another history left ahead
            shutil.rmtree(other)

    def load(self, stage: Stage, optimizer: Optimizer) -> int:
        """Restore the newest whole checkpoint of `stage`; returns the steps done, 0 where there is none.

        raises  ValueError where it is another model's
        """
        found = self.world.once(lambda: self._found(stage))
        while found:
            path = found.pop()
            if (broken := stored.broken(path, self.world)) is None:
                with self.world.together():
                    return _restore(path, stage, optimizer)
            self.world.once(lambda path=path: _set_aside(path))  # type: ignore[misc]
            before = found[-1] if found else "the start of the stage"
            self.say(f"{path} is not whole ({broken}) and set aside; going back to {before}")
        return 0

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _found(self, stage: Stage) -> list[Path]:
        """Oldest first; what is half-written or broken has another suffix."""
        steps = {
            p: int(p.name.rsplit("-", 1)[1]) for p in self.folder.glob(f"{stage.name}-*") if NAME.fullmatch(p.name)
        }
        return sorted(steps, key=steps.__getitem__)


def _set_aside(path: Path) -> None:
    aside = path.with_suffix(".broken")
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(path, aside)


def _restore(path: Path, stage: Stage, optimizer: Optimizer) -> int:
    state, tensors = stored.opened(path)
    parameters = tensors.below("parameter/")
    saved = {name: parameters.shape(name) for name in parameters}
    here = {name: tuple(parameter.shape) for name, parameter in optimizer.parameters.items()}
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            raise ValueError(
                f"{path} is a checkpoint of another architecture: parameter {name!r} is "
                f"{here.get(name, 'absent')} in this model, {saved.get(name, 'absent')} in the checkpoint"
            )
    with torch.no_grad():
        for name, parameter in optimizer.parameters.items():
            parameter.copy_(parameters.like(name, parameter))
    optimizer.load_state(tensors.below("optimizer/"), state["optimizer"])
    try:
        stage.load_state(tensors.below("stage/"), state["meta"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return state["step"]
