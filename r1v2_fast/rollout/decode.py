"""One decode step: a token of every slot in, the hidden state that predicts the next one out.

S slots, H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout.graphs import captured
from r1v2_fast.rollout.slots import SlotCache, window_of

BUCKET = 256  # columns: attention reads up to the next multiple behind the longest row, and each has its own CUDA graph


class Decoder:
    """Decode steps over one `SlotCache`; inputs and keys and values keep their addresses, so that a graph can replay them.

    graphs  on a CUDA device, capture a graph at each new width
    """

    def __init__(self, policy: Policy, cache: SlotCache, *, graphs: bool):
        self.policy = policy
        self.cache = cache
        self.graphs = graphs and policy.internvl.device.type == "cuda"
        self.window = window_of(policy.internvl.language_model)
        self.tokens = torch.zeros_like(cache.lengths)  # [S]
        self._steps: dict[int, Callable[[], torch.Tensor]] = {}  # by width

    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """[S, H] after `tokens` [S], where each slot held `lengths` [S] tokens before."""
        self.tokens.copy_(torch.tensor(tokens))
        self.cache.lengths.copy_(torch.tensor(lengths))
        width = min(-(-(max(lengths) + 1) // BUCKET) * BUCKET, self.cache.columns)
        self.cache.width = width
        if width not in self._steps:
            self._steps[width] = captured(self._forward) if self.graphs else self._forward
            self.graphs = self._steps[width] != self._forward  # one that failed is not tried again at the next width
        return self._steps[width]()

    def _forward(self) -> torch.Tensor:
        output = self.policy.internvl.language_model(
            inputs_embeds=self.policy.internvl.get_input_embeddings()(self.tokens[:, None]),
            attention_mask=self.cache.masks(self.window),
            position_ids=self.cache.lengths[:, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        return output.last_hidden_state[:, 0]
