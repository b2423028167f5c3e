"""What stands in for the missing parts of a recipe with dummy weights, so that its steps are real in all but meaning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from r1v2_fast.config import Recipe
from r1v2_fast.judge.panel import REWARD_MODEL


def stand_in(recipe: Recipe, say: Callable[[str], None]) -> Recipe:
    """The recipe with made-up records where data.folder has none of its files, coin flips for rule rewards, no masking.

    Random weights never answer right: without a reward that differs nothing would train, and training is what is tried.
    A recipe without model.dummy_weights comes back as it is.
    """
    if not recipe.model.dummy_weights:
        return recipe
    recipe = recipe.model_copy(deep=True)
    say(
        f"dummy weights: {recipe.model.preset} is filled at random, its tokenizer is made up, and every rule reward is a "
        "coin flip. Speed and memory are real, nothing else is"
    )
    for name in recipe.run.stages:
        for term in getattr(getattr(recipe, name), "rewards", []):
            term.function = term.function if term.function == REWARD_MODEL else "coin_flip"
    if recipe.grpo is not None:  # random weights hardly ever end a response: every one would be masked
        recipe.grpo.mask_truncated = False
    data = recipe.data
    if data.make is None and not any((Path(data.folder) / file).exists() for file in recipe.files()):
        say(f"{data.folder}/ holds none of the recipe's records ({', '.join(recipe.files())}): made-up ones stand in")
        data.make, data.folder, data.root = "synthetic", "synthetic", None
    return recipe
