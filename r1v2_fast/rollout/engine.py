"""What a rollout takes and gives, whatever engine runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

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


class Engine(Protocol):
    """Samples from the policy it was opened with."""

    def generate(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int] | None = None,
    ) -> list[Response]:
        """`group_size` responses a prompt, one behind the other, in the prompts' order; all of them, or an exception.

        temperature  0 takes the likeliest token, with its log-prob at temperature 1
        seeds        one a prompt: its responses depend on it, and not on what else is sampled; needed above temperature 0
        raises       RuntimeError where an engine outside this process does not answer as it must; a later call may succeed
        """
        ...

    def probe(self, prompt: Prompt) -> None:
        """Before the first rollout: RuntimeError where the engine's log-probs would not be the policy's."""
        ...

    def sync(self) -> None:
        """After the policy has changed, and before the next `generate`."""
        ...

    def close(self) -> None:
        """Give back what the engine holds; it is not used again."""
        ...


def check_seeds(seeds: list[int] | None, prompts: list[Prompt], temperature: float) -> None:
    """raises  ValueError where something is to be sampled without a seed for each prompt"""
    if temperature != 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError(
            f"sampling at temperature {temperature} needs {len(prompts)} seeds, got {seeds and len(seeds)}"
        )
