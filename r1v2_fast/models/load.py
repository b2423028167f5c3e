"""A model with its tokenizer and image processor, from a preset or from any local InternVL-family folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoTokenizer, InternVLForConditionalGeneration
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil
from transformers.utils import logging

from r1v2_fast.models import presets, toy_tokenizer

FILES = {
    "tokenizer": ("tokenizer.json", "tokenizer_config.json"),
    "image processor": ("preprocessor_config.json", "processor_config.json"),
}
IMAGENET_MEAN = [0.485, 0.456, 0.406]
IMAGENET_STD = [0.229, 0.224, 0.225]


class Loaded(NamedTuple):
    model: InternVLForConditionalGeneration
    tokenizer: Any
    image_processor: GotOcr2ImageProcessorPil


def from_preset(name: str, *, words: list[str], seed: int, dtype: torch.dtype = torch.float32) -> Loaded:
    """The freshly initialised toy, the one preset with a tokenizer of its own.

    raises  ValueError on an unknown name, and with the command to use on an architecture without weights
    """
    if name in presets.ARCHITECTURES:
        raise ValueError(
            f"preset {name} is an architecture without weights: r1v2-fast train RECIPE model.preset=null "
            "model.path=FOLDER reads a local folder's, r1v2-fast train RECIPE --dummy-weights makes random ones up"
        )
    if name != "digits":
        raise ValueError(f"model.preset must be one of {presets.NAMES}, got {name!r}")
    tokenizer = toy_tokenizer.build(words)
    config = presets.digits(len(tokenizer), tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"))
    config.text_config.dtype = config.vision_config.dtype = dtype  # as a loaded folder's config says it
    config.text_config.eos_token_id = tokenizer.eos_token_id
    config.text_config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = InternVLForConditionalGeneration(config)
        for parameter in model.parameters():  # not the buffers: a loaded folder keeps rotary frequencies in fp32 too
            parameter.data = parameter.data.to(dtype)
    return with_processor(model, tokenizer, crop_to_patches=False)


def with_processor(model: InternVLForConditionalGeneration, tokenizer: Any, *, crop_to_patches: bool) -> Loaded:
    """A model made here with its tokenizer's end and padding, and InternVL's image processor for its tower."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    side = model.config.vision_config.image_size[0]
    processor = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side},
        image_mean=IMAGENET_MEAN,
        image_std=IMAGENET_STD,
        crop_to_patches=crop_to_patches,
    )
    return Loaded(model.eval(), tokenizer, processor)


def from_folder(path: str | Path, *, dtype: torch.dtype | str = "auto") -> Loaded:
    """Any local InternVL-family folder in Hugging Face format; nothing is downloaded and no remote code runs.

    raises  ValueError where it is another architecture, or a file is missing, broken or does not fit the config
    """
    path = Path(path)
    _check_files(path)
    model = _read_weights(path, dtype)
    local = {"local_files_only": True}
    tokenizer = _read(path, "tokenizer", lambda: AutoTokenizer.from_pretrained(path, **local))
    processor = _read(path, "image processor", lambda: GotOcr2ImageProcessorPil.from_pretrained(path, **local))
    check_image_token(model.config, tokenizer)
    return Loaded(model.eval(), tokenizer, processor)


def _check_files(path: Path) -> None:
    if not (path / "config.json").is_file():
        raise ValueError(f"a model must be a local Hugging Face folder with config.json, got {str(path)!r}")
    config = _read(path, "config.json", lambda: json.loads((path / "config.json").read_text(encoding="utf-8")))
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "internvl":
        hint = f"; r1v2-fast convert {path} DST writes it so" if kind in ("internvl_chat", "skywork_chat") else ""
        raise ValueError(f"{path}: config.json must have model_type 'internvl', got {kind!r}{hint}")
    for what, names in FILES.items():  # transformers would make up a tokenizer
        if not any((path / name).is_file() for name in names):
            raise ValueError(f"{path} holds no {what}: expected {' or '.join(names)} there")


def _read_weights(path: Path, dtype: torch.dtype | str) -> InternVLForConditionalGeneration:
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of the keys; the message below names them
    try:
        model, keys = _read(
            path,
            "weights",
            lambda: InternVLForConditionalGeneration.from_pretrained(
                path, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            ),
        )
    finally:
        logging.set_verbosity(verbosity)
    for kind in ("missing", "unexpected", "mismatched"):  # transformers makes up what is missing, and drops the rest
        names = sorted(key if isinstance(key, str) else key[0] for key in keys[f"{kind}_keys"])
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path}: its weights do not fit its config.json, {kind}: {', '.join(names[:3])}{more}")
    return model


def _read(path: Path, what: str, read: Callable[[], Any]) -> Any:
    """What `read` returns; raises ValueError in one sentence where a file is missing, cut short or of another shape."""
    try:
        return read()
    except Exception as error:  # transformers raises whatever its parsers meet
        raise ValueError(f"{path}: cannot read its {what}: {' '.join(str(error).split())}") from error


def save_folder(path: str | Path, loaded: Loaded, *, state: dict[str, torch.Tensor] | None = None) -> None:
    """The Hugging Face folder that `from_folder` and `AutoModelForImageTextToText` read; `state` replaces the weights.

    transformers' `generate` suppresses the tokens that a rollout forbids, so that both give the same answers.
    """
    from r1v2_fast.models.policy import forbidden_ids  # policy imports this module

    generation = loaded.model.generation_config
    forbidden = forbidden_ids(loaded.tokenizer, loaded.model.config.image_token_id).tolist()
    generation.suppress_tokens = sorted({*forbidden, *(generation.suppress_tokens or [])})
    loaded.model.save_pretrained(path, state_dict=state)
    loaded.tokenizer.save_pretrained(path)
    loaded.image_processor.save_pretrained(path)


def check_image_token(config, tokenizer) -> None:
    """The config's image token must be the tokenizer's, or features would land on words."""
    token = context_token(tokenizer)
    got = tokenizer.convert_tokens_to_ids(token)
    if got != config.image_token_id:
        raise ValueError(f"image_token_id in config.json is {config.image_token_id}, the tokenizer's {token} is {got}")


def context_token(tokenizer) -> str:
    return getattr(tokenizer, "context_image_token", None) or toy_tokenizer.IMAGE_TOKENS["context_image_token"]
