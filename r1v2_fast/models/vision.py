"""Vision features: the tower's output before the adapter; a frozen tower's are kept (`feature_cache`).

T tiles of an image, S image tokens a tile, C channels before the adapter (4 x the tower's width), H language width.
"""

from __future__ import annotations

import torch
import transformers


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


def settings(internvl) -> str:
    """What features follow from besides pixels and weights."""
    config = internvl.config
    names = ("vision_feature_layer", "vision_feature_select_strategy", "downsample_ratio")
    read = {name: getattr(config, name) for name in names}
    return f"{config.vision_config.to_json_string(use_diff=False)} {read} transformers {transformers.__version__}"
