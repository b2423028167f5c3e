"""What several ranks cannot do, said before the first step."""

from __future__ import annotations

from r1v2_fast.config import Recipe
from r1v2_fast.parallel.world import World


def check(recipe: Recipe, world: World) -> None:
    """raises  RuntimeError where several ranks cannot do what the recipe asks for"""
    if world.size == 1 or recipe.rollout.engine != "vllm":
        return
    if recipe.rollout.weight_transfer is not None:
        raise RuntimeError(
            "rollout.weight_transfer sends from one process; on several ranks rollout.engine=local works, or vllm for "
            "stages that train the adapter or the tower alone"
        )
    sections = (getattr(recipe, name) for name in recipe.run.stages)
    tower = any("vision" in {*section.train, *section.lora} for section in sections)
    if tower and recipe.run.shard == "full":
        raise RuntimeError(
            "ranks ask a vLLM server at their own pace, a sharded tower that trains needs them in step; "
            "run.shard=none works, or rollout.engine=local"
        )
