"""The Selective Sample Buffer's rules on plain lists, to hold the buffer's own numbers against."""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import torch

from r1v2_fast import ops
from r1v2_fast.buffer import _MIX


class Held(NamedTuple):
    samples: list  # ids or token counts, whatever tells them apart
    advantages: list[float]
    step: int

    @property
    def priority(self) -> float:
        return sum(map(abs, self.advantages)) / len(self.advantages)


class Simulation:
    def __init__(self, capacity: int, granularity: str, alpha: float, max_staleness: int | None, seed: int):
        self.capacity, self.granularity, self.alpha = capacity, granularity, alpha
        self.max_staleness, self.seed = max_staleness, seed
        self.held: list[Held] = []

    def fill(self, target: int, fresh: int, step: int) -> list[Held]:
        young = [u for u in self.held if self.max_staleness is None or step - u.step <= self.max_staleness]
        wanted = max(0, min(target - fresh, len(young)))
        if wanted == 0:
            return []
        priorities = torch.tensor([unit.priority for unit in young], dtype=torch.float64)
        seed = ((self.seed + 1) * _MIX + step) % 2**63
        drawn = ops.sample_by_priority(priorities, wanted, seed=seed, alpha=self.alpha).indices.tolist()
        return [young[i] for i in drawn]

    def push(self, samples: list, advantages: list[float], offsets: list[int], step: int) -> None:
        for unit in self.units(samples, advantages, offsets, step):
            if any(a != 0 for a in unit.advantages):
                self.held.append(unit)
        self.held = self.held[-self.capacity :]

    def units(self, samples: list, advantages: list[float], offsets: list[int], step: int) -> list[Held]:
        edges = offsets if self.granularity == "group" else range(len(samples) + 1)
        return [Held(samples[start:end], advantages[start:end], step) for start, end in itertools.pairwise(edges)]


class Step(NamedTuple):
    """What a GRPO step logs of its buffer."""

    share_without: float
    share: float
    staleness: float | None
    replayed_tokens: int


def replay(
    pushes: list[dict],  # of every step: lengths and advantages of its N samples, offsets of its groups
    simulation: Simulation,
    *,
    prompts: int,
    share: float = 1.0,
    deficit: Literal["units", "signal"] = "units",
) -> list[Step]:
    """What the steps of a run must have logged, given what they pushed."""
    steps = []
    for step, push in enumerate(pushes):
        arguments = (push["lengths"], push["advantages"], push["offsets"], step)
        units = simulation.units(*arguments)
        target = prompts if simulation.granularity == "group" else prompts * push["offsets"][1]
        fresh = have = sum(unit.priority > 0 for unit in units)
        if deficit == "signal" and simulation.held:
            mean = sum(unit.priority for unit in simulation.held) / len(simulation.held)
            have = round(sum(unit.priority for unit in units) / mean)
        drawn = simulation.fill(round(target * share), have, step)
        simulation.push(*arguments)
        ages = [step - unit.step for unit in drawn]
        steps.append(
            Step(
                fresh / target,
                (fresh + len(drawn)) / target,
                sum(ages) / len(ages) if ages else None,
                sum(length for unit in drawn for length in unit.samples),
            )
        )
    return steps
