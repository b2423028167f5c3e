"""Tokenizer files: copied, with the image tokens named and a chat template that takes image parts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from r1v2_fast.models.conversion import template
from r1v2_fast.models.conversion.checkpoint import read_json

CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
OLD_TEMPLATE = "chat_template.json"
IMAGE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": template.CONTEXT}
VIDEO = "<|video_pad|>"  # Qwen's; transformers' processor wants a video_token to be named
COPIED = (
    "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer.model",
)  # fmt: skip
VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def files(source: Path) -> list[str]:
    """What `copy` copies; raises ValueError where a tokenizer is missing or half there."""
    if not any(all((source / name).is_file() for name in group) for group in VOCABULARIES):
        expected = " or ".join(" with ".join(group) for group in VOCABULARIES)
        raise ValueError(f"{source} holds no tokenizer: expected {expected} there")
    if not (source / CONFIG).is_file():
        raise ValueError(f"{source} holds no {CONFIG}")
    return [name for name in COPIED if (source / name).is_file()]


def own_template(source: Path) -> str | None:
    """The checkpoint's chat template, wherever it keeps it."""
    if (source / TEMPLATE).is_file():
        return (source / TEMPLATE).read_text(encoding="utf-8")
    found = read_json(source / CONFIG).get("chat_template")
    if (source / OLD_TEMPLATE).is_file():
        found = read_json(source / OLD_TEMPLATE).get("chat_template", found)
    if isinstance(found, list):  # several by name
        found = next((e.get("template") for e in found if isinstance(e, dict) and e.get("name") == "default"), None)
    if not isinstance(found, str | None):
        raise ValueError(f"{source}: chat_template must be a string, got {type(found).__name__}")
    return found


def kept(source: Path) -> dict[str, str]:
    """The files that the conversion edits, as they are; for the way back."""
    edited = [name for name in (CONFIG, TEMPLATE, OLD_TEMPLATE) if (source / name).is_file()]
    return {name: (source / name).read_text(encoding="utf-8") for name in edited}


def copy(source: Path, folder: Path) -> None:
    """The tokenizer as it is."""
    present = [name for name in (CONFIG, TEMPLATE, OLD_TEMPLATE) if (source / name).is_file()]
    for name in (*files(source), *present):
        shutil.copyfile(source / name, folder / name)


def ends(folder: Path, said: int | list[int] | None) -> list[int]:
    """Ids that end an answer: what config.json says, and the tokenizer's; InternVL's code took the latter."""
    tokenizer = _load(folder, folder)
    listed = said if isinstance(said, list) else [said]
    return sorted({index for index in (*listed, tokenizer.eos_token_id) if index is not None})


def write(source: Path, folder: Path) -> int:
    """The tokenizer in `folder`; returns the id of the context token.

    raises  ValueError where an image token is missing, or transformers reads an id other than the checkpoint's
    """
    for name in files(source):
        shutil.copyfile(source / name, folder / name)
    settings = {k: v for k, v in read_json(source / CONFIG).items() if k not in ("chat_template", "auto_map")}
    (folder / CONFIG).write_text(_json(settings), encoding="utf-8")
    tokenizer = _load(folder, source)
    vocabulary = tokenizer.get_vocab()
    _check_ids(source, settings, vocabulary)
    if absent := [token for token in IMAGE_TOKENS.values() if token not in vocabulary]:
        raise ValueError(f"{source}: its tokenizer must hold the image tokens, got none of the name {absent}")
    settings |= {**IMAGE_TOKENS, **({"video_token": VIDEO} if VIDEO in vocabulary else {})}
    (folder / CONFIG).write_text(_json(settings), encoding="utf-8")
    written = template.with_images(tokenizer, own_template(source), where=str(source))
    (folder / TEMPLATE).write_text(written, encoding="utf-8")
    named = _load(folder, source)  # naming a token must not have added one
    if (size := len(named)) != len(tokenizer):
        raise ValueError(
            f"{source}: expected a tokenizer of {len(tokenizer)} tokens once its image tokens are named, got {size}"
        )
    if not (folder / "tokenizer.json").is_file():
        named.backend_tokenizer.save(str(folder / "tokenizer.json"))
    return vocabulary[template.CONTEXT]


def write_back(source: Path, folder: Path, originals: dict[str, str]) -> None:
    """The tokenizer in the original layout: the files that `kept` saw, the vocabulary also for slow tokenizers."""
    for name in files(source):
        shutil.copyfile(source / name, folder / name)
    settings = json.loads(originals[CONFIG]) if CONFIG in originals else read_json(source / CONFIG)
    if CONFIG not in originals and (source / TEMPLATE).is_file():
        settings["chat_template"] = (source / TEMPLATE).read_text(encoding="utf-8")
    (folder / CONFIG).write_text(_json({k: v for k, v in settings.items() if k != "auto_map"}), encoding="utf-8")
    for name in (TEMPLATE, OLD_TEMPLATE):
        if name in originals:
            (folder / name).write_text(originals[name], encoding="utf-8")
    if not (folder / "vocab.json").is_file():
        _write_slow(folder)


def _write_slow(folder: Path) -> None:
    """vocab.json, merges.txt and added_tokens.json out of tokenizer.json: the original code asks for `use_fast=False`."""
    core = read_json(folder / "tokenizer.json")
    if core["model"]["type"] != "BPE":
        return
    added = {token["content"]: token["id"] for token in core["added_tokens"]}
    plain = {token: index for token, index in core["model"]["vocab"].items() if token not in added}
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in core["model"]["merges"]]
    (folder / "vocab.json").write_text(json.dumps(plain, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "added_tokens.json").write_text(_json(added), encoding="utf-8")


def _load(folder: Path, source: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parsers meet
        raise ValueError(f"{source}: cannot read its tokenizer: {' '.join(str(error).split())}") from error


def _check_ids(source: Path, settings: dict[str, Any], vocabulary: dict[str, int]) -> None:
    try:
        said = {entry["content"]: int(index) for index, entry in settings.get("added_tokens_decoder", {}).items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{source / CONFIG}: added_tokens_decoder must hold each token's content: {error}") from error
    if (source / "added_tokens.json").is_file():
        said |= read_json(source / "added_tokens.json")
    if wrong := {t: (i, vocabulary.get(t)) for t, i in said.items() if vocabulary.get(t) != i}:
        token, (expected, got) = next(iter(wrong.items()))
        raise ValueError(f"{source}: {token} must have id {expected} in the tokenizer, got {got}")


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
