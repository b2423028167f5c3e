"""The plan of one policy stage: its work, memory and time on given GPUs, and which changes would make it fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from r1v2_fast import config
from r1v2_fast.plan import gpus, memory, time, work
from r1v2_fast.plan.shapes import Shapes

GIB = 2**30
COUNTS = (1, 2, 4, 8, 16, 32, 64)
SHARDS: tuple[memory.Shard, ...] = ("none", "full")


@dataclass(frozen=True)
class Stage:
    """A stage of a recipe on `count` GPUs; everything else follows from it."""

    name: str
    recipe: config.Recipe
    shapes: Shapes
    gpu: gpus.GPU
    efficiency: gpus.Efficiency
    count: int
    between_nodes: float
    prompt: int
    response: int
    tiles: int
    shard: memory.Shard

    @property
    def settings(self) -> config.MPO | config.GRPO:
        return getattr(self.recipe, self.name)

    @property
    def work(self) -> work.Work:
        return work.of(
            self.name, self.settings, self.recipe, gpus=self.count, prompt=self.prompt, response=self.response,
            tiles=self.tiles,
        )  # fmt: skip

    @property
    def needs(self) -> memory.Settings:
        """What bears on memory; raises ValueError where the stage trains what the formulas do not cover."""
        stage, model, rollout = self.settings, self.recipe.model, self.recipe.rollout
        if stage.lora or "vision" in stage.train:
            got = [*stage.train, *(f"lora.{part}" for part in stage.lora)]
            raise ValueError(f"expected {self.name}.train among adapter and llm, in full, got {', '.join(got)}")
        kl = isinstance(stage, config.GRPO) and stage.loss.kl_coef > 0
        return memory.Settings(
            width=4 if model.dtype == "float32" else 2,
            trains_llm="llm" in stage.train,
            checkpointing=stage.gradient_checkpointing,
            attention="flex" if model.attention == "auto" else model.attention,
            fused_layers=model.fused_layers == "on",
            reference=self.name == "mpo" or kl,
            feature_cache=model.feature_cache_gib * GIB,
            max_rows=rollout.max_rows,
            prefill_tokens=rollout.prefill_tokens,
        )

    @property
    def memory(self) -> dict[str, dict[str, float]]:
        """Bytes by phase and part."""
        return memory.by_part(self.shapes, self.work, self.needs, gpus=self.count, shard=self.shard)

    @property
    def room(self) -> float:
        """Bytes left for tensors: the GPU's, less the CUDA context and the allocator's reserve."""
        return self.gpu.memory * (1 - memory.RESERVE) - memory.CONTEXT

    @property
    def sums(self) -> dict[str, float]:
        """Bytes of each phase with what is held throughout."""
        parts = {phase: sum(sizes.values()) for phase, sizes in self.memory.items()}
        return {phase: size + (parts["held"] if phase != "held" else 0.0) for phase, size in parts.items()}

    @property
    def over(self) -> list[str]:
        """The phases that do not fit."""
        return [phase for phase, size in self.sums.items() if size > self.room]

    @property
    def machine(self) -> time.Machine:
        return time.Machine(self.gpu, self.efficiency, self.count, self.between_nodes, self.needs.width)

    @property
    def time(self) -> dict[str, time.Part]:
        """Seconds by part."""
        return time.by_part(self.shapes, self.work, self.needs, self.machine, self.shard)

    def set(self, section: str, **values: Any) -> Stage:
        """The same with keys of one of the recipe's sections changed."""
        changed = getattr(self.recipe, section).model_copy(update=values)
        return replace(self, recipe=self.recipe.model_copy(update={section: changed}))


@dataclass(frozen=True)
class Remedy:
    """Changes after which a stage fits."""

    changes: list[str]
    stage: Stage


def remedies(stage: Stage) -> list[Remedy]:
    """The recipe's own knobs together, then more GPUs, then another GPU; only what was computed to fit is named."""
    if not stage.over:
        return []
    found = [knobs for knobs in [_knobs(stage)] if knobs is not None]
    found += next(([remedy] for remedy in _more(stage)), [])
    for name, other in gpus.GPUS.items():
        for shard in SHARDS:
            larger = replace(stage, gpu=other, efficiency=gpus.efficiency(name), shard=shard)
            if other.memory > stage.gpu.memory and not larger.over:
                return [*found, Remedy([f"--gpu {name} --shard {shard}"], larger)]
    return found


def _knobs(stage: Stage) -> Remedy | None:
    changes: list[str] = []
    if "held" in stage.over:
        return None
    if "training" in stage.over and not stage.settings.gradient_checkpointing:
        stage = stage.set(stage.name, gradient_checkpointing=True)
        changes.append(f"{stage.name}.gradient_checkpointing=true")
    tokens, shorter = stage.work.largest.tokens, False
    while "training" in stage.over and (tokens := tokens * 3 // 4) > stage.prompt:
        stage, shorter = stage.set(stage.name, micro_batch_tokens=tokens), True
    if shorter:
        changes.append(f"{stage.name}.micro_batch_tokens={tokens}")
    if "rollout" in stage.over:
        stage, more = _smaller_rollout(stage)
        changes += more
    return None if stage.over else Remedy(changes, stage)


def _smaller_rollout(stage: Stage) -> tuple[Stage, list[str]]:
    """The most rows that fit; a prefill of one prompt at a time where rows alone do not help."""
    changes = []
    if "rollout" in stage.set("rollout", max_rows=1).over:
        stage = stage.set("rollout", prefill_tokens=stage.prompt)
        changes.append(f"rollout.prefill_tokens={stage.prompt}")
    low, high = 1, memory.slots(stage.work, stage.needs)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (low, middle - 1) if "rollout" in stage.set("rollout", max_rows=middle).over else (middle, high)
    return stage.set("rollout", max_rows=low), [*changes, f"rollout.max_rows={low}"]


def _more(stage: Stage) -> Iterator[Remedy]:
    for count in (count for count in COUNTS if count > stage.count):
        for shard in SHARDS:
            larger = replace(stage, count=count, shard=shard)
            if not larger.over:
                yield Remedy([f"--gpus {count} --shard {shard}"], larger)
            elif (knobs := _knobs(larger)) is not None and _knobs(stage) is None:
                yield Remedy([f"--gpus {count} --shard {shard}", *knobs.changes], knobs.stage)
