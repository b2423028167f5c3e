"""A safetensors file's header, checked against the file: 8 bytes of length, JSON, then the tensors' bytes."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from r1v2_fast.models.conversion.plan import ITEM_BYTES, Stored, Target

CHUNK = 1 << 24  # bytes held at once, whatever the size of a tensor
MAX_HEADER = 100_000_000  # the format's own limit


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a file by name; their bytes stay on the disk.

    raises  ValueError where the file is cut short, longer than its header says or no safetensors file
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        first = stream.read(8)
        length = struct.unpack("<Q", first)[0] if len(first) == 8 else -1
        if not 0 < length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"{path}: expected a safetensors file, got one cut short or of another format")
        try:
            header = json.loads(stream.read(length))
            header.pop("__metadata__", None)
            entries = sorted(
                ((name, _entry(value)) for name, value in header.items()), key=lambda e: (e[1][2], e[1][3])
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: cannot read its safetensors header: {error}") from error
    found, end = {}, 0
    for name, (dtype, shape, start, stop) in entries:
        expected = math.prod(shape) * ITEM_BYTES[dtype]
        if start != end or stop - start != expected:
            raise ValueError(
                f"{path}: {name}: expected {expected} bytes of {dtype} {list(shape)} from {end}, got {start} to {stop}"
            )
        found[name] = Stored(name, dtype, shape, partial(_read, path, 8 + length + start))
        end = stop
    if size != 8 + length + end:
        raise ValueError(f"{path}: expected {8 + length + end} bytes as its header says, got {size}")
    return found


def _entry(value: dict[str, Any]) -> tuple[str, tuple[int, ...], int, int]:
    dtype, shape, (start, stop) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    if dtype not in ITEM_BYTES:
        raise ValueError(f"dtype must be one of {sorted(ITEM_BYTES)}, got {dtype!r}")
    if not all(type(number) is int and number >= 0 for number in (*shape, start, stop)):
        raise ValueError(f"expected sizes and offsets of at least 0, got {value}")
    return dtype, shape, start, stop


def _read(path: Path, offset: int, start: int, stop: int) -> Iterator[bytes]:
    try:
        with path.open("rb", buffering=0) as stream:
            stream.seek(offset + start)
            while start < stop:
                if not (chunk := stream.read(min(CHUNK, stop - start))):
                    raise ValueError(f"{path}: it became shorter while it was read")
                start += len(chunk)
                yield chunk
    except OSError as error:  # not to be taken for one of the folder that is written
        raise ValueError(f"{path}: cannot read it: {error}") from error


def write(path: Path, targets: Iterable[Target]) -> None:
    """Tensors in the given order but for wide dtypes first, which keeps every one of them aligned, as readers want."""
    targets = sorted(targets, key=lambda target: -ITEM_BYTES[target.dtype])
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers reads no file without it
    end = 0
    for target in targets:
        offsets = [end, end := end + target.nbytes]
        header[target.name] = {"dtype": target.dtype, "shape": list(target.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for target in targets:
            _copy(target, stream)


def _copy(target: Target, stream: BinaryIO) -> None:
    for span in target.spans:
        for piece in span.stored.read(span.start, span.stop):
            stream.write(piece)
