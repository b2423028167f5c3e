"""What a rollout takes and gives, whatever engine runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Prompt:
    """A record's prompt as the model takes it."""

    id: str
    ids: list[int]
    image_keys: list[str]


@dataclass(frozen=True)
class Response:
    ids: list[int]
    """Sampled tokens, the end-of-sequence token included where it was reached."""
    logprobs: torch.Tensor
    """Behaviour log-probs [len(ids)] fp32, under the temperature and without the forbidden tokens."""
    finished: bool
    """False where the length ran out first."""
