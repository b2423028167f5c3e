"""Reward functions by name or by `path.py:name`, called with checks that name the function and the sample."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from r1v2_fast.judge import hallucination, rules

RewardFunction = Callable[..., list[float]]
BUILT_IN: dict[str, RewardFunction] = {
    "exact_match": rules.exact_match,
    "math_answer": rules.math_answer,
    "think_format": rules.think_format,
    "faithful": hallucination.faithful,
}


def load_reward(spec: str) -> RewardFunction:
    """A built-in reward's name, or `path/to/file.py:name`; raises ValueError that says what is missing."""
    if spec in BUILT_IN:
        return BUILT_IN[spec]
    path, separator, name = spec.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise ValueError(f"a reward must be one of {sorted(BUILT_IN)} or path.py:name, got {spec!r}")
    if not Path(path).is_file():
        raise ValueError(f"reward {spec!r}: no such file {path}")
    module_spec = importlib.util.spec_from_file_location(f"r1v2_fast_reward_{Path(path).stem}", path)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"reward {spec!r}: {path} has no function {name!r}")
    return function


def score(
    name: str,
    function: RewardFunction,
    prompts: list[str],
    completions: list[str],
    columns: dict[str, list],
    ids: list[str],
) -> list[float]:
    """The rewards of all completions as floats; None means unscorable and becomes NaN.

    raises  RuntimeError naming the function where it raises; ValueError where it returns the wrong count or type
    """
    try:
        values = function(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        raise RuntimeError(
            f"reward {name!r} raised {type(error).__name__} on samples {ids[0]} to {ids[-1]}: {error}"
        ) from error
    if not isinstance(values, (list, tuple)) or len(values) != len(completions):
        got = len(values) if isinstance(values, (list, tuple)) else type(values).__name__
        raise ValueError(f"reward {name!r} must return a list of {len(completions)} numbers, got {got}")
    scores = []
    for sample, value in zip(ids, values, strict=True):
        if value is None:
            value = math.nan
        if not isinstance(value, (int, float)):
            raise ValueError(f"reward {name!r} of sample {sample}: expected a number, got {value!r}")
        scores.append(float(value))
    return scores
