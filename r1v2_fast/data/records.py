"""Records: jsonl or parquet, one prompt a line, with its images, its answer and any further columns.

TRL's, verl's and MMPR's layouts are read too (`layouts.py`).
Errors name the file, the record and the field, with what was expected and what was found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np
from PIL import Image

from r1v2_fast.data.images import open_image
from r1v2_fast.data.layouts import MARK, canonical, marks_of

FIELDS = ("id", "prompt", "images", "answer", "chosen", "rejected")


@dataclass(frozen=True)
class Record:
    """One prompt. `prompt` is a string with `<image>` marks, or messages whose content has image parts."""

    id: str
    prompt: str | list[dict]
    images: tuple[str | bytes, ...]
    answer: str | None
    chosen: str | None
    rejected: str | None
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""


class Dataset:
    """The records of one file, checked when read; images open later, by key.

    root           the folder that image paths are relative to and may not leave (default: the file's folder)
    allow_outside  True lets image paths leave the root
    raises         ValueError on the first malformed record; nothing is skipped
    """

    def __init__(self, path: str | Path, *, root: str | Path | None = None, allow_outside: bool = False):
        self.path = Path(path)
        self.name = self.path.stem
        self.root = Path(root) if root is not None else self.path.parent
        self.allow_outside = allow_outside
        self.records = [self._record(row, index, where) for index, (row, where) in enumerate(_rows(self.path))]
        if not self.records:
            raise ValueError(f"{self.path} holds no records")
        self._by_id: dict[str, Record] = {}
        for record in self.records:
            if record.id in self._by_id:
                raise ValueError(
                    f"{record.where}, field 'id': {record.id!r} stands at {self._by_id[record.id].where} too"
                )
            self._by_id[record.id] = record

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        return self.records[index]

    def check_answers(self, rule: str) -> None:
        """For a rule that compares with `answer`: a misspelt column must not leave every response unscored in silence."""
        if all(record.answer is None for record in self.records):
            raise ValueError(f"{self.path}, field 'answer': {rule} compares with it, and no record has one")

    def image_keys(self, record: Record) -> list[str]:
        return [f"{self.name}/{record.id}/{index}" for index in range(len(record.images))]

    def image(self, key: str) -> Image.Image:
        """The picture behind a key of `image_keys`."""
        record_id, index = key[len(self.name) + 1 :].rsplit("/", 1)
        record = self._by_id[record_id]
        source = record.images[int(index)]
        return open_image(source, root=self.root, allow_outside=self.allow_outside, where=record.where)

    def _record(self, row: dict, index: int, where: str) -> Record:
        row = canonical(row, where)

        def text(name: str, default: str | None = None) -> str | None:
            value = row.get(name)
            if value is None:
                return default
            if name in ("id", "answer") and isinstance(value, (int, float)) and not isinstance(value, bool):
                # pandas makes integers with nulls among them double
                return str(int(value) if isinstance(value, float) and value.is_integer() else value)
            if not isinstance(value, str):
                raise ValueError(f"{where}, field {name!r}: expected a string, got {type(value).__name__}")
            return value

        identity = text("id") or f"{self.name}-{index}"
        where = f"{where} (id {identity!r})"
        prompt = _prompt(row, where)
        images = _images(row, where)
        if (marks := marks_of(prompt)) != len(images):
            hint = f"; put {MARK} where a picture belongs" if marks < len(images) else ""
            raise ValueError(
                f"{where}, field 'images': the prompt has {marks} {MARK} marks, got {len(images)} images{hint}"
            )
        chosen, rejected = text("chosen"), text("rejected")
        if (chosen is None) != (rejected is None):
            missing = "rejected" if rejected is None else "chosen"
            raise ValueError(f"{where}, field {missing!r}: a pair needs chosen and rejected, got only one of them")
        columns = {name: value for name, value in row.items() if name not in FIELDS}
        return Record(identity, prompt, images, text("answer"), chosen, rejected, columns, where)


def draw(n: int, size: int, *, seed: int, step: int) -> list[int]:
    """Indices of step `step` when epochs are shuffled walks over range(n): a pure function, so a resume needs no state."""
    indices = []
    for position in range(step * size, (step + 1) * size):
        epoch, offset = divmod(position, n)
        indices.append(int(_permutation(n, seed, epoch)[offset]))
    return indices


_last_permutation: tuple[tuple[int, int, int], np.ndarray] | None = None


def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    global _last_permutation
    key = (n, seed, epoch)
    if _last_permutation is None or _last_permutation[0] != key:
        _last_permutation = (key, np.random.default_rng([seed, epoch]).permutation(n))
    return _last_permutation[1]


def _rows(path: Path) -> Iterator[tuple[dict, str]]:
    if not path.is_file():
        raise ValueError(f"no such data file: {path}")
    if path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        try:
            rows = parquet.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: not a readable parquet file: {error}") from error
        for index, row in enumerate(rows):
            yield row, f"{path} row {index}"
    elif path.suffix == ".jsonl":
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                try:
                    row = json.loads(line.decode("utf-8-sig"))
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: not UTF-8: {error}") from error
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
                yield row, where
    else:
        raise ValueError(f"{path}: expected a .jsonl or .parquet file, got {path.suffix!r}")


def _prompt(row: dict, where: str) -> str | list[dict]:
    prompt = row.get("prompt")
    if (isinstance(prompt, str) and prompt) or isinstance(prompt, list):  # a list's messages are checked already
        return prompt
    expected = "a non-empty string or a list of messages with role and content"
    raise ValueError(f"{where}, field 'prompt': expected {expected}, got {short(prompt)}")


def _images(row: dict, where: str) -> tuple[str | bytes, ...]:
    value = row.get("images")
    if value is None:
        return ()
    sources = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, dict):  # Hugging Face's parquet layout
            item = item.get("bytes") or item.get("path")
        if not isinstance(item, (str, bytes)) or not item:
            raise ValueError(
                f"{where}, field 'images': expected a path or bytes, got {type(item).__name__} {short(item)}"
            )
        sources.append(item)
    return tuple(sources)
