"""A model folder opened for answering."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import logging

from r1v2_fast.models import load
from r1v2_fast.models.policy import Policy
from r1v2_fast.models.reward_model import HEAD_FILE
from r1v2_fast.models.vision import FeatureCache
from r1v2_fast.train.context import Corpus, Reader, pick_device


def open_model(folder: str | Path, corpus: Corpus, device: str) -> tuple[Policy, Reader]:
    """A frozen policy that answers prompts about the corpus's pictures."""
    logging.disable_progress_bar()
    check_policy(folder)
    loaded = load.from_folder(folder)
    loaded.model.to(pick_device(device)).requires_grad_(False)
    reader = Reader(corpus, loaded, max_tiles=loaded.image_processor.max_patches)
    return Policy(loaded, reader.pixels, FeatureCache()), reader


def check_policy(folder: str | Path) -> None:
    """transformers would load a reward model too, and make up the head that it lacks."""
    if (Path(folder) / HEAD_FILE).is_file():
        raise ValueError(f"expected a policy's folder, got a reward model ({HEAD_FILE} lies in {folder})")


def check_at_least(minimum: float, **options: float) -> None:
    for name, value in options.items():
        if not value >= minimum:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {minimum}, got {value}")
