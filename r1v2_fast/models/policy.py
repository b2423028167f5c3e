"""The policy: tokens and cached vision features in, hidden states and response log-probs out.

B sequences, L padded length, N response tokens of the whole batch (packed, row by row), H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from r1v2_fast import ops
from r1v2_fast.config import LoRA, Part
from r1v2_fast.models import attention, freeze, load, lora, vision
from r1v2_fast.models.feature_cache import FeatureCache

Pixels = Callable[[list[str]], list[torch.Tensor]]  # image keys -> tiles [T, 3, H, W] each; data.images.ImageStore


class Backbone:
    """A vision tower, an adapter and a language model, with the images' features held between calls.

    With the tower frozen an image is encoded once, whatever the number of responses, stages or models that see it.
    """

    def __init__(self, internvl, pixels: Pixels, features: FeatureCache):
        self.internvl = internvl  # transformers' InternVLModel
        self.pixels = pixels
        self.features = features
        self.dtype = internvl.dtype  # of the frozen weights and, if 16-bit, of the matmuls
        self.parameters: dict[str, nn.Parameter] = {}  # what trains
        self.checkpointing = False  # True recomputes each layer's activations in the backward
        self.vision_frozen = True  # then features are cached
        self.joins = False  # layers are sharded: every forward is a collective, with or without an image
        self._initial: list[torch.Tensor] = []
        if attention.supported(internvl.language_model):
            attention.install(internvl.language_model)

    @property
    def root(self) -> nn.Module:
        """The module whose parameters' names say what trains."""
        return self.internvl

    def train_parts(self, parts: list[str], lora_parts: Mapping[Part, LoRA] | None = None, *, seed: int = 0) -> None:
        """Train `parts` in full and `lora_parts` through LoRA."""
        lora.inject(self.root, lora_parts or {}, seed=seed)
        self.parameters = freeze.set_trainable(self.root, parts)
        self.vision_frozen = not any(freeze.part_of(name) == "vision" for name in self.parameters)

    def settle(self) -> None:
        """The end of training: LoRA merged, everything frozen and in the dtype it is saved in."""
        lora.merge(self.root)
        for parameter in self.root.parameters():
            parameter.requires_grad_(False)
            if not self.joins:  # FSDP would not follow; what is saved has the dtype
                parameter.data = parameter.data.to(self.dtype)
        if not self.vision_frozen:
            self.features.clear()
        self.parameters, self._initial, self.checkpointing = {}, [], False
        # a sharded tower goes on being gone through by all ranks together, not image by image
        self.vision_frozen = self.vision_frozen or not self.joins

    def keep_reference(self) -> None:
        """What the model is now, before it trains, is what `reference` gives back."""
        self._initial = freeze.snapshot(self._in_full())

    @contextmanager
    def reference(self) -> Iterator[None]:
        """Inside, the model is what `keep_reference` saw: LoRA off, the parts that train in full swapped."""
        with lora.disabled(self.root), freeze.swapped(self._in_full(), self._initial), torch.no_grad():
            yield

    def reference_state(self) -> dict[str, torch.Tensor]:
        return {f"initial/{index}": value for index, value in enumerate(self._initial)}

    def load_reference_state(self, read: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
        """`read` gives the tensor of a name, placed like another."""
        self._initial = [read(f"initial/{index}", value) for index, value in enumerate(self._initial)]

    def gathered(self, *, keep: bool = True) -> dict[str, torch.Tensor]:
        """The whole weights as `settle` would leave them; where layers are sharded all ranks call it, and some `keep` none."""
        state: dict[str, torch.Tensor] = {}
        if not keep and not self.joins:
            return state
        for name, tensor in lora.merged_state(self.root).items():
            whole = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
            if keep:
                state[name] = whole.to(self.dtype)
        return state

    def save(self, path: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """What `settle` would leave, as a folder that loads; training can go on. `state` is what `gathered` gave."""
        raise NotImplementedError

    def _in_full(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.parameters.items() if lora.MARK not in name]

    def precision(self) -> torch.autocast:
        """Matmuls in the frozen weights' dtype where that is 16-bit; what trains stays fp32."""
        half = self.dtype in (torch.float16, torch.bfloat16)
        return torch.autocast(self.internvl.device.type, dtype=self.dtype if half else None, enabled=half)

    def _encode(self, keys: list[str]) -> list[torch.Tensor]:
        pixels = [pixel.to(self.internvl.device) for pixel in self.pixels(keys)]
        tiles = [pixel.shape[0] for pixel in pixels]
        return list(vision.tower_features(self.internvl, torch.cat(pixels)).split(tiles))

    def _encode_each(self, keys: list[str]) -> list[torch.Tensor]:
        """One image a call: the last bits of what is cached must not follow which other images were missing."""
        return [feature for key in keys for feature in self._encode([key])]

    @contextmanager
    def _checkpointed(self) -> Iterator[None]:
        """transformers checkpoints layers in training mode alone; their children stay as they are: no dropout."""
        active = self.checkpointing and torch.is_grad_enabled()
        layers = [m for m in self.internvl.modules() if isinstance(m, GradientCheckpointingLayer)] if active else []
        for layer in layers:
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        try:
            yield
        finally:
            for layer in layers:
                layer.gradient_checkpointing = layer.training = False

    def image_embeddings(self, image_keys: list[list[str]]) -> torch.Tensor | None:
        """The adapter's output for every image of every row, [image tokens, H]; each distinct image goes through once."""
        keys = [key for row in image_keys for key in row]
        if not keys:
            return None
        unique = list(dict.fromkeys(keys))
        if self.vision_frozen:
            with torch.no_grad():
                tower, settings = self.internvl.vision_tower, partial(vision.settings, self.internvl)
                features = self.features.get(unique, self.pixels, self._encode_each, tower, settings)
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
            if not torch.is_grad_enabled() and not self.joins:
                return embeddings
            return embeddings + 0.0 * self.internvl.multi_modal_projector(self._nothing(embeddings)).sum()
        return embeddings.masked_scatter(places.unsqueeze(-1), images.to(embeddings.dtype))

    def _nothing(self, like: torch.Tensor) -> torch.Tensor:
        """Features of no image; a sharded tower that trains is gone through all the same."""
        config = self.internvl.config
        if self.joins and not self.vision_frozen:
            side = config.vision_config.image_size
            height, width = side if isinstance(side, (list, tuple)) else (side, side)
            return vision.tower_features(self.internvl, like.new_zeros(1, 3, height, width))
        width = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        return like.new_zeros(1, width)

    def hidden(self, batch) -> torch.Tensor:
        """Last hidden states of a `data.collate.Batch` or `models.packing.PackedBatch`, flat: [B L, H]."""
        with self.precision(), self._checkpointed():
            output = self.internvl.language_model(
                inputs_embeds=self.embed(batch.input_ids, batch.image_keys),
                attention_mask=batch.attention_mask,
                position_ids=batch.positions,
                use_cache=False,
            )
        return output.last_hidden_state.flatten(0, 1)


class Policy(Backbone):
    """A `Backbone` with its head, tokenizer and trainable parts."""

    def __init__(self, loaded: load.Loaded, pixels: Pixels, features: FeatureCache):
        super().__init__(loaded.model.model, pixels, features)
        self.loaded = loaded
        self.tokenizer = loaded.tokenizer
        self.forbidden = forbidden_ids(loaded.tokenizer, loaded.model.config.image_token_id).to(loaded.model.device)

    @property
    def root(self) -> nn.Module:
        return self.loaded.model

    @property
    def head(self) -> nn.Linear:
        return self.loaded.model.lm_head

    def save(self, path: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """What `settle` would leave, as a Hugging Face folder; training can go on. `state` is what `gathered` gave."""
        load.save_folder(path, self.loaded, state=self.gathered() if state is None else state)

    def response_logprobs(
        self, batch, *, temperature: float = 1.0, needs_grad=None, outputs=(), entropy_grad=False
    ) -> ops.LogProbs:
        """Log-probs of the response tokens, sequence after sequence [N], the placeholder tokens forbidden as in the rollout."""
        hidden = self.hidden(batch)
        with self.precision():
            return ops.linear_logprobs(
                hidden[batch.rows],
                self.head.weight,
                batch.targets,
                bias=self.head.bias,
                temperature=temperature,
                forbidden=self.forbidden,
                needs_grad=needs_grad,
                outputs=outputs,
                entropy_grad=entropy_grad,
            )


def forbidden_ids(tokenizer, image_token_id: int) -> torch.Tensor:
    """Placeholders a policy must never sample: the next forward would take them for images or padding."""
    names = ("start_image_token", "end_image_token", "context_image_token", "video_token")
    tokens = [token for name in names if (token := getattr(tokenizer, name, None))]
    ids = {image_token_id, *tokenizer.convert_tokens_to_ids(tokens)}
    if tokenizer.pad_token_id != tokenizer.eos_token_id:
        ids.add(tokenizer.pad_token_id)
    return torch.tensor(sorted(i for i in ids if i is not None and i >= 0), dtype=torch.int64)
