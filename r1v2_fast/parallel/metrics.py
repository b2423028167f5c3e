"""Metrics of a step out of those of its micro-batches, optimizer steps and ranks."""

from __future__ import annotations

from typing import Any

from r1v2_fast.parallel.world import World


class Mean:
    """Weighted means by name; names that end in min or max are extremes, `sums` are added. Device tensors are not read."""

    def __init__(self, *, sums: tuple[str, ...] = ("num_tokens",)) -> None:
        self._sums = sums
        self._values: dict[str, list[tuple[Any, float]]] = {}

    def add(self, metrics: dict[str, Any], *, weight: float = 1, weights: dict[str, float] | None = None) -> None:
        """`weights` are those of metrics that are means over something else."""
        for name, value in metrics.items():
            self._values.setdefault(name, []).append((value, (weights or {}).get(name, weight)))

    def gathered(self, world: World) -> Mean:
        """Of all ranks, as if they were further micro-batches; reads device tensors where there are several."""
        if world.size == 1:
            return self
        whole = Mean(sums=self._sums)
        for own in world.gather({n: [(float(v), w) for v, w in pairs] for n, pairs in self._values.items()}):
            for name, pairs in own.items():
                whole._values.setdefault(name, []).extend(pairs)
        return whole

    def values(self) -> dict[str, Any]:
        return {name: self._combined(name, pairs) for name, pairs in self._values.items()}

    def _combined(self, name: str, pairs: list[tuple[Any, float]]) -> Any:
        values = [value for value, _ in pairs]
        if name in self._sums:
            return sum(values)
        if name.endswith(("/min", "/max", "_min", "_max")):
            pick = min if name.endswith("min") else max
            return pick(float(value) for value in values) if len(values) > 1 else values[0]
        if len(values) == 1:
            return values[0]
        total = sum(weight for _, weight in pairs)
        return sum(value * weight for value, weight in pairs) / total
