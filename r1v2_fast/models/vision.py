"""Vision features, made once per image: the frozen tower's output before the adapter, cached by image key.

T tiles of an image, S image tokens a tile, C channels before the adapter (4 x the tower's width), H language width.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch


def tower_features(internvl, pixels_T3HW: torch.Tensor) -> torch.Tensor:
    """`InternVLModel.get_image_features` up to the adapter, so that a frozen tower runs once per image: [T, S, C]."""
    config = internvl.config
    pixels_T3HW = pixels_T3HW.to(internvl.dtype)
    layer = config.vision_feature_layer
    output = internvl.vision_tower(pixel_values=pixels_T3HW, output_hidden_states=layer != -1)
    features = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
    if config.vision_feature_select_strategy == "default":
        features = features[:, 1:, :]  # the class token
    tiles, patches, width = features.shape
    side = int(patches**0.5)
    assert side * side == patches, f"expected a square of patches, got {patches}"
    shuffled = internvl.pixel_shuffle(features.reshape(tiles, side, side, width), scale_factor=config.downsample_ratio)
    return shuffled.reshape(tiles, -1, shuffled.shape[-1])


class FeatureCache:
    """Image key -> features [T, S, C], least recently used out first once `max_bytes` are held."""

    def __init__(self, max_bytes: int = 1 << 30):
        self.max_bytes = max_bytes
        self.bytes = 0
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._held)

    def clear(self) -> None:
        """To be called when the tower's weights change."""
        self._held.clear()
        self.bytes = 0

    def get(self, keys: list[str], encode: Callable[[list[str]], list[torch.Tensor]]) -> list[torch.Tensor]:
        """Features of `keys` in order; those not held are encoded in one batch."""
        found = {}
        for key in keys:
            if key in self._held:
                self._held.move_to_end(key)
                found[key] = self._held[key]
        missing = [key for key in dict.fromkeys(keys) if key not in found]
        if missing:
            for key, features in zip(missing, encode(missing), strict=True):
                found[key] = features
                self._put(key, features)
        return [found[key] for key in keys]

    def _put(self, key: str, features: torch.Tensor) -> None:
        self._held[key] = features
        self.bytes += features.nbytes
        while self.bytes > self.max_bytes and len(self._held) > 1:
            self.bytes -= self._held.popitem(last=False)[1].nbytes
