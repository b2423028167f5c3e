"""Checkpoints: safetensors and JSON, written beside and renamed, so that a half-written one is never chosen.

What a step draws is a pure function of (seed, stage, step), so a checkpoint holds parameters, optimizer and the
stage's own state (buffer, reward shift, reference, data position), and needs no random state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from r1v2_fast.atomic import digest, write_folder
from r1v2_fast.train.optimizer import Optimizer
from r1v2_fast.train.stages.base import Stage

TENSORS, META = "state.safetensors", "state.json"
NAME = re.compile(r"[a-z]+-\d{6,}")


class Checkpoints:
    """The newest `keep` checkpoints of the stage that is running; `say` tells what a reader of the terminal must know."""

    def __init__(self, folder: Path, *, keep: int = 2, say: Callable[[str], None] = lambda sentence: None):
        self.folder = folder
        self.keep = keep
        self.say = say

    def save(self, stage: Stage, optimizer: Optimizer, step: int) -> None:
        """After `step` steps of `stage`; older checkpoints go once this one stands.

        raises  RuntimeError where it cannot be written; what stood before still stands
        """
        own, meta = stage.state()
        optimizer_tensors, optimizer_meta = optimizer.state()
        tensors = {f"stage/{name}": tensor for name, tensor in own.items()}
        tensors |= {f"parameter/{name}": parameter.detach() for name, parameter in optimizer.parameters.items()}
        tensors |= {f"optimizer/{name}": tensor for name, tensor in optimizer_tensors.items()}
        state = {"stage": stage.name, "step": step, "meta": meta, "optimizer": optimizer_meta}
        target = self.folder / f"{stage.name}-{step:06d}"
        try:
            write_folder(target, lambda folder: _write(folder, tensors, state))
        except RuntimeError as error:
            size, whole = sum(tensor.nbytes for tensor in tensors.values()), self._found(stage)
            intact = f"{whole[-1]} is intact" if whole else "there is no earlier one"
            raise RuntimeError(f"{error}. The checkpoint takes {size / 1e6:.0f} MB; {intact}") from error
        found = self._found(stage)
        now = found.index(target) + 1
        for other in (*found[:now][: -self.keep], *found[now:]):  # the old, and what another history left ahead
            shutil.rmtree(other)

    def load(self, stage: Stage, optimizer: Optimizer) -> int:
        """Restore the newest whole checkpoint of `stage`; returns the steps done, 0 where there is none.

        raises  ValueError where it is another model's
        """
        found = self._found(stage)
        while found:
            path = found.pop()
            if (broken := _broken(path)) is None:
                return _restore(path, stage, optimizer)
            aside = path.with_suffix(".broken")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(path, aside)
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


def _write(folder: Path, tensors: dict[str, torch.Tensor], state: dict[str, Any]) -> None:
    # clones: safetensors refuses tensors that share memory, as the tied ones of a buffer's samples may
    save_file({name: t.clone().contiguous().cpu() for name, t in tensors.items()}, str(folder / TENSORS))
    whole = {**state, "bytes": (folder / TENSORS).stat().st_size, "blake2b": digest(folder / TENSORS)}
    (folder / META).write_text(json.dumps(whole))


def _broken(path: Path) -> str | None:
    """Why a checkpoint cannot be used; None if it can."""
    try:
        state = json.loads((path / META).read_text())
        got = (path / TENSORS).stat().st_size
        if got != state["bytes"]:
            return f"{TENSORS} has {got} bytes, {state['bytes']} were written"
        if digest(path / TENSORS) != state["blake2b"]:
            return f"{TENSORS} does not hold what was written"
    except (OSError, ValueError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _restore(path: Path, stage: Stage, optimizer: Optimizer) -> int:
    state = json.loads((path / META).read_text())
    parts: dict[str, dict[str, torch.Tensor]] = {"parameter": {}, "optimizer": {}, "stage": {}}
    for key, tensor in load_file(str(path / TENSORS)).items():
        part, name = key.split("/", 1)
        parts[part][name] = tensor
    saved = {name: tuple(tensor.shape) for name, tensor in parts["parameter"].items()}
    here = {name: tuple(parameter.shape) for name, parameter in optimizer.parameters.items()}
    for name in sorted(saved.keys() | here.keys()):
        if saved.get(name) != here.get(name):
            raise ValueError(
                f"{path} is a checkpoint of another architecture: parameter {name!r} is "
                f"{here.get(name, 'absent')} in this model, {saved.get(name, 'absent')} in the checkpoint"
            )
    with torch.no_grad():
        for name, parameter in optimizer.parameters.items():
            parameter.copy_(parts["parameter"][name])
    optimizer.load_state(parts["optimizer"], state["optimizer"])
    try:
        stage.load_state(parts["stage"], state["meta"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return state["step"]
