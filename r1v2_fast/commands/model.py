"""A model folder opened for answering."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from transformers.utils import logging

from r1v2_fast.models import load
from r1v2_fast.models.feature_cache import FeatureCache
from r1v2_fast.models.policy import Policy
from r1v2_fast.models.reward_model import HEAD_FILE
from r1v2_fast.parallel.world import pick_device
from r1v2_fast.train.context import Corpus, Reader


def open_model(
    folder: str | Path, corpus: Corpus, device: str, *, max_tiles: int | None = None
) -> tuple[Policy, Reader]:
    """A frozen policy that answers prompts about the corpus's pictures.

    max_tiles  of a picture; None takes what the folder's image processor says, as the policy was trained
    """
    logging.disable_progress_bar()
    check_device(device)
    check_policy(folder)
    loaded = load.from_folder(folder)
    loaded.model.to(pick_device(device)).requires_grad_(False)
    reader = Reader(corpus, loaded, max_tiles=max_tiles or loaded.image_processor.max_patches)
    return Policy(loaded, reader.pixels, FeatureCache()), reader


def check_policy(folder: str | Path) -> None:
    """transformers would load a reward model too, and make up the head that it lacks."""
    if (Path(folder) / HEAD_FILE).is_file():
        raise ValueError(f"expected a policy's folder, got a reward model ({HEAD_FILE} lies in {folder})")


def check_device(name: str) -> None:
    if not (match := re.fullmatch(r"auto|cpu|cuda(?::(\d+))?", name)):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:1, got {name!r}")
    if name.startswith("cuda") and int(match[1] or 0) >= (found := torch.cuda.device_count()):
        raise ValueError(f"--device {name} needs a CUDA device and driver, found {found}; --device cpu works")


def check_at_least(minimum: float, **options: float | None) -> None:
    """raises  ValueError where an option that was given is less, NaN or infinite"""
    for name, value in options.items():
        if value is not None and not (value >= minimum and math.isfinite(value)):
            finite = " and finite" if value == math.inf else ""
            raise ValueError(f"--{name.replace('_', '-')} must be at least {minimum}{finite}, got {value}")
