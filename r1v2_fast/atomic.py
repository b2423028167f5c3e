"""Files and folders that are written whole or not at all, whenever the process or the machine dies, and their digests."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    partial = _beside(path, "partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """`write` into a folder beside `path` that takes its name once all of it is on the disk; a failure leaves nothing.

    raises  RuntimeError where the disk is full or read-only; what stood at `path` still stands
    """
    with replacing(path) as partial:
        write(partial)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A folder beside `path` to write into, as `write_folder` does."""
    partial, old = _beside(path, "partial"), _beside(path, "old")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with writing(path):
            partial.mkdir(parents=True)
            yield partial
            for file in (*partial.rglob("*"), partial):
                sync(file)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    recover(path)
    if path.is_dir():  # folders cannot be exchanged in one call
        os.replace(path, old)
    os.replace(partial, path)
    sync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the disk refuses inside becomes a RuntimeError that names `path` and says what to do."""
    from safetensors import SafetensorError  # its own wrapper of the system's errors

    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RuntimeError(f"cannot write {path}: {error}; make room and resume") from error


def recover(path: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = _beside(path, "old")
    if old.is_dir() and not path.is_dir():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


def digest(path: Path) -> str:
    """blake2b of a file's bytes, in hexadecimal."""
    found = hashlib.blake2b()
    with path.open("rb") as stream:
        while chunk := stream.read(1 << 24):
            found.update(chunk)
    return found.hexdigest()


def _beside(path: Path, what: str) -> Path:
    return path.with_name(f"{path.name}.{what}")


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
