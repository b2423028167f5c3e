"""config.json of `internvl_chat` and `skywork_chat` to transformers' InternVL.

A converted config keeps what it was made from under `original_files`, name by name: transformers carries unknown keys
through training and saving, so that going back gives the same config. As text: inside objects it drops keys of its own.
"""

from __future__ import annotations

import json
from typing import Any

from transformers import InternVLConfig

KINDS = ("internvl_chat", "skywork_chat")
KEPT = "original_files"

# What the original classes take where their config.json is silent: they leave out what equals these.
CHAT = {
    "select_layer": -1, "force_image_size": None, "downsample_ratio": 0.5, "dynamic_image_size": False,
    "use_thumbnail": False, "pad2square": False, "ps_version": "v1", "min_dynamic_patch": 1, "max_dynamic_patch": 6,
}  # fmt: skip
TOWER = {
    "num_channels": 3, "patch_size": 14, "image_size": 224, "qkv_bias": False, "hidden_size": 3200,
    "num_attention_heads": 25, "intermediate_size": 12800, "qk_normalization": True, "num_hidden_layers": 48,
    "hidden_act": "gelu", "norm_type": "rms_norm", "layer_norm_eps": 1e-6, "dropout": 0.0, "attention_dropout": 0.0,
    "initializer_range": 0.02, "initializer_factor": 0.1,
}  # fmt: skip
# The tower's fields under both names; image_size and patch_size are a number there, a pair here
RENAMED = {
    "qkv_bias": "attention_bias", "qk_normalization": "use_qk_norm", "dropout": "hidden_dropout_prob",
    "initializer_factor": "layer_scale_init_value",
}  # fmt: skip
PAIRS = ("image_size", "patch_size")
LANGUAGE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps",
    "use_sliding_window", "sliding_window", "max_window_layers", "attention_dropout", "pad_token_id", "bos_token_id",
    "eos_token_id", "head_dim",
)  # fmt: skip


def with_defaults(original: dict[str, Any]) -> dict[str, Any]:
    return {**CHAT, **original, "vision_config": {**TOWER, **_part(original, "vision_config")}}


