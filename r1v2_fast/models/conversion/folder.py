"""One checkpoint folder to another: what is small is written at once, what the weights will be is planned and checked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import InternVLConfig

from r1v2_fast.models.conversion import checkpoint, config, images, names, original_config, plan, tokenizer
from r1v2_fast.models.conversion.plan import Stored, Target
from r1v2_fast.models.reward_model import HEAD_FILE

PREPROCESSOR, GENERATION = "preprocessor_config.json", "generation_config.json"
LICENSES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "NOTICE")


def layout(source: Path) -> str:
    """`transformers` or `original`; raises ValueError where it is neither."""
    if not (source / "config.json").is_file():
        raise ValueError(f"expected a local checkpoint folder with config.json, got {str(source)!r}")
    kind = checkpoint.read_json(source / "config.json").get("model_type")
    if kind not in (*config.KINDS, "internvl"):
        raise ValueError(f"{source}: model_type must be internvl or {' or '.join(config.KINDS)}, got {kind!r}")
    return "transformers" if kind == "internvl" else "original"


def prepare(source: Path, staging: Path, *, language_model_only: bool, allow_pickle: bool) -> dict[str, Target]:
    """Every file but the weights, written to `staging`; the tensors to write, in their order.

    raises  ValueError where anything of `source` is missing, left over, broken or not supported
    """
    stored = checkpoint.read(source, allow_pickle=allow_pickle)
    for name in (GENERATION, *LICENSES):
        if (source / name).is_file():
            shutil.copyfile(source / name, staging / name)
    if layout(source) == "original":
        targets = _to_transformers(source, staging, stored, language_model_only=language_model_only)
    elif language_model_only:
        found = _transformers_config(source)
        targets = _checked(stored, found, source)
        tokenizer.copy(source, staging)
        _write_json(staging / "config.json", original_config.language_model(found))
    else:
        targets = _to_original(source, staging, stored)
    return plan.language_model(targets) if language_model_only else targets


def _to_transformers(
    source: Path, staging: Path, stored: dict[str, Stored], *, language_model_only: bool
) -> dict[str, Target]:
    original = checkpoint.read_json(source / "config.json")
    config.check_supported(original)
    token = tokenizer.write(source, staging)
    tied = config.is_tied(original, has_head=names.HEAD in stored)
    rows = stored[names.EMBEDDING].shape[0] if names.EMBEDDING in stored else None
    made = config.to_transformers(original, tied=tied, vocab_size=rows, image_token_id=token)
    shapes = plan.expected_shapes(made)
    plan.check(stored, plan.original_shapes(shapes), tied=tied, where=str(source))
    if tied:
        plan.check_head(stored, where=str(source))
    if not (staging / GENERATION).is_file():
        _write_json(staging / GENERATION, {"eos_token_id": tokenizer.ends(staging, made.text_config.eos_token_id)})
    preprocessor = checkpoint.read_json(source / PREPROCESSOR) if (source / PREPROCESSOR).is_file() else None
    if language_model_only:
        _write_json(staging / "config.json", original_config.language_model(made))
    else:
        keep = config.kept_files(made) | tokenizer.kept(source)
        if preprocessor is not None:
            keep[PREPROCESSOR] = (source / PREPROCESSOR).read_text(encoding="utf-8")
        setattr(made, config.KEPT, keep)
        written = json.loads(made.to_json_string())
        written["text_config"] = original_config.text_with_rope(written["text_config"])
        _write_json(staging / "config.json", written)
        _write_json(staging / PREPROCESSOR, images.to_transformers(original, preprocessor or {}))
    targets = plan.to_transformers(stored.values())
    return {name: targets[name] for name in shapes if name in targets}


def _to_original(source: Path, staging: Path, stored: dict[str, Stored]) -> dict[str, Target]:
    if (source / HEAD_FILE).is_file():
        raise ValueError(f"{source}: expected a policy, got a reward model: the original layout has no {HEAD_FILE}")
    found = _transformers_config(source)
    shapes = plan.original_shapes(plan.expected_shapes(found))
    targets = plan.to_original([target.spans[0].stored for target in _checked(stored, found, source).values()])
    keep = config.kept_files(found)
    preprocessor = _images(source)
    _write_json(staging / "config.json", original_config.to_original(found, preprocessor))
    clip = json.loads(keep[PREPROCESSOR]) if PREPROCESSOR in keep else images.to_original(preprocessor)
    _write_json(staging / PREPROCESSOR, clip)
    tokenizer.write_back(source, staging, keep)
    return {name: targets[name] for name in shapes if name in targets}


def _checked(stored: dict[str, Stored], found: InternVLConfig, source: Path) -> dict[str, Target]:
    """The tensors of a folder in transformers' layout, each whole and under its stored name, in the model's order."""
    renamed: dict[str, Stored] = {}
    for tensor in stored.values():
        name = names.stored_name(tensor.name)
        if name in renamed:
            raise ValueError(f"{source}: expected {name} once, got it as {renamed[name].name} and {tensor.name}")
        renamed[name] = tensor
    renamed = {name: replace(tensor, name=name) for name, tensor in renamed.items()}
    shapes = plan.expected_shapes(found)
    plan.check(renamed, shapes, tied=found.tie_word_embeddings, where=str(source))
    if found.tie_word_embeddings:
        plan.check_head(renamed, where=str(source))
    return {n: Target(n, t.dtype, t.shape, [plan.Span(t, 0, t.nbytes)]) for n in shapes if (t := renamed.get(n))}


def _transformers_config(source: Path) -> InternVLConfig:
    read = checkpoint.read_json(source / "config.json")
    text = read.get("text_config") or {}
    if (kind := text.get("model_type", "qwen2") if isinstance(text, dict) else text) != "qwen2":
        raise ValueError(f"text_config: the language model must be qwen2, got {kind!r}, which is not supported")
    try:
        return InternVLConfig.from_dict(read)
    except Exception as error:  # its validators raise kinds of their own
        raise ValueError(f"{source}: cannot read its config.json: {' '.join(str(error).split())}") from error


def _images(source: Path) -> dict[str, Any]:
    for name in (PREPROCESSOR, "processor_config.json"):
        if (source / name).is_file():
            found = checkpoint.read_json(source / name)
            found = found.get("image_processor", found)
            if not isinstance(found.get("size"), dict) or "height" not in found["size"]:
                raise ValueError(f"{source / name}: size must hold a height, got {found.get('size')!r}")
            return found
    raise ValueError(f"{source} holds no image processor: expected {PREPROCESSOR} there")


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
