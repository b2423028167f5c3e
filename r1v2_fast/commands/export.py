"""r1v2-fast export: a run's policy as a Hugging Face folder with its model card."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
import yaml
from transformers.utils import logging

from r1v2_fast.atomic import write_folder
from r1v2_fast.card import TAG, model_card
from r1v2_fast.commands.model import check_policy
from r1v2_fast.models import load

WRITTEN = {
    "README.md", "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "merges.txt", "tokenizer.model", "model.safetensors.index.json",
}  # fmt: skip
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def run(run_folder: str, out: str, *, source: str, dtype: str | None, overwrite: bool) -> Path:
    """Write the policy that `source` names (final, best or a stage) to `out`, whole or not at all; returns `out`.

    dtype      float32 or bfloat16; None keeps the policy's
    overwrite  True replaces an earlier export; a folder that holds anything else too is never replaced
    """
    folder, target = Path(run_folder), Path(out).resolve()
    if not (folder / "recipe.yaml").is_file():
        raise ValueError(f"expected the folder of a run with its recipe.yaml, got {folder}")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    product = _product(folder, source, recipe["run"]["stages"])
    _check_free(target, overwrite=overwrite)
    logging.disable_progress_bar()
    loaded = load.from_folder(product, dtype=getattr(torch, dtype) if dtype else "auto")
    loaded.image_processor.max_patches = recipe["data"]["max_tiles"]  # as the policy was trained

    def write(partial: Path) -> None:
        load.save_folder(partial, loaded)
        (partial / "README.md").write_text(model_card(folder, source), encoding="utf-8")

    write_folder(target, write)
    return target


def _product(folder: Path, source: str, stages: list[str]) -> Path:
    paths = [folder / "final", folder / "best", *(folder / "stages" / stage for stage in stages)]
    written = {path.name: path for path in paths if (path / "config.json").is_file()}
    if source not in written:
        raise ValueError(f"--from must be one of {list(written)} in {folder}, got {source!r}")
    check_policy(written[source])
    return written[source]


def _check_free(target: Path, *, overwrite: bool) -> None:
    """raises  ValueError where anything but an earlier export would be lost, at `target` or beside it."""
    for name in (f"{target.name}.partial", f"{target.name}.old"):  # where atomic.write_folder works
        if (beside := target.with_name(name)).exists() and (foreign := _foreign(beside)):
            raise ValueError(f"{beside} is in the way and holds {foreign}, which an export does not write: move it")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} is not empty; add --overwrite or name another folder")
    expected = f"--overwrite replaces an earlier export, expected one in {target}"
    if not _is_export(target):
        raise ValueError(f"{expected}, got no README.md with the tag {TAG} there")
    if foreign := _foreign(target, weights=_weights(target)):
        raise ValueError(f"{expected}, got {foreign} there too, which an export does not write")


def _is_export(folder: Path) -> bool:
    try:
        front = yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])
        return TAG in front["tags"]
    except (OSError, UnicodeDecodeError, yaml.YAMLError, IndexError, KeyError, TypeError):
        return False


def _weights(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"].values())
    except OSError:
        return {"model.safetensors"}


def _foreign(path: Path, *, weights: set[str] | None = None) -> str | None:
    """A name in the folder that an export does not write; without `weights`, any of its shards may lie there."""
    if not path.is_dir():
        return path.name
    for file in sorted(path.iterdir()):
        ours = file.name in WRITTEN or (WEIGHTS.fullmatch(file.name) if weights is None else file.name in weights)
        if not ours or not file.is_file():
            return file.name
    return None
