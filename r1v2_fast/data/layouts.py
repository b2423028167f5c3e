"""Layouts: a row as TRL, verl or MMPR write it, turned into ours; a row in our own layout comes out as it went in.

TRL    messages in `prompt`, pictures in `image` or `images`, `solution`; `chosen` and `rejected` as messages, the
       prompt in them where there is no `prompt`
verl   `<image>` marks in the messages, the answer in `reward_model.ground_truth`
MMPR   `image`, `question`, `chosen`, `rejected`
"""

from __future__ import annotations

from reprlib import repr as short
from typing import Any, NoReturn

MARK = "<image>"
NOT_IMAGES = ("video", "videos", "audio", "audios")


def canonical(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with `id, prompt, images, answer, chosen, rejected` in our layout and its other columns as they were.

    raises  ValueError that starts with `where`: malformed messages, or something other than text and images
    """
    for name in NOT_IMAGES:
        if row.get(name):
            _fail(where, name, "only text and images are supported", row[name])
    row = dict(row)
    if not row.get("images") and "image" in row:
        image = row.pop("image")
        row["images"] = image if isinstance(image, list) else [image] if image else []
    if isinstance(row.get("reward_model"), dict):
        _from_verl(row, where)
    if row.get("answer") is None and isinstance(solution := row.get("solution"), (str, int, float)):
        if isinstance(solution, bool):
            _fail(where, "solution", "expected a string or a number", solution)
        row["answer"] = solution
    if row.get("prompt") is None and (isinstance(row.get("chosen"), list) or isinstance(row.get("rejected"), list)):
        _split_conversations(row, where)
    if row.get("prompt") is None and isinstance(row.get("question"), str):
        marks = 0 if MARK in row["question"] else _count(row.get("images"))
        row["prompt"] = f"{MARK}\n" * marks + row["question"]
    if isinstance(row.get("prompt"), list):
        row["prompt"] = _with_images(_messages(row["prompt"], where, "prompt"), _count(row.get("images")), where)
    for name in ("chosen", "rejected"):
        if isinstance(row.get(name), list):
            row[name] = _reply(_messages(row[name], where, name), where, name)
    return row


def marks_of(prompt: str | list[dict]) -> int:
    """How many pictures a prompt has places for: `<image>` in any text, and image parts."""
    if isinstance(prompt, str):
        return prompt.count(MARK)
    count = 0
    for message in prompt:
        for part in _parts(message["content"]):
            count += part["text"].count(MARK) if part["type"] == "text" else 1
    return count


def text_of(prompt: str | list[dict]) -> str:
    """What a reader reads: the text of a prompt, its messages one below the other."""
    if isinstance(prompt, str):
        return prompt
    texts = ("".join(part.get("text", "") for part in _parts(message["content"])) for message in prompt)
    return "\n".join(texts)


def _from_verl(row: dict[str, Any], where: str) -> None:
    truth = row["reward_model"].get("ground_truth")
    if not isinstance(truth, (str, int, float, type(None))) or isinstance(truth, bool):
        _fail(where, "reward_model", "expected a ground_truth that is a string or a number", truth)
    if row.get("answer") is None:
        row["answer"] = truth


def _split_conversations(row: dict[str, Any], where: str) -> None:
    """Two conversations that differ in their last message: what they share is the prompt."""
    chosen, rejected = (_messages(row.get(name), where, name) for name in ("chosen", "rejected"))
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if shared == 0:
        _fail(where, "prompt", "without it, chosen and rejected must begin with the same messages", row["chosen"])
    row["prompt"], row["chosen"], row["rejected"] = chosen[:shared], chosen[shared:], rejected[shared:]


def _messages(messages: Any, where: str, field: str) -> list[dict]:
    """Checked messages, less the null keys that parquet gives every struct."""
    if not isinstance(messages, list) or not messages:
        _fail(where, field, "expected a list of messages", messages)
    checked = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            _fail(where, field, "expected messages with role and content", message)
        content = message.get("content")
        if isinstance(content, list):
            content = [_part(part, where, field) for part in content]
        elif not isinstance(content, str):
            _fail(where, field, "expected content that is a string or a list of parts", content)
        checked.append({**{key: value for key, value in message.items() if value is not None}, "content": content})
    return checked


def _part(part: Any, where: str, field: str) -> dict:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    if kind == "image" and part.get("image") is None:
        return {"type": "image"}
    expected = "a text part with its text, or an image part whose picture is in column 'images'"
    _fail(where, field, f"only text and images are supported: expected {expected}", part)


def _with_images(messages: list[dict], images: int, where: str) -> list[dict]:
    """Messages that say nowhere where the pictures belong get them in front of the first thing the user says, as in TRL."""
    if images == 0 or marks_of(messages) > 0:
        return messages
    for index, message in enumerate(messages):
        if message["role"] == "user":
            first = {**message, "content": [{"type": "image"}] * images + _parts(message["content"])}
            return [*messages[:index], first, *messages[index + 1 :]]
    _fail(where, "prompt", f"expected a message of role user to put {images} images into", messages)


def _reply(messages: list[dict], where: str, field: str) -> str:
    parts = _parts(messages[0]["content"])
    if len(messages) != 1 or messages[0]["role"] != "assistant" or any(part["type"] != "text" for part in parts):
        _fail(where, field, "expected one assistant message of text", messages)
    return "".join(part["text"] for part in parts)


def _parts(content: str | list[dict]) -> list[dict]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _count(images: Any) -> int:
    return len(images) if isinstance(images, list) else int(images is not None)


def _fail(where: str, field: str, expected: str, got: Any) -> NoReturn:
    raise ValueError(f"{where}, field {field!r}: {expected}, got {short(got)}")
