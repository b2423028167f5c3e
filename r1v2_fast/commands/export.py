"""r1v2-fast export: a run's policy as a Hugging Face folder with its model card."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import yaml
from transformers.utils import logging

from r1v2_fast.card import model_card
from r1v2_fast.commands.model import check_policy
from r1v2_fast.models import load

EXPORTED = ("config.json", "generation_config.json", "README.md")  # a run's own folders have no README.md


def run(run_folder: str, out: str, *, source: str, dtype: str | None, overwrite: bool) -> Path:
    """Write the policy that `source` names (final, best or a stage) to `out`, whole or not at all; returns `out`.

    dtype      float32 or bfloat16; None keeps the policy's
    overwrite  True replaces a model folder; a folder that holds something else is never replaced
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
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    load.save_folder(partial, loaded)
    (partial / "README.md").write_text(model_card(folder, source), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)
    return target


def _product(folder: Path, source: str, stages: list[str]) -> Path:
    paths = [folder / "final", folder / "best", *(folder / "stages" / stage for stage in stages)]
    written = {path.name: path for path in paths if (path / "config.json").is_file()}
    if source not in written:
        raise ValueError(f"--from must be one of {list(written)} in {folder}, got {source!r}")
    check_policy(written[source])
    return written[source]


def _check_free(target: Path, *, overwrite: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{target} is not empty; add --overwrite or name another folder")
    if missing := [name for name in EXPORTED if not (target / name).is_file()]:
        raise ValueError(f"--overwrite replaces an earlier export, expected one in {target}, got no {missing[0]} there")
