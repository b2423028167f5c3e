"""A key-value cache of fixed size, for rows that begin and end at different times.

S slots, C columns a slot, K key and value heads, D head size. A slot's tokens stand in its columns from 0 on, whatever the
other slots hold, so that a row is the same in any company and a freed slot is simply written over. Every tensor keeps its
address between decode steps, which is what a CUDA graph needs.
"""

from __future__ import annotations

from typing import Any

import torch

FULL, SLIDING = "full_attention", "sliding_attention"


class SlotCache:
    """What attention layers of transformers ask of a cache, for one new token a slot: `update`."""

    def __init__(self, like: list[tuple[torch.Tensor, torch.Tensor]], slots: int, columns: int):
        """like  each layer's keys and values of a prefill, [B, K, L, D], for heads, sizes, dtype and device"""
        self.layers = [
            tuple(part.new_zeros(slots, part.shape[1], columns, part.shape[3]) for part in layer) for layer in like
        ]
        self.columns = columns
        self.width = columns  # what attention reads: no further than the longest row goes
        device = like[0][0].device
        self.rows = torch.arange(slots, device=device)
        self.places = torch.arange(columns, device=device)
        # [S], tokens a slot holds: the next one's column
        self.lengths = torch.zeros(slots, dtype=torch.int64, device=device)

    def fill(self, slots: list[int], prefilled: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Put a prompt's keys and values, [1, K, P, D] a layer, into each of `slots`."""
        index = torch.tensor(slots, device=self.rows.device)
        for layer, prompt in zip(self.layers, prefilled, strict=True):
            for whole, part in zip(layer, prompt, strict=True):
                whole[index, :, : part.shape[2]] = part

    def masks(self, window: int | None) -> torch.Tensor | dict[str, torch.Tensor]:
        """Which columns the next token of each slot sees, its own among them, [S, 1, 1, width] bool.

        window  of sliding layers, for a language model that has some; it takes a mask for each kind of layer
        """
        places, last = self.places[: self.width], self.lengths[:, None]
        full = (places <= last)[:, None, None]
        if window is None:
            return full
        return {FULL: full, SLIDING: full & (places > last - window)[:, None, None]}

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write one token a slot, [S, K, 1, D], and give back all that may be attended to, [S, K, width, D]."""
        held_keys, held_values = self.layers[layer]
        # under autocast over fp32 weights values come in 16 bits, while transformers' prefill keeps them in the keys' fp32
        held_keys[self.rows, :, self.lengths] = keys[:, :, 0].to(held_keys.dtype)
        held_values[self.rows, :, self.lengths] = values[:, :, 0].to(held_values.dtype)
        return held_keys[:, :, : self.width], held_values[:, :, : self.width]


def window_of(language_model) -> int | None:
    """The window of a language model's sliding layers, None where it has none.

    raises  ValueError where a layer keeps something else than keys and values
    """
    kinds = set(getattr(language_model.config, "layer_types", None) or [FULL])
    if unknown := kinds - {FULL, SLIDING}:
        raise ValueError(f"a rollout takes language models of {FULL} and {SLIDING} layers, got {sorted(unknown)}")
    return language_model.config.sliding_window if SLIDING in kinds else None
