"""Prefill: each prompt through the language model once, whatever the number of its responses.

B prompts of P_b tokens, L = max P_b, K key and value heads, D head size, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache

from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout.engine import Prompt

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class Prefilled:
    """What a prompt's responses begin from; held until the last of them has begun."""

    length: int
    hidden: torch.Tensor
    """[H] at the last token."""
    cache: KeysValues
    """Each layer's keys and values, [1, K, P, D]."""

    def alone(self) -> Prefilled:
        """A copy, so that the prompts prefilled beside it are let go."""
        cache = [(keys.clone(), values.clone()) for keys, values in self.cache]
        return Prefilled(self.length, self.hidden.clone(), cache)


def prefill(policy: Policy, prompts: list[Prompt]) -> list[Prefilled]:
    """One forward of all `prompts`, padded on the right: no token sees what stands behind it, so no mask is needed."""
    lengths = [len(prompt.ids) for prompt in prompts]
    ids = torch.zeros(len(prompts), max(lengths), dtype=torch.int64)
    for row, prompt in zip(ids, prompts, strict=True):
        row[: len(prompt.ids)] = torch.tensor(prompt.ids)
    ids = ids.to(policy.internvl.device)
    return _forward(policy, policy.embed(ids, [prompt.image_keys for prompt in prompts]), lengths)


def prefill_nothing(policy: Policy) -> list[Prefilled]:
    """A forward of one token, for a rank without a prompt of its own while another has some."""
    ids = torch.full((1, 1), policy.tokenizer.eos_token_id, device=policy.internvl.device)
    return _forward(policy, policy.embed(ids, [[]]), [1])


def _forward(policy: Policy, embeddings: torch.Tensor, lengths: list[int]) -> list[Prefilled]:
    cache = DynamicCache()  # without a config: a sliding layer's keys and values are kept whole too
    output = policy.internvl.language_model(
        inputs_embeds=embeddings,
        position_ids=torch.arange(max(lengths), device=embeddings.device)[None],
        past_key_values=cache,
        use_cache=True,
    )
    return [
        Prefilled(
            length,
            output.last_hidden_state[row, length - 1],
            [(held.keys[row, None, :, :length], held.values[row, None, :, :length]) for held in cache.layers],
        )
        for row, length in enumerate(lengths)
    ]
