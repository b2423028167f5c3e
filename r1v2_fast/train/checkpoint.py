"""Checkpoints: safetensors and JSON, written beside and renamed, so that a half-written one is never chosen.

What a step draws is a pure function of (seed, stage, step), so a checkpoint holds parameters, optimizer and the
stage's own state, and needs no random state or data position.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from r1v2_fast.train.stages.base import Stage


class Checkpoints:
    def __init__(self, folder: Path):
        self.folder = folder

    def save(self, stage: Stage, optimizer: torch.optim.Optimizer, step: int) -> None:
        """After `step` steps of `stage`; older checkpoints go once this one stands."""
        tensors, meta = stage.state()
        flat = {f"stage/{name}": tensor for name, tensor in tensors.items()}
        parameters = stage.named_parameters()
        flat |= {f"parameter/{name}": parameter.detach() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            for field, value in optimizer.state[parameter].items():
                flat[f"optimizer/{field}/{name}"] = torch.as_tensor(value)
        target = self.folder / f"{stage.name}-{step:06d}"
        partial = target.with_name(target.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(
            {name: tensor.clone().contiguous().cpu() for name, tensor in flat.items()},
            str(partial / "state.safetensors"),
        )
        (partial / "state.json").write_text(json.dumps({"stage": stage.name, "step": step, "meta": meta}))
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        for other in self.folder.iterdir():
            if other != target:
                shutil.rmtree(other)

    def load(self, stage: Stage, optimizer: torch.optim.Optimizer) -> int:
        """Restore the newest checkpoint of `stage`; returns the steps done, 0 where there is none."""
        found = sorted(p for p in self.folder.glob(f"{stage.name}-??????") if (p / "state.json").is_file())
        if not found:
            return 0
        state = json.loads((found[-1] / "state.json").read_text())
        tensors = load_file(str(found[-1] / "state.safetensors"))
        parameters = stage.named_parameters()
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[f"parameter/{name}"])
        by_field: dict[str, dict[str, torch.Tensor]] = {name: {} for name in parameters}
        for key, tensor in tensors.items():
            if key.startswith("optimizer/"):
                _, field, name = key.split("/", 2)
                by_field[name][field] = tensor
        for name, parameter in parameters.items():
            fields: dict[str, Any] = {
                f: t if f == "step" else t.to(parameter.device) for f, t in by_field[name].items()
            }
            if fields:
                optimizer.state[parameter] = fields
        own = {key.removeprefix("stage/"): tensor for key, tensor in tensors.items() if key.startswith("stage/")}
        stage.load_state(own, state["meta"])
        return state["step"]

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
