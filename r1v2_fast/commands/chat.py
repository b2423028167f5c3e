"""r1v2-fast chat: answers to questions about pictures."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from r1v2_fast.commands.model import check_at_least, open_model
from r1v2_fast.data.images import open_image
from r1v2_fast.data.records import MARK, Record
from r1v2_fast.rollout.engine import Prompt
from r1v2_fast.rollout.generation import LocalEngine
from r1v2_fast.train.context import Corpus


class Pictures(Corpus):
    """Pictures from anywhere on the disk: a key is a path."""

    def __init__(self) -> None:
        super().__init__(Path())

    def image(self, key: str) -> Image.Image:
        return open_image(key, root=Path(), allow_outside=True, where="--image")


def run(
    model: str, question: str | None, *, image: list[str], temperature: float, max_new_tokens: int, device: str
) -> Iterator[str]:
    """The answer to `question`; without one, to each line of stdin until it ends or a line is empty.

    Pictures stand where the first question has `<image>` marks, else before it.
    """
    check_at_least(0, temperature=temperature)
    check_at_least(1, max_new_tokens=max_new_tokens)
    pictures = Pictures()
    for path in image:  # before the model loads, which can take minutes
        pictures.image(path)
    policy, reader = open_model(model, pictures, device)
    engine = LocalEngine(policy)
    history: list[dict] = []
    for text in [question] if question is not None else _lines():
        marked = text if history or MARK in text else f"{MARK}\n" * len(image) + text
        if (marks := marked.count(MARK)) != (expected := 0 if history else len(image)):
            raise ValueError(f"expected {expected} {MARK} marks in the question, one a picture, got {marks}")
        history.append({"role": "user", "content": marked})
        record = Record("chat", history, tuple(image), None, None, None, where="chat")
        prompt = Prompt(record.id, reader.encoder.encode(record, reader.pixels.tiles(image)), image)
        (response,) = engine.generate(
            [prompt],
            group_size=1,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seeds=[secrets.randbits(63)],  # another answer every time, where the temperature is above 0
        )
        answer = reader.encoder.decode(response.ids)
        yield answer
        history.append({"role": "assistant", "content": answer.replace(MARK, "")})  # it brought no picture


def _lines() -> Iterator[str]:
    while True:
        if sys.stdin.isatty():
            sys.stderr.write("> ")
            sys.stderr.flush()
        if not (line := sys.stdin.readline().strip()):
            return
        yield line
