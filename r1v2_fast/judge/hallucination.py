"""Hallucination in the digits recipe: a digit in the thought that is not in the picture."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from r1v2_fast.judge.rules import thought

EMPTY = "_"


def readable(value: Any) -> bool:
    """True for what the digits records have in `digits`, left and right half: "3 8" or "3 _"."""
    return isinstance(value, str) and re.fullmatch("[0-9_] [0-9_]", value) is not None


def hallucinated(completion: str, digits: str) -> bool:
    """True if the thought names a digit that the picture lacks, or any digit where a half is empty.

    `digits` are the picture's left and right half, such as "3 8" or "3 _".
    """
    said = thought(completion).split()
    claimed = Counter(character for slot in said for character in slot if character.isdigit())
    seen = Counter(digits.replace(EMPTY, "").split())
    if claimed - seen:
        return True
    halves = digits.split()
    return any(half == EMPTY and any(map(str.isdigit, slot)) for half, slot in zip(halves, said, strict=False))


def faithful(prompts: list[str], completions: list[str], *, digits: list[str], **columns) -> list[float]:
    """1 where the thought names nothing that is not in the picture, else 0: a labeller's judgement."""
    return [float(not hallucinated(c, d)) for c, d in zip(completions, digits, strict=True)]


def rates(completions: list[str], digits: list[str], right: list[bool]) -> dict[str, float]:
    """Share of hallucinating completions: of all, of those with a right and of those with a wrong answer."""
    flags = [hallucinated(c, d) for c, d in zip(completions, digits, strict=True)]

    def share(picked: list[bool]) -> float:
        return sum(picked) / len(picked) if picked else float("nan")

    return {
        "hallucination": share(flags),
        "hallucination/right": share([f for f, r in zip(flags, right, strict=True) if r]),
        "hallucination/wrong": share([f for f, r in zip(flags, right, strict=True) if not r]),
    }
