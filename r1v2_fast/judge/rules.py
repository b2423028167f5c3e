"""Rule and format rewards, in TRL's calling convention: f(prompts, completions, **columns) -> one float a completion."""

from __future__ import annotations

import re
import zlib

_THINK = re.compile(r"<think>(?P<think>.*?)</think>(?P<answer>.*)", re.DOTALL)


def final_answer(completion: str) -> str:
    """What stands behind the last `</think>`, stripped; all of it where there is no tag."""
    return completion.rsplit("</think>", 1)[-1].strip()


def thought(completion: str) -> str:
    """What stands in the first `<think>` block; empty where there is none."""
    match = _THINK.search(completion)
    return match["think"].strip() if match else ""


def exact_match(prompts: list, completions: list[str], *, answer: list[str | None], **columns) -> list[float | None]:
    """1 where the final answer is the record's answer to the letter, else 0; None where the record has no answer."""
    pairs = zip(completions, answer, strict=True)
    return [None if a is None else float(final_answer(c) == a.strip()) for c, a in pairs]


def math_answer(prompts: list, completions: list[str], *, answer: list[str | None], **columns) -> list[float | None]:
    """1 where the final answer equals the record's as mathematics (math-verify), else 0; None where it has no answer."""
    from math_verify import parse, verify

    def right(completion: str, gold: str) -> bool:
        said = final_answer(completion)
        # the answer may be bare ("1/2") or boxed; math-verify reads LaTeX between dollar signs
        return said == gold.strip() or any(
            verify(parse(f"${gold}$"), parse(text)) for text in (said, f"${said}$") if text.strip("$")
        )

    return [None if a is None else float(right(c, a)) for c, a in zip(completions, answer, strict=True)]


def think_format(prompts: list, completions: list[str], **columns) -> list[float]:
    """1 where a completion is one `<think>...</think>` block and an answer, neither of them empty, else 0."""

    def formed(completion: str) -> bool:
        if completion.count("<think>") != 1 or completion.count("</think>") != 1:
            return False
        match = _THINK.fullmatch(completion.strip())
        return bool(match and match["think"].strip() and match["answer"].strip())

    return [float(formed(completion)) for completion in completions]


def coin_flip(prompts: list, completions: list[str], **columns) -> list[float]:
    """1 or 0 by a completion's checksum: a reward that differs within a group where the weights are random."""
    return [float(zlib.crc32(completion.encode()) & 1) for completion in completions]


def soft_overlong(lengths: list[int], *, max_length: int, cache: int) -> list[float]:
    """Soft over-length punishment: a response near the limit is punished the more, the closer it comes.

    r(n) = 0                                n <= max_length - cache
           (max_length - cache - n) / cache  max_length - cache < n <= max_length
           -1                               n > max_length

    source  DAPO (2503.14476) eq. 13, there with max_length 20480 and cache 4096 tokens
    """
    if not 0 < cache <= max_length:
        raise ValueError(f"cache must lie above 0 and at most at max_length = {max_length}, got {cache}")
    return [min(0.0, max(-1.0, (max_length - cache - length) / cache)) for length in lengths]
