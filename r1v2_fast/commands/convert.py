"""r1v2-fast convert: a checkpoint in the other layout, or its language model alone."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from r1v2_fast.atomic import write_folder
from r1v2_fast.models.conversion import folder, shards

RECORD = "conversion.json"  # names every file of a folder that a conversion wrote, so that a later one may replace it
SPARE = 1 << 24  # bytes: headers, an index, the filesystem's own


def run(
    source: str,
    out: str,
    *,
    to: str | None,
    language_model_only: bool,
    max_shard_size: str,
    allow_pickle: bool,
    overwrite: bool,
) -> Path:
    """Write `source` to `out` in the other layout, whole or not at all; returns `out`.

    to                   transformers or original; None takes the one that `source` is not in
    language_model_only  write a Qwen2ForCausalLM folder instead, from either layout
    allow_pickle         read `.bin` shards where there are no safetensors, with weights_only
    overwrite            True replaces an earlier conversion; a folder that holds anything else too is never replaced
    raises               ValueError where `source` is incomplete or not supported, `out` is taken or the disk too small
    """
    origin, target = Path(source), Path(out).resolve()
    _check_target(origin, target, overwrite=overwrite)
    have = folder.layout(origin)
    if language_model_only and to is not None:
        raise ValueError(f"--language-model-only writes Qwen2ForCausalLM, expected no --to, got {to!r}")
    if to == have:
        raise ValueError(f"{origin} is in the {to} layout already")
    max_bytes = shards.parse_size(max_shard_size)
    with tempfile.TemporaryDirectory() as temporary:
        staging = Path(temporary)
        targets = folder.prepare(origin, staging, language_model_only=language_model_only, allow_pickle=allow_pickle)
        files = shards.split(targets.values(), max_bytes)
        small = sorted(path.name for path in staging.iterdir())
        _check_room(target, sum(t.nbytes for t in targets.values()) + sum((staging / n).stat().st_size for n in small))
        record = {"files": sorted([*small, *shards.file_names(files), RECORD]), "from": have}

        def write(partial: Path) -> None:
            (partial / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            for name in small:
                shutil.copyfile(staging / name, partial / name)
            shards.write(partial, files)

        write_folder(target, write)
    return target


def _check_target(origin: Path, target: Path, *, overwrite: bool) -> None:
    """raises  ValueError where anything but an earlier conversion would be lost, at `target` or beside it."""
    resolved = origin.resolve()
    if _overlap(resolved, target):
        raise ValueError(f"SRC and DST must be folders apart, got {origin} and {target}")
    for name in (f"{target.name}.partial", f"{target.name}.old"):  # where atomic.write_folder works
        beside = target.with_name(name)
        if _overlap(resolved, beside) or ((beside.exists() or beside.is_symlink()) and (foreign := _foreign(beside))):
            said = "is SRC" if _overlap(resolved, beside) else f"holds {foreign}, which a conversion does not write"
            raise ValueError(f"{beside} is in the way and {said}: name another DST")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} is not empty; add --overwrite or name another folder")
    if foreign := _foreign(target):
        raise ValueError(f"--overwrite replaces an earlier conversion, expected one in {target}, got {foreign} there")


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _foreign(path: Path) -> str | None:
    """A name in the folder that its conversion did not write; None in an empty one."""
    if not path.is_dir():
        return path.name
    try:
        ours = set(json.loads((path / RECORD).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = set()
    return next(
        (f.name for f in sorted(path.iterdir()) if f.name not in ours or not f.is_file() or f.is_symlink()), None
    )


def _check_room(target: Path, needed: int) -> None:
    there = next(parent for parent in target.parents if parent.exists())
    if (free := shutil.disk_usage(there).free) < needed + SPARE:
        raise ValueError(
            f"{there} must have {needed / 2**30:.2f} GiB free for {target.name}, got {free / 2**30:.2f} GiB"
        )
