"""Output files: which tensor goes into which shard, and the index beside them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from r1v2_fast.models.conversion import safetensors_file
from r1v2_fast.models.conversion.plan import Target

INDEX = "model.safetensors.index.json"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes of `5GB` (10^9), `5GiB` (2^30), `500MB` or a plain number; raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    size = match and int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))
    if not size:
        raise ValueError(f"--max-shard-size must be a size like 5GB, 2GiB or 500MB, got {text!r}")
    return size


def split(targets: Iterable[Target], max_bytes: int) -> dict[str, list[Target]]:
    """Tensors in their order, a new file where the next would not fit; one larger than `max_bytes` has its own."""
    groups: list[list[Target]] = []
    held = 0
    for target in targets:
        if not groups or held + target.nbytes > max_bytes:
            groups.append([])
            held = 0
        groups[-1].append(target)
        held += target.nbytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, 1)}


def file_names(files: Mapping[str, list[Target]]) -> list[str]:
    return [*files, *([INDEX] if len(files) > 1 else [])]


def write(folder: Path, files: Mapping[str, list[Target]]) -> None:
    """The files and, where there are several, their index."""
    for name, group in files.items():
        safetensors_file.write(folder / name, group)
    if len(files) > 1:
        total = sum(target.nbytes for group in files.values() for target in group)
        weight_map = {target.name: name for name, group in files.items() for target in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
