"""A checkpoint's folder: a safetensors file of each rank, and an index that any number of ranks can read.

state.json  {"ranks": how many wrote it, "files": {name: {bytes, blake2b}}, "tensors": {name: {dtype, shape, parts}}, ...}; parts
            are [rank, first row], in order: a tensor that several ranks shard lies in their files by rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from r1v2_fast.atomic import digest, replacing, sync, writing
from r1v2_fast.parallel.shards import local_rows, place
from r1v2_fast.parallel.world import World

INDEX = "state.json"


def file_of(rank: int) -> str:
    return f"rank-{rank:05d}.safetensors"


def write(target: Path, world: World, tensors: Mapping[str, torch.Tensor], state: dict[str, Any]) -> None:
    """Every rank's `tensors` and the first rank's `state`, whole or not at all: the folder takes its name at the end.

    A name that several ranks have in full is written once, one that is sharded by each.
    raises  RuntimeError on all ranks where one cannot write; what stood at `target` still stands
    """
    own = {name: local_rows(tensor) for name, tensor in tensors.items()}
    told = world.gather(
        {n: (str(t.dtype).removeprefix("torch."), list(tensors[n].shape), s) for n, (t, s) in own.items()}
    )
    with ExitStack() as stack:
        partial = target.with_name(f"{target.name}.partial")
        with world.together():
            if world.first:
                stack.enter_context(replacing(target))
        file = partial / file_of(world.rank)
        with world.together(), writing(target):
            mine = {
                n: t
                for n, (t, start) in own.items()
                if start is not None or all(n not in r for r in told[: world.rank])
            }
            # clones: safetensors refuses tensors that share memory, as the tied ones of a buffer's samples may
            save_file({name: tensor.clone().contiguous().cpu() for name, tensor in mine.items()}, str(file))
            sync(file)
            found = {"bytes": file.stat().st_size, "blake2b": digest(file)}
        files = {file_of(rank): held for rank, held in enumerate(world.gather(found))}
        with world.together():
            if world.first:
                index = {**state, "ranks": world.size, "files": files, "tensors": _index(told)}
                with writing(target):
                    (partial / INDEX).write_text(json.dumps(index))
                stack.close()


def _index(told: list[dict[str, tuple[str, list[int], int | None]]]) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for rank, names in enumerate(told):
        for name, (dtype, shape, start) in names.items():
            entry = tensors.setdefault(name, {"dtype": dtype, "shape": shape, "parts": []})
            if start is not None or not entry["parts"]:
                entry["parts"].append([rank, start or 0])
    return tensors


def broken(path: Path, world: World) -> str | None:
    """Why a checkpoint cannot be used, None if it can; the ranks share the reading."""
    found: str | None = None
    try:
        files = json.loads((path / INDEX).read_text())["files"]
        for name in list(files)[world.rank :: world.size]:
            got = (path / name).stat().st_size
            if got != files[name]["bytes"]:
                found = f"{name} has {got} bytes, {files[name]['bytes']} were written"
            elif digest(path / name) != files[name]["blake2b"]:
                found = f"{name} does not hold what was written"
    except (OSError, ValueError, KeyError) as error:
        found = f"{type(error).__name__}: {error}"
    return next((said for said in world.gather(found) if said is not None), None)


class Stored(Mapping[str, torch.Tensor]):
    """The tensors of a checkpoint whose names begin with `prefix`, without it; each is read when it is asked for."""

    def __init__(self, path: Path, index: dict[str, Any], prefix: str = ""):
        self.path, self.index, self.prefix = path, index, prefix

    def below(self, prefix: str) -> Stored:
        return Stored(self.path, self.index, self.prefix + prefix)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.index["tensors"] if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.index["tensors"][self.prefix + name]["shape"])

    def __getitem__(self, name: str) -> torch.Tensor:
        parts = self._parts(name)
        return parts[0][1][...] if len(parts) == 1 else torch.cat([rows[...] for _, rows in parts])

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows of the whole tensor, from the files that hold them."""
        parts = [(first, rows, first + rows.get_shape()[0]) for first, rows in self._parts(name)]
        found = [r[max(start - a, 0) : min(stop, b) - a] for a, r, b in parts if a < stop and b > start]
        return torch.cat(found) if found else parts[0][1][:0]

    def like(self, name: str, reference: torch.Tensor) -> torch.Tensor:
        """On the device of `reference`, and sharded as it is."""
        return place(reference, lambda start, stop: self.rows(name, start, stop), lambda: self[name])

    def _parts(self, name: str) -> list[tuple[int, Any]]:
        """(first row, lazy slice) in order."""
        full = self.prefix + name
        return [
            (start, safe_open(self.path / file_of(rank), framework="pt").get_slice(full))
            for rank, start in self.index["tensors"][full]["parts"]
        ]


def opened(path: Path) -> tuple[dict[str, Any], Stored]:
    """(the index, its tensors)."""
    index = json.loads((path / INDEX).read_text())
    return index, Stored(path, index)
