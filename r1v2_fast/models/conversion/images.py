"""preprocessor_config.json: how a picture becomes tiles, from where each layout says it."""

from __future__ import annotations

from typing import Any

from r1v2_fast.models.conversion.config import with_defaults

IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


def to_transformers(original: dict[str, Any], images: dict[str, Any]) -> dict[str, Any]:
    """transformers' own tiling: up to `max_dynamic_patch` tiles of one picture, and a thumbnail behind more than one.

    original  config.json, where the original code reads size and tiles
    images    the original preprocessor_config.json, where the statistics are; ImageNet's where it is silent
    raises    ValueError where a number of tiles or the statistics are none
    """
    full = with_defaults(original)
    side = full["force_image_size"] or full["vision_config"]["image_size"]
    fewest, most = full["min_dynamic_patch"], full["max_dynamic_patch"]
    if not (type(fewest) is type(most) is int and 1 <= fewest <= most):
        raise ValueError(f"expected 1 <= min_dynamic_patch <= max_dynamic_patch, got {fewest!r} and {most!r}")
    statistics = {
        "image_mean": images.get("image_mean", IMAGENET_MEAN),
        "image_std": images.get("image_std", IMAGENET_STD),
    }
    for name, value in statistics.items():
        if not (isinstance(value, list) and len(value) == 3 and {type(number) for number in value} <= {int, float}):
            raise ValueError(f"preprocessor_config.json: {name} must be three numbers, got {value!r}")
    return {
        "image_processor_type": "GotOcr2ImageProcessor",
        "crop_to_patches": bool(full["dynamic_image_size"]),
        "min_patches": fewest,
        "max_patches": most,
        "size": {"height": side, "width": side},
        "resample": 3,  # bicubic
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        **statistics,
    }


def to_original(images: dict[str, Any]) -> dict[str, Any]:
    """What the original layout has there: CLIP's, for one tile; the tiling is in config.json."""
    side = images["size"]["height"]
    return {
        "feature_extractor_type": "CLIPFeatureExtractor",
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": side,
        "size": side,
        "do_center_crop": True,
        "do_normalize": True,
        "do_resize": True,
        "resample": 3,
        "image_mean": images.get("image_mean", IMAGENET_MEAN),
        "image_std": images.get("image_std", IMAGENET_STD),
    }
