"""A model's shapes and its parameters by part, from its config alone.

C channels before the adapter, H hidden size, I MLP size, V vocabulary, Hq query heads, Hk key and value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SUPPORTED = ("qwen2", "qwen3")


@dataclass(frozen=True)
class Shapes:
    """What memory and time are computed from; counts are of elements."""

    vision_width: int
    vision_inner: int
    vision_layers: int
    patches: int
    """Of a tile, without the class token."""
    vision: int
    """Parameters of the tower."""
    channels: int
    image_tokens: int
    """Of a tile."""
    adapter: int
    """Parameters of the adapter: C + C, C H + H, H H + H."""
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    layer_matrices: int
    """Parameters of one layer's matrices: 2 H Hq D + 2 H Hk D + 3 H I."""
    layer: int
    """Parameters of one layer, biases and norms among them."""
    head_norms: bool
    """Queries and keys are normed head by head, as in Qwen3."""
    tied: bool
    """Head and embedding are one matrix."""

    @property
    def embedding(self) -> int:
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """Parameters of the head, V H; 0 where it is tied."""
        return 0 if self.tied else self.embedding

    @property
    def language_model(self) -> int:
        """Embedding, layers and the last norm."""
        return self.embedding + self.layers * self.layer + self.hidden

    @property
    def total(self) -> int:
        return self.vision + self.adapter + self.language_model + self.head

    @property
    def kv(self) -> int:
        """Elements of a token's keys and values in all layers, 2 layers Hk D."""
        return 2 * self.layers * self.kv_heads * self.head_size


def of(config: Any) -> Shapes:
    """Shapes of an `InternVLConfig`.

    raises  ValueError on a language model that is neither qwen2 nor qwen3
    """
    text, vision = config.text_config, config.vision_config
    if text.model_type not in SUPPORTED:
        raise ValueError(f"expected a language model among {SUPPORTED}, got {text.model_type!r}")
    hidden, inner = text.hidden_size, text.intermediate_size
    head_size = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    query, key = text.num_attention_heads * head_size, text.num_key_value_heads * head_size
    matrices = 2 * hidden * query + 2 * hidden * key + 3 * hidden * inner
    extra = query + 2 * key if text.model_type == "qwen2" else 2 * head_size  # biases, or the norms of queries and keys
    rows, columns = (side // patch for side, patch in zip(vision.image_size, vision.patch_size, strict=True))
    channels = vision.hidden_size * round(1 / config.downsample_ratio) ** 2
    return Shapes(
        vision_width=vision.hidden_size,
        vision_inner=vision.intermediate_size,
        vision_layers=vision.num_hidden_layers,
        patches=rows * columns,
        vision=_vision(vision, rows * columns),
        channels=channels,
        image_tokens=config.image_seq_length,
        adapter=2 * channels + channels * hidden + hidden + hidden * hidden + hidden,
        hidden=hidden,
        inner=inner,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
        layer_matrices=matrices,
        layer=matrices + extra + 2 * hidden,
        head_norms=text.model_type == "qwen3",
        tied=bool(config.tie_word_embeddings or text.tie_word_embeddings),
    )


def _vision(config: Any, patches: int) -> int:
    width, inner = config.hidden_size, config.intermediate_size
    norm = width if config.norm_type == "rms_norm" else 2 * width
    attention = 4 * width * width + width + (3 * width if config.attention_bias else 0)
    attention += 2 * width if config.use_qk_norm else 0
    mlp = 2 * width * inner + inner + width
    layer = attention + mlp + 2 * norm + 2 * width  # and the two layer scales
    patch = config.num_channels * config.patch_size[0] * config.patch_size[1] * width + width
    places = (patches + 1) * width if config.use_absolute_position_embeddings else 0
    mask = width if config.use_mask_token else 0
    last = 0 if config.use_mean_pooling else 2 * width
    return width + mask + patch + places + config.num_hidden_layers * layer + last
