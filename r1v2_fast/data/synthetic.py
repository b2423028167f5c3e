"""Made-up records with pictures, in the place of a recipe's own where only its speed and memory are of interest."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

RECORDS = 64  # a file, where nothing else is asked for
SHAPES = (
    (448, 448),
    (896, 448),
    (448, 896),
    (896, 896),
    (1344, 896),
)  # width, height: 1 to 7 tiles of 448 with thumbnail


def write(folder: Path, files: list[str], *, seed: int, sizes: Mapping[str, int]) -> None:
    """Write each of `files` (.jsonl or .parquet): sums of two numbers in noise, with answers, and pairs for ready-made MPO.

    sizes  records by the file's stem
    A pure function of the seed and sizes; a folder that is complete is left as it is.
    raises  ValueError on a file of another kind
    """
    if folder.is_dir():
        return
    temporary = folder.with_name(folder.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    for number, file in enumerate(files):
        path = temporary / file
        pictures = path.with_suffix("")
        pictures.mkdir(parents=True)
        rows = [
            _row(pictures, index, np.random.default_rng([seed, number, index]))
            for index in range(sizes.get(path.stem, RECORDS))
        ]
        _write(path, rows)
    os.replace(temporary, folder)


def _row(folder: Path, index: int, rng: np.random.Generator) -> dict:
    width, height = SHAPES[index % len(SHAPES)]
    noise = rng.integers(0, 256, (height // 14, width // 14, 3), dtype=np.uint8)
    path = folder / f"{index}.png"
    Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST).save(path)
    a, b = (int(n) for n in rng.integers(0, 100, 2))
    think = f"<think>{a} and {b} make {a + b}.</think>"
    return {
        "id": f"{folder.name}-{index}",
        "prompt": f"<image>\nWhat is {a} + {b}? Think between <think> and </think>, then answer.",
        "images": [f"{folder.name}/{path.name}"],
        "answer": str(a + b),
        "response": f"{think}{a + b}",
        "chosen": f"{think}{a + b}",
        "rejected": f"{think}{a + b + 1}",
    }


def _write(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as parquet

        parquet.write_table(pa.Table.from_pylist(rows), path)
    else:
        raise ValueError(f"{path.name}: expected a .jsonl or .parquet file, got {path.suffix!r}")
