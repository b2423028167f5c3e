"""Launch parameters from one JSON per device beside this file, by the nearest shape; a warning once where it is absent.

`linear_logprob.NVIDIA_H200.json` holds [{"V": 152064, "BLOCK": 4096, "num_warps": 8, "STAGES": 2}, ...], with "rows": "cuda"
where the row kernel of `_C` was faster. They change how a sum is split, so they depend on V alone: the same row gives the
same bits in a batch of any size.
"""

import functools
import json
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch

DEFAULT = {"BLOCK": 2048, "num_warps": 8, "STAGES": 3}


def path(stem: str, name: str) -> Path:
    return Path(__file__).parent / f"{stem}.{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}.json"


@functools.cache
def _table(stem: str, name: str) -> tuple[dict[str, Any], ...]:
    file = path(stem, name)
    if file.is_file():
        return tuple(json.loads(file.read_text(encoding="utf-8")))
    warnings.warn(
        f"r1v2_fast: no launch parameters of {stem} were measured on {name}; using {DEFAULT}. "
        f"`python -m bench tune` measures them and writes {file.name}",
        stacklevel=3,
    )
    return ()


def nearest(rows: tuple[dict[str, Any], ...], V: int) -> dict[str, Any]:
    """The entry whose V is nearest by ratio, without its V."""
    if not rows:
        return DEFAULT
    best = min(rows, key=lambda row: (abs(math.log(row["V"] / V)), row["V"]))
    return {key: value for key, value in best.items() if key != "V"}


def parameters(stem: str, device: torch.device, V: int) -> dict[str, int]:
    """BLOCK, num_warps and STAGES for rows of V logits. Off a GPU (the interpreter) the defaults serve."""
    if device.type != "cuda":
        return DEFAULT
    found = nearest(_table(stem, torch.cuda.get_device_name(device)), V)
    return {key: value for key, value in found.items() if key != "rows"}


def row_pass(stem: str, device: torch.device, V: int) -> str:
    """The backend whose row kernel was measured to be the faster one for such rows: "cuda", else "triton"."""
    return nearest(_table(stem, torch.cuda.get_device_name(device)), V).get("rows", "triton")
