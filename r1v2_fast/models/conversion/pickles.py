"""A pickled shard, for checkpoints that have no other: read with `weights_only`, so that none of its code runs."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from r1v2_fast.models.conversion.plan import Stored
from r1v2_fast.models.conversion.safetensors_file import CHUNK

DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def read(path: Path) -> dict[str, Stored]:
    """The tensors of a `.bin`, mapped into memory where its format allows.

    raises  ValueError where it holds anything but tensors by name, or cannot be read without running code
    """
    try:
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the format before torch 1.6 cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers raise what their bytes lead them to
        said = str(error).split("\n")[0].split(". ")[0]
        raise ValueError(f"{path}: cannot read it with weights_only, expected tensors by name: {said}") from error
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{path}: expected tensors by name, got {type(state).__name__}")
    found = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or tensor.dtype not in DTYPES or tensor.layout != torch.strided:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise ValueError(f"{path}: {name}: expected a dense tensor of {sorted(DTYPES.values())}, got {kind}")
        found[name] = Stored(name, DTYPES[tensor.dtype], tuple(tensor.shape), partial(_read, tensor.detach()))
    return found


def _read(tensor: torch.Tensor, start: int, stop: int) -> Iterator[bytes]:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for at in range(start, stop, CHUNK):
        yield flat[at : min(at + CHUNK, stop)].numpy().tobytes()
