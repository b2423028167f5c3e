"""A prompt pool on disk: records in our own layout, as .jsonl beside their pictures or as .parquet with these inside."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from r1v2_fast.data.records import FIELDS, Dataset, Record

ROWS = 64  # of a parquet file in memory with their pictures


def check(path: Path, dataset: Dataset, records: list[Record]) -> None:
    """Raises ValueError where `path` cannot hold the records: better before the rollouts than after them."""
    if path.suffix == ".parquet":
        _table(records, {})
    elif path.suffix == ".jsonl":
        if any(record.images for record in records) and path.parent.resolve() != dataset.root.resolve():
            raise ValueError(
                f"a .jsonl must lie where its image paths start, expected {dataset.root / path.name}, got {path}; "
                "or write .parquet, which holds the pictures"
            )
        _lines(records, {})
    else:
        raise ValueError(f"expected a .jsonl or .parquet file to write, got {path}")


def write(path: Path, dataset: Dataset, records: list[Record], columns: dict[str, list]) -> None:
    """Write the records with `columns` added, whole or not at all."""
    with whole(path) as partial:
        if path.suffix == ".jsonl":
            partial.write_text("".join(_lines(records, columns)), encoding="utf-8")
        else:
            _write_parquet(partial, dataset, records, columns)


@contextlib.contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its name at the end; a failure leaves nothing.

    raises  RuntimeError where the disk is full or read-only
    """
    partial = path.with_name(path.name + ".partial")
    try:
        yield partial
        os.replace(partial, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError):
            raise RuntimeError(f"cannot write {path}: {error}; make room and start again to go on") from error
        raise


def _row(record: Record, columns: dict[str, list], index: int) -> dict[str, Any]:
    fields = {name: value for name in FIELDS if (value := getattr(record, name)) is not None}
    return {**fields, **record.columns, **{name: values[index] for name, values in columns.items()}}


def _lines(records: list[Record], columns: dict[str, list]) -> list[str]:
    lines = []
    for index, record in enumerate(records):
        try:
            lines.append(json.dumps(_row(record, columns, index)) + "\n")
        except TypeError as error:
            raise ValueError(f"{record.where}: {error}; write .parquet, which holds pictures and any type") from error
    return lines


def _table(records: list[Record], columns: dict[str, list]):
    """Every field but the pictures."""
    import pyarrow as pa
    import pyarrow.parquet as parquet

    rows = [_row(record, columns, index) for index, record in enumerate(records)]
    arrays = {}
    for name in dict.fromkeys(name for row in rows for name in row if name != "images"):
        try:
            arrays[name] = pa.array([row.get(name) for row in rows])
            parquet.ParquetWriter(pa.BufferOutputStream(), pa.schema([(name, arrays[name].type)])).close()
        except (pa.ArrowException, OverflowError) as error:
            raise ValueError(f"field {name!r} does not fit a .parquet column ({error}); write .jsonl") from error
    return pa.table(arrays)


def _write_parquet(path: Path, dataset: Dataset, records: list[Record], columns: dict[str, list]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    table = _table(records, columns)
    pictures = pa.field("images", pa.list_(pa.binary()))
    with parquet.ParquetWriter(path, table.schema.append(pictures)) as writer:
        for start in range(0, len(records), ROWS):
            images = [
                [image if isinstance(image, bytes) else (dataset.root / image).read_bytes() for image in record.images]
                for record in records[start : start + ROWS]
            ]
            rows = table.slice(start, ROWS)
            writer.write_table(rows.append_column(pictures, pa.array(images, pictures.type)))
