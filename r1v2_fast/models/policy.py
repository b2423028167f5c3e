"""The policy: tokens and cached vision features in, hidden states and response log-probs out.

B sequences, L padded length, N response tokens of the whole batch (packed, row by row), H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from r1v2_fast import ops
from r1v2_fast.models import freeze, load, vision

Pixels = Callable[[list[str]], list[torch.Tensor]]  # image keys -> tiles [T, 3, H, W] each; data.images.ImageStore


class Backbone:
    """A vision tower, an adapter and a language model, with the images' features held between calls.

    With the tower frozen an image is encoded once, whatever the number of responses, stages or models that see it.
    """

    def __init__(self, internvl, pixels: Pixels, features: vision.FeatureCache):
        self.internvl = internvl  # transformers' InternVLModel
        self.pixels = pixels
        self.features = features

    @property
    def vision_frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.internvl.vision_tower.parameters())

    def _encode(self, keys: list[str]) -> list[torch.Tensor]:
        pixels = [pixel.to(self.internvl.device) for pixel in self.pixels(keys)]
        tiles = [pixel.shape[0] for pixel in pixels]
        return list(vision.tower_features(self.internvl, torch.cat(pixels)).split(tiles))

    def image_embeddings(self, image_keys: list[list[str]]) -> torch.Tensor | None:
        """The adapter's output for every image of every row, [image tokens, H]; each distinct image goes through once."""
        keys = [key for row in image_keys for key in row]
        if not keys:
            return None
        unique = list(dict.fromkeys(keys))
        if self.vision_frozen:
            with torch.no_grad():
                features = self.features.get(unique, self._encode)
        else:
            features = self._encode(unique)
        tiles = [feature.shape[0] for feature in features]
        embedded = dict(zip(unique, self.internvl.multi_modal_projector(torch.cat(features)).split(tiles), strict=True))
        return torch.cat([embedded[key].flatten(0, 1) for key in keys])

    def embed(self, input_ids: torch.Tensor, image_keys: list[list[str]]) -> torch.Tensor:
        """Token embeddings with the image tokens replaced by the images' own, [B, L, H]."""
        embeddings = self.internvl.get_input_embeddings()(input_ids)
        images = self.image_embeddings(image_keys)
        places = input_ids == self.internvl.config.image_token_id
        expected = 0 if images is None else images.shape[0]
        if (got := int(places.sum())) != expected:
            raise ValueError(f"the prompts hold {got} image tokens, their images make {expected}")
        if images is None:  # the adapter stays in the graph: a rank whose batch has no image still joins its gradient
            if not torch.is_grad_enabled():
                return embeddings
            config = self.internvl.config
            width = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
            return embeddings + 0.0 * self.internvl.multi_modal_projector(embeddings.new_zeros(1, width)).sum()
        return embeddings.masked_scatter(places.unsqueeze(-1), images.to(embeddings.dtype))

    def hidden(self, batch) -> torch.Tensor:
        """Last hidden states of a `data.collate.Batch`, [B, L, H]."""
        output = self.internvl.language_model(
            inputs_embeds=self.embed(batch.input_ids, batch.image_keys),
            attention_mask=batch.attention_mask,
            position_ids=batch.positions,
            use_cache=False,
        )
        return output.last_hidden_state


class Policy(Backbone):
    """A `Backbone` with its head, tokenizer and trainable parts."""

    def __init__(self, loaded: load.Loaded, pixels: Pixels, features: vision.FeatureCache):
        super().__init__(loaded.model.model, pixels, features)
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.parameters: list[nn.Parameter] = []
        self.forbidden = forbidden_ids(loaded.tokenizer, loaded.model.config.image_token_id).to(loaded.model.device)

    @property
    def head(self) -> nn.Linear:
        return self.loaded.model.lm_head

    def train_parts(self, parts: list[str]) -> None:
        self.parameters = freeze.set_trainable(self.loaded.model, parts)
        if not self.vision_frozen:
            self.features.clear()

    def response_logprobs(self, batch, *, temperature: float = 1.0, needs_grad=None, outputs=()) -> ops.LogProbs:
        """Log-probs of the response tokens, packed [N], with the placeholder tokens forbidden as in the rollout."""
        hidden = self.hidden(batch)
        rows = batch.response_mask[:, 1:]
        return ops.linear_logprobs(
            hidden[:, :-1][rows],
            self.head.weight,
            batch.input_ids[:, 1:][rows],
            bias=self.head.bias,
            temperature=temperature,
            forbidden=self.forbidden,
            needs_grad=needs_grad,
            outputs=outputs,
            entropy_grad=False,
        )


def forbidden_ids(tokenizer, image_token_id: int) -> torch.Tensor:
    """Placeholders a policy must never sample: the next forward would take them for images or padding."""
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokens = [token for name in names if (token := getattr(tokenizer, name, None))]
    ids = {image_token_id, *tokenizer.convert_tokens_to_ids(tokens)}
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return torch.tensor(sorted(i for i in ids if i is not None and i >= 0), dtype=torch.int64)
