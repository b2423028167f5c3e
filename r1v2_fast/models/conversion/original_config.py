"""transformers' InternVL config back to `internvl_chat` / `skywork_chat`, and to its language model's alone."""

from __future__ import annotations

import json
from typing import Any

from transformers import InternVLConfig, Qwen2Config

from r1v2_fast.models.conversion.config import (
    KEPT,
    LANGUAGE,
    PAIRS,
    RENAMED,
    TOWER,
    kept_files,
    to_transformers,
    with_defaults,
)

# What says nothing about which function the weights are
_NO_SHAPE = {"dtype", "architectures", "transformers_version", "use_cache", "_name_or_path", KEPT, "eos_token_id",
             "pad_token_id", "bos_token_id", "rope_theta", "rope_scaling", "image_token_id"}  # fmt: skip


def to_original(config: InternVLConfig, images: dict[str, Any]) -> dict[str, Any]:
    """The original layout's config.json: the one that `config` was made from, where it was, less its code.

    images  preprocessor_config.json
    raises  ValueError where the kept one describes another model, or the original classes cannot be this one
    """
    built = _build(config, images)
    if not (text := kept_files(config).get("config.json")):
        return built
    kept = json.loads(text)
    again = to_transformers(
        kept,
        tied=config.tie_word_embeddings,
        vocab_size=config.text_config.vocab_size,
        image_token_id=config.image_token_id,
    )
    was, now = (_flat(c.to_dict()) for c in (again, config))
    if changed := sorted(name for name in was.keys() | now.keys() if was.get(name) != now.get(name)):
        said = "; ".join(f"{name}: expected {was.get(name)!r}, got {now.get(name)!r}" for name in changed[:4])
        raise ValueError(f"config.json is no longer what its {KEPT} describes: {said}")
    original, full = _without_code(kept), with_defaults(kept)
    for name in ("dynamic_image_size", "min_dynamic_patch", "max_dynamic_patch"):  # as it was trained
        original |= {name: built[name]} if built[name] != full[name] else {}
    if _dtype(config) != _dtype(again):  # exported in another one
        for part in (original, original["llm_config"], original.get("vision_config", {})):
            part |= {"torch_dtype": built["torch_dtype"]}
    return original


def _build(config: InternVLConfig, images: dict[str, Any]) -> dict[str, Any]:
    """For a model that was never in the original layout."""
    vision, text = config.vision_config, config.text_config
    if text.model_type != "qwen2":
        raise ValueError(f"text_config: the language model must be qwen2, got {text.model_type!r}")
    if config.vision_feature_select_strategy != "default" or not isinstance(config.vision_feature_layer, int):
        said = (config.vision_feature_select_strategy, config.vision_feature_layer)
        raise ValueError(f"expected vision_feature_select_strategy 'default' and one vision_feature_layer, got {said}")
    if config.projector_hidden_act != "gelu":
        raise ValueError(f"projector_hidden_act must be 'gelu', got {config.projector_hidden_act!r}")
    tower = {name: getattr(vision, RENAMED.get(name, name)) for name in TOWER}
    for name in PAIRS:
        if len(set(tower[name])) > 1:
            raise ValueError(f"vision_config.{name} must be a square, got {tower[name]}")
        tower[name] = tower[name][0]
    rope = dict(text.rope_parameters)
    language = {name: getattr(text, name) for name in LANGUAGE if hasattr(text, name)}
    language |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": None if rope["rope_type"] == "default" else rope}
    tied, dtype = config.tie_word_embeddings, _dtype(config) or "bfloat16"
    return {
        "model_type": "internvl_chat",
        "architectures": ["InternVLChatModel"],
        "vision_config": {"model_type": "intern_vit_6b", "architectures": ["InternVisionModel"], **tower},
        "llm_config": {
            "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": tied,
            "torch_dtype": dtype, **language,
        },
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
        "hidden_size": text.hidden_size,
        "downsample_ratio": config.downsample_ratio,
        "select_layer": config.vision_feature_layer,
        "force_image_size": images["size"]["height"],
        "dynamic_image_size": bool(images.get("crop_to_patches")),
        "use_thumbnail": True,
        "min_dynamic_patch": images.get("min_patches", 1),
        "max_dynamic_patch": images.get("max_patches", 12),
        "ps_version": "v2",
        "template": "internvl2_5",
    }  # fmt: skip


def language_model(config: InternVLConfig) -> dict[str, Any]:
    """Qwen2ForCausalLM's config.json."""
    text = Qwen2Config(**{**config.text_config.to_dict(), "tie_word_embeddings": config.tie_word_embeddings})
    text.architectures, text.dtype = ["Qwen2ForCausalLM"], config.dtype
    return text_with_rope(json.loads(text.to_json_string()))


def text_with_rope(text: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters under transformers 4's names too: it, and servers on it, would silently take theta 10000."""
    rope = dict(text["rope_parameters"])
    theta = rope.pop("rope_theta")
    return {**text, "rope_theta": theta, "rope_scaling": None if rope["rope_type"] == "default" else rope}


def _dtype(config: InternVLConfig) -> str | None:
    return str(config.dtype).removeprefix("torch.") if config.dtype else None


def _flat(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in config.items():
        if name in _NO_SHAPE:
            continue
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    """auto_map names Python files of the checkpoint, which are not copied."""
    return {n: _without_code(v) if isinstance(v, dict) else v for n, v in config.items() if n != "auto_map"}
