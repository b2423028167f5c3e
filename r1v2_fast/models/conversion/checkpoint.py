"""A folder's weights: its shards found, checked against their index and each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from r1v2_fast.models.conversion import pickles, safetensors_file
from r1v2_fast.models.conversion.plan import Stored

SAFE = ("model.safetensors.index.json", "model.safetensors")
PICKLED = ("pytorch_model.bin.index.json", "pytorch_model.bin")


def read_json(path: Path) -> dict[str, Any]:
    """raises  ValueError where it is not a JSON object"""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # of JSON and of UTF-8
        raise ValueError(f"{path}: cannot read it as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}")
    return found


def read(folder: Path, *, allow_pickle: bool) -> dict[str, Stored]:
    """Every tensor by name; only headers are read.

    raises  ValueError where there are no weights, they are pickles that nobody allowed, a shard is missing, cut short
            or does not hold what the index says, or two shards hold the same tensor
    """
    if found := next((name for name in SAFE if (folder / name).is_file()), None):
        return _read(folder, found, safetensors_file.read_header)
    if found := next((name for name in PICKLED if (folder / name).is_file()), None):
        if not allow_pickle:
            raise ValueError(
                f"{folder}: expected safetensors, got the pickle {found}; --allow-pickle reads it with weights_only"
            )
        return _read(folder, found, pickles.read)
    raise ValueError(f"{folder} holds no weights: expected {' or '.join(SAFE)} there")


def _read(folder: Path, name: str, read_file: Callable[[Path], dict[str, Stored]]) -> dict[str, Stored]:
    if not name.endswith(".index.json"):
        return read_file(folder / name)
    weight_map = read_json(folder / name).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{folder / name}: expected a weight_map of tensor names to files, got {weight_map!r}")
    for tensor, file in weight_map.items():  # a link in the folder is fine, a hub's cache is made of them
        if not isinstance(file, str) or not file or Path(file).name != file or file in (".", "..") or "\\" in file:
            raise ValueError(f"{folder / name}: {tensor}: expected the name of a file in the folder, got {file!r}")
    files = sorted(set(weight_map.values()))
    if absent := [file for file in files if not (folder / file).is_file()]:
        raise ValueError(f"{folder}: {name} names {len(absent)} of {len(files)} files that are not there: {absent[:4]}")
    found: dict[str, Stored] = {}
    for file in files:
        held = read_file(folder / file)
        listed = {tensor for tensor, where in weight_map.items() if where == file}
        if listed != held.keys():
            lacks, extra = sorted(listed - held.keys()), sorted(held.keys() - listed)
            raise ValueError(
                f"{folder / file}: it does not hold what {name} says; "
                f"{len(lacks)} tensors not there {lacks[:4]}, {len(extra)} not in the index {extra[:4]}"
            )
        found |= held
    return found
