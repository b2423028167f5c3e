"""The best policy so far by a named evaluation metric, kept in best/ as a folder that loads."""

from __future__ import annotations

import json
import math
from pathlib import Path

from r1v2_fast import config
from r1v2_fast.atomic import recover, write_folder
from r1v2_fast.models.policy import Policy
from r1v2_fast.parallel.world import ALONE, World


class Best:
    """Offered after every evaluation while a policy stage trains and at its end; ties keep the earlier one."""

    def __init__(self, folder: Path, settings: config.Checkpoint, world: World = ALONE):
        self.path = folder / "best"
        self.settings = settings
        self.world = world
        world.once(lambda: recover(self.path))

    def offer(self, policy: Policy, stage: str, step: int, metrics: dict[str, float]) -> None:
        """raises  ValueError where the evaluation has no such metric"""
        name = self.settings.best
        if name is None:
            return
        if name not in metrics:
            raise ValueError(f"checkpoint.best must be one of {sorted(metrics)}, got {name!r}")
        if math.isnan(metrics[name]):  # such as a rate among no answers
            return
        if not self.world.once(lambda: self._better(metrics[name])):
            return

        state = policy.gathered(keep=self.world.first)

        def write(folder: Path) -> None:
            policy.save(folder, state)
            found = {"metric": name, "value": metrics[name], "stage": stage, "step": step}
            (folder / "best.json").write_text(json.dumps(found, indent=2))

        self.world.once(lambda: write_folder(self.path, write))

    def _better(self, value: float) -> bool:
        sign = 1 if self.settings.best_is == "highest" else -1
        held = self.path / "best.json"
        return not held.is_file() or sign * value > sign * json.loads(held.read_text())["value"]
