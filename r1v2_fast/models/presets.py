"""Model presets: the toy that trains on a laptop, and the architectures of InternVL3-1B and Skywork R1V2-38B.

All are `InternVLForConditionalGeneration` configs: a vision tower, pixel shuffle, a two-layer MLP adapter, Qwen2.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from transformers import InternVLConfig


def digits(vocab_size: int, image_token_id: int) -> InternVLConfig:
    """About 0.3 M parameters: 16x16 pictures, 16 patches, 4 image tokens.

    `layer_scale_init_value` is 1.0: with the family's 0.1 so small a tower trains too slowly, and the model settles on
    ignoring the picture.
    """
    return InternVLConfig(
        vision_config={
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [16, 16],
            "patch_size": [4, 4],
            "layer_scale_init_value": 1.0,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": vocab_size,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
        },
        image_token_id=image_token_id,
        image_seq_length=4,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


def r1v2_38b(image_token_id: int = 151671) -> InternVLConfig:
    """InternViT-6B-448px-V2.5 + MLP + QwQ-32B (arXiv 2504.16656, section 3.1).

    Shapes follow the released towers' own configs. The released checkpoint's `<IMG_CONTEXT>` id is not documented:
    151671 is what appending InternVL's tokens to QwQ's tokenizer gives; a loaded checkpoint brings its own.
    """
    return InternVLConfig(**_r1v2_38b(image_token_id))


def _r1v2_38b(image_token_id: int = 151671) -> dict[str, Any]:
    return {
        "vision_config": {
            "hidden_size": 3200,
            "intermediate_size": 12800,
            "num_hidden_layers": 45,
            "num_attention_heads": 25,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": False,
            "use_qk_norm": True,
            "norm_type": "rms_norm",
            "layer_norm_eps": 1e-6,
            "layer_scale_init_value": 0.1,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 5120,
            "intermediate_size": 27648,
            "num_hidden_layers": 64,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "vocab_size": 152064,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
            "tie_word_embeddings": False,
            "eos_token_id": 151645,
        },
        "image_token_id": image_token_id,
        "image_seq_length": 256,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    }


def _internvl3_1b() -> dict[str, Any]:
    """InternViT-300M-448px-V2.5 + MLP + Qwen2.5-0.5B (arXiv 2504.10479): 938 M parameters, as published, with a head of its
    own; tied to the embedding it would be 802 M.
    """
    return {
        "vision_config": {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": [448, 448],
            "patch_size": [14, 14],
            "attention_bias": True,
            "use_qk_norm": False,
            "norm_type": "layer_norm",
            "layer_norm_eps": 1e-6,
            "layer_scale_init_value": 0.1,
        },
        "text_config": {
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151674,
            "max_position_embeddings": 32768,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e6, "factor": 2.0},
            "tie_word_embeddings": False,
            "eos_token_id": 151645,
        },
        "image_token_id": 151667,
        "image_seq_length": 256,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": False,
    }


ARCHITECTURES: dict[str, Callable[[], dict[str, Any]]] = {"internvl3-1b": _internvl3_1b, "r1v2-38b": _r1v2_38b}
NAMES = ("digits", *ARCHITECTURES)


def architecture(name: str, changes: Mapping[str, Any] | None = None) -> InternVLConfig:
    """The config of an architecture that has no weights here, `changes` laid over it section by section.

    raises  ValueError on an unknown name or key
    """
    if name not in ARCHITECTURES:
        raise ValueError(f"expected an architecture among {tuple(ARCHITECTURES)}, got {name!r}")
    values = ARCHITECTURES[name]()
    _lay_over(values, changes or {}, InternVLConfig(**values), "model.architecture")
    return InternVLConfig(**values)


def _lay_over(values: dict[str, Any], changes: Mapping[str, Any], config: Any, where: str) -> None:
    for key, value in changes.items():
        if not hasattr(config, key):  # transformers' configs take any keyword in silence
            known = [name for name in values if hasattr(config, name)]
            close = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            raise ValueError(f"{where}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if isinstance(values.get(key), dict) and isinstance(value, Mapping):
            _lay_over(values[key], value, getattr(config, key), f"{where}.{key}")
        else:
            values[key] = value
