"""Selective Sample Buffer (R1V2, arXiv 2504.16656, section 3.3.2): informative samples, replayed by |advantage|."""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from r1v2_fast import ops

_MIX = 0x9E3779B97F4A7C15  # spreads (seed, step) over 63 bits


@dataclass(frozen=True)
class Unit:
    """What is drawn and evicted as one: a group, or a single sample."""

    samples: list[dict[str, Any] | None]  # None: another rank holds it
    advantages: torch.Tensor  # [len(samples)], as they were when fresh
    step: int

    @functools.cached_property
    def priority(self) -> float:
        return self.advantages.abs().mean().item()

    @property
    def here(self) -> bool:
        """Whether this rank holds its samples: a unit is whole on one rank."""
        return self.samples[0] is not None


class SelectiveSampleBuffer:
    """Keeps units whose advantage is not zero and draws them again in proportion to |advantage|^alpha.

    capacity       units held; the oldest leave first
    granularity    "group": a prompt's responses together, priority the mean |advantage|; "sample": one response
    max_staleness  units older than this many steps are never drawn; None draws any
    seed           draws are a pure function of (seed, step, contents)
    A sample is a dict whose values are tensors, numbers, strings or lists of those: its tokens, behaviour log-probs and
    image keys, stored as they were when fresh. Among several ranks each pushes every rank's advantages, and None for the
    samples of others: so all draw and evict the same units, and each holds its own.
    """

    def __init__(
        self,
        capacity: int,
        *,
        granularity: Literal["group", "sample"] = "group",
        alpha: float = 1.0,
        max_staleness: int | None = None,
        seed: int = 0,
    ):
        if capacity < 1:
            raise ValueError(f"capacity must be 1 or more units, got {capacity}")
        if granularity not in ("group", "sample"):
            raise ValueError(f"granularity must be group or sample, got {granularity!r}")
        self.granularity, self.alpha, self.max_staleness, self.seed = granularity, alpha, max_staleness, seed
        self._units: deque[Unit] = deque(maxlen=capacity)
        self._last = {"target": 0, "fresh": 0, "drawn": 0, "staleness_mean": 0.0, "staleness_max": 0}

    def __len__(self) -> int:
        return len(self._units)

    @property
    def mean_priority(self) -> float:
        """Mean priority of the units held; 0 of an empty buffer."""
        return sum(unit.priority for unit in self._units) / max(len(self), 1)

    def fill(self, target: int, fresh: int, step: int) -> list[Unit]:
        """Draw max(0, target - fresh) units without replacement, fewer where fewer can be drawn.

        Called before this step's push: a step never replays itself.
        """
        drawable = [u for u in self._units if self.max_staleness is None or step - u.step <= self.max_staleness]
        wanted = min(max(0, target - fresh), len(drawable))
        drawn: list[Unit] = []
        if wanted:
            priorities = torch.tensor([unit.priority for unit in drawable], dtype=torch.float64)
            seed = ((self.seed + 1) * _MIX + step) & ((1 << 63) - 1)
            indices = ops.sample_by_priority(priorities, wanted, seed=seed, alpha=self.alpha).indices
            drawn = [drawable[index] for index in indices.tolist()]
        ages = [step - unit.step for unit in drawn]
        self._last = {
            "target": target,
            "fresh": fresh,
            "drawn": len(drawn),
            "staleness_mean": sum(ages) / len(ages) if ages else 0.0,
            "staleness_max": max(ages, default=0),
        }
        return drawn

    def push(
        self, samples: Sequence[dict[str, Any] | None], advantages: torch.Tensor, offsets: torch.Tensor, step: int
    ) -> None:
        """Store this step's informative units; group g is samples[offsets[g]:offsets[g + 1]].

        raises  ValueError where counts disagree, an advantage is not finite, or a sample holds what cannot be saved
        """
        if advantages.shape != (len(samples),) or int(offsets[-1]) != len(samples):
            raise ValueError(
                f"expected {len(samples)} advantages and offsets that end there, "
                f"got {tuple(advantages.shape)} and {int(offsets[-1])}"
            )
        if not bool(advantages.isfinite().all()):
            index = int((~advantages.isfinite()).nonzero()[0])
            raise ValueError(f"advantages must be finite, got {advantages[index].item()} for sample {index}")
        for index, sample in enumerate(samples):
            for name, value in (sample or {}).items():
                _check_value(value, f"sample {index}, field {name!r}")
        advantages = advantages.detach().cpu()
        edges = offsets.tolist() if self.granularity == "group" else range(len(samples) + 1)
        for start, end in itertools.pairwise(edges):
            own = advantages[start:end]
            if bool((own != 0).any()):
                self._units.append(Unit(list(samples[start:end]), own.clone(), step))

    def stats(self) -> dict[str, float]:
        """Units held; share of the target that is informative without and with the last draw; that draw's staleness."""
        target = max(self._last["target"], 1)
        return {
            "size": len(self),
            "effective_share_without": min(self._last["fresh"] / target, 1.0),
            "effective_share": min((self._last["fresh"] + self._last["drawn"]) / target, 1.0),
            "staleness_mean": self._last["staleness_mean"],
            "staleness_max": self._last["staleness_max"],
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors under flat names, and "meta", a JSON value: ready for safetensors and JSON.

        Of a unit that another rank holds there is its step alone; `merged` puts the ranks' metas together.
        """
        state: dict[str, Any] = {}
        units = []
        for u, unit in enumerate(self._units):
            samples: list[dict[str, Any] | None] = []
            if unit.here:
                state[f"{u}/advantages"] = unit.advantages
            for s, sample in enumerate(unit.samples):
                if sample is None:
                    samples.append(None)
                    continue
                plain = {}
                for name, value in sample.items():
                    if isinstance(value, torch.Tensor):
                        state[f"{u}/{s}/{name}"] = value
                    else:
                        plain[name] = value
                samples.append(plain)
            units.append({"step": unit.step, "samples": samples})
        state["meta"] = {"units": units, "granularity": self.granularity, "last": self._last}
        return state

    def load_state_dict(self, state: Mapping[str, Any], holds: Callable[[int], bool] = lambda unit: True) -> None:
        """All units, with the samples of those whose place `holds` says this rank is to hold; only they are read."""
        meta = state["meta"]
        if meta["granularity"] != self.granularity:
            raise ValueError(
                f"the state holds units of a {meta['granularity']}, this buffer's are of a {self.granularity}"
            )
        self._units.clear()
        keys: dict[int, list[str]] = {}
        for key in state:
            if key.count("/") >= 2:
                keys.setdefault(int(key.split("/", 1)[0]), []).append(key)
        for u, unit in enumerate(meta["units"]):
            samples: list[dict[str, Any] | None] = [None] * len(unit["samples"])
            if holds(u):
                held = [dict(plain) for plain in unit["samples"]]
                for key in keys.get(u, ()):
                    _, s, name = key.split("/", 2)
                    held[int(s)][name] = state[key]
                samples = list(held)
            advantages = state[f"{u}/advantages"]
            if not bool((advantages != 0).any() and advantages.isfinite().all()):
                raise ValueError(
                    f"unit {u} of the buffer's state (step {unit['step']}): expected finite advantages, one of them not "
                    f"0, got {advantages.tolist()}"
                )
            self._units.append(Unit(samples, advantages, unit["step"]))
        self._last = dict(meta["last"])


def merged(metas: list[dict[str, Any]]) -> tuple[dict[str, Any], list[int]]:
    """(the meta of the whole buffer out of every rank's, the rank that held each unit)."""
    every = zip(*(meta["units"] for meta in metas), strict=True)
    ranks = [next(r for r, unit in enumerate(units) if None not in unit["samples"]) for units in every]
    units = [metas[rank]["units"][u] for u, rank in enumerate(ranks)]
    return {**metas[0], "units": units}, ranks


def _check_value(value: Any, where: str) -> None:
    if isinstance(value, list):
        for item in value:
            _check_value(item, where)
            if isinstance(item, torch.Tensor):
                raise ValueError(f"{where}: expected a list of numbers or strings, got tensors; stack them")
    elif not isinstance(value, (torch.Tensor, bool, int, float, str)):
        raise ValueError(f"{where}: expected a tensor, number, string or list of those, got {type(value).__name__}")
