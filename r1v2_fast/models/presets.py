"""Model presets: the toy that trains on a laptop, and Skywork R1V2-38B.

Both are `InternVLForConditionalGeneration` configs: a vision tower, pixel shuffle, a two-layer MLP adapter, Qwen2.
"""

from __future__ import annotations

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
    return InternVLConfig(
        vision_config={
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
        text_config={
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
        image_token_id=image_token_id,
        image_seq_length=256,
        downsample_ratio=0.5,
        tie_word_embeddings=False,
    )


NAMES = ("digits", "r1v2-38b")