def _part(config: dict[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(part := config.get(name), dict):
        raise ValueError(f"config.json: {name} must be an object, got {part!r}")
    return part


def check_supported(original: dict[str, Any]) -> None:
    """raises  ValueError where transformers' InternVL cannot be what this config describes"""
    full = with_defaults(original)
    language, tower = _part(original, "llm_config"), full["vision_config"]
    listed = language.get("architectures")
    kind = listed[0] if isinstance(listed, list) and listed else language.get("model_type")
    if kind not in ("Qwen2ForCausalLM", "qwen2"):
        raise ValueError(f"llm_config: the language model must be Qwen2ForCausalLM, got {kind}, which is not supported")
    if quantization := original.get("quantization_config") or language.get("quantization_config"):
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization
        raise ValueError(f"expected weights that are not quantised, got quantization_config {method!r}")
    if full["ps_version"] != "v2":  # v1 leaves the tile's 256 tokens transposed: an order, which no weights can undo
        said = repr(original["ps_version"]) if "ps_version" in original else "nothing, which means 'v1'"
        raise ValueError(
            f"ps_version must be 'v2', got {said}: v1 orders the image tokens by columns, which transformers' InternVL "
            "cannot. If the weights were trained with v2, say so in the checkpoint's config.json"
        )
    if tower["qk_normalization"] and tower["layer_norm_eps"] != 1e-6:  # transformers' q_norm and k_norm take no other
        raise ValueError(f"layer_norm_eps must be 1e-6 under qk_normalization, got {tower['layer_norm_eps']}")
    for name, wanted in (("use_thumbnail", True), ("pad2square", False)):  # as the image processor does it
        if full["dynamic_image_size"] and bool(full[name]) is not wanted:
            raise ValueError(f"{name} must be {wanted} under dynamic_image_size, got {full[name]!r}")
    layers, layer = tower["num_hidden_layers"], full["select_layer"]
    if not isinstance(layer, int) or not -layers - 1 <= layer <= layers:
        raise ValueError(f"select_layer must name one of the tower's {layers} layers, got {layer!r}")
    for name in ("use_backbone_lora", "use_llm_lora"):
        if original.get(name):
            raise ValueError(f"{name} must be 0, got {original[name]!r}: merge the adapters first")


def is_tied(original: dict[str, Any], *, has_head: bool) -> bool:
    """Whether the head is the embedding: llm_config says it, the top level only where llm_config is silent."""
    language = _part(original, "llm_config")
    return bool(language.get("tie_word_embeddings", original.get("tie_word_embeddings", False) and not has_head))


def to_transformers(
    original: dict[str, Any], *, tied: bool, vocab_size: int | None, image_token_id: int
) -> InternVLConfig:
    """The config of transformers' model.

    vocab_size  rows of the stored embedding; None where it is missing
    raises      ValueError where it is not supported, a field has another type, vocab_size is not the embedding's or
                the image token lies beyond it
    """
    check_supported(original)
    full = with_defaults(original)
    tower, language = full["vision_config"], _part(original, "llm_config")
    said = language.get("vocab_size", vocab_size or 151936)
    if vocab_size not in (said, None):
        raise ValueError(f"llm_config.vocab_size is {said}, the stored embedding has {vocab_size} rows")
    if image_token_id >= said:
        raise ValueError(f"the image token must be one of the embedding's {said} rows, got id {image_token_id}")
    vision = {RENAMED.get(name, name): tower[name] for name in TOWER}
    vision |= {name: [tower[name]] * 2 for name in PAIRS if isinstance(tower[name], int)}
    text = {name: language[name] for name in LANGUAGE if name in language}
    text |= {"model_type": "qwen2", "vocab_size": said, "tie_word_embeddings": tied}
    try:
        text["rope_parameters"] = _rope(language)
        tokens = _tokens_per_tile(full["force_image_size"] or tower["image_size"], tower["patch_size"], full)
        config = InternVLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=image_token_id,
            image_seq_length=tokens,
            downsample_ratio=full["downsample_ratio"],
            vision_feature_layer=full["select_layer"],
            tie_word_embeddings=tied,
            architectures=["InternVLForConditionalGeneration"],
            **{KEPT: {"config.json": json.dumps(original)}},
        )
    except Exception as error:  # its validators raise kinds of their own
        raise ValueError(f"config.json: {' '.join(str(error).split())}") from error
    dtype = original.get("torch_dtype") or original.get("dtype") or language.get("torch_dtype")
    if dtype:
        config.dtype = config.text_config.dtype = config.vision_config.dtype = dtype
    return config


def _rope(language: dict[str, Any]) -> dict[str, Any]:
    said = dict(language.get("rope_scaling") or {})
    kind = said.pop("type", "default")  # the name before rope_type
    scaling = {name: value for name, value in said.items() if value is not None}
    return {"rope_type": kind, **scaling, "rope_theta": float(language.get("rope_theta", 1e4))}


def _tokens_per_tile(side: int, patch: int, full: dict[str, Any]) -> int:
    grid = side // patch * full["downsample_ratio"]
    if side % patch or grid != int(grid) or grid < 1:
        raise ValueError(f"a tile of {side} pixels is not cut evenly into patches of {patch} and groups of them")
    return int(grid) ** 2


def kept_files(config: InternVLConfig) -> dict[str, str]:
    """The files that a converted config keeps, as text by name."""
    kept = getattr(config, KEPT, {})
    if not isinstance(kept, dict) or not all(isinstance(text, str) for text in kept.values()):
        raise ValueError(f"config.json: {KEPT} must hold text by name, got {kept!r:.100}")
    return kept
