"""Tokens: a record's prompt with its images expanded, and sequences padded into a batch.

B sequences, L padded length, N response tokens of the batch. Prompts are padded on the left and responses on the
right, so that every prompt ends in the same column, in rollout and in training alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from r1v2_fast.data.records import MARK, Record

TOKENS = {"start_image_token": "<img>", "context_image_token": "<IMG_CONTEXT>", "end_image_token": "</img>"}


@dataclass(frozen=True)
class Sequence:
    """A prompt and one response to it, unpadded."""

    prompt_ids: list[int]
    response_ids: list[int]
    image_keys: list[str]


@dataclass(frozen=True)
class Batch:
    input_ids: torch.Tensor  # [B, L] int64
    attention_mask: torch.Tensor  # [B, L] int64
    response_mask: torch.Tensor  # [B, L] bool, True at response tokens
    image_keys: list[list[str]]

    @property
    def positions(self) -> torch.Tensor:
        return (self.attention_mask.cumsum(1) - 1).clamp(min=0)

    @property
    def offsets(self) -> torch.Tensor:
        """[B + 1]: response tokens packed row by row."""
        lengths = self.response_mask.sum(1)
        return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])

    @property
    def rows(self) -> torch.Tensor:
        """[N]: where in the flat [B L] stands what predicts a response token."""
        return self.response_mask.flatten().nonzero().flatten() - 1

    @property
    def targets(self) -> torch.Tensor:
        """[N]: the response tokens."""
        return self.input_ids[self.response_mask]

    @property
    def last(self) -> torch.Tensor:
        """[B]: where in the flat [B L] a sequence ends."""
        rows, columns = (torch.arange(n, device=self.input_ids.device) for n in self.input_ids.shape)
        return rows * len(columns) + (columns * self.attention_mask).argmax(1)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            self.input_ids.to(device), self.attention_mask.to(device), self.response_mask.to(device), self.image_keys
        )


def collate(sequences: list[Sequence], pad_id: int) -> Batch:
    left = max(len(s.prompt_ids) for s in sequences)
    length = left + max(len(s.response_ids) for s in sequences)
    input_ids = torch.full((len(sequences), length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    response_mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, s in enumerate(sequences):
        start, end = left - len(s.prompt_ids), left + len(s.response_ids)
        input_ids[row, start:end] = torch.tensor(s.prompt_ids + s.response_ids)
        attention_mask[row, start:end] = 1
        response_mask[row, left:end] = True
    return Batch(input_ids, attention_mask, response_mask, [s.image_keys for s in sequences])


class PromptEncoder:
    """Records to token ids through the tokenizer's chat template, image marks expanded to image tokens."""

    def __init__(self, tokenizer, image_tokens_per_tile: int):
        self.tokenizer = tokenizer
        self.image_tokens_per_tile = image_tokens_per_tile
        self.start, self.context, self.end = (getattr(tokenizer, name, None) or token for name, token in TOKENS.items())

    def encode(self, record: Record, tiles: list[int]) -> list[int]:
        """Prompt ids up to where the assistant speaks; `tiles[i]` is how many tiles image i was cut into."""
        try:
            text = self.tokenizer.apply_chat_template(
                messages(record.prompt), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template raises what it likes: TemplateError, TypeError, KeyError
            raise _refused(record.where, "prompt", "the chat template", error) from error
        text = text.replace(f"{self.start}{self.context}{self.end}", self.context)
        pieces = text.split(self.context)
        if len(pieces) - 1 != len(tiles):
            raise ValueError(
                f"{record.where}, field 'prompt': the templated prompt holds {len(pieces) - 1} image placeholders, "
                f"the record has {len(tiles)} images"
            )
        expanded = pieces[0]
        for count, piece in zip(tiles, pieces[1:], strict=True):
            expanded += f"{self.start}{self.context * (count * self.image_tokens_per_tile)}{self.end}{piece}"
        return self._ids(expanded, record.where, "prompt")

    def response(self, text: str, *, where: str = "", field: str = "response") -> list[int]:
        """A response's ids, with the end-of-sequence token the policy must learn to write."""
        return [*self._ids(text, where, field), self.tokenizer.eos_token_id]

    def _ids(self, text: str, where: str, field: str) -> list[int]:
        try:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        except Exception as error:  # a lone surrogate is a TypeError
            raise _refused(where, field, "the tokenizer", error) from error

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def _refused(where: str, field: str, by: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())
    return ValueError(f"{where}, field {field!r}: {by} does not take it: {type(error).__name__}: {reason}")


def messages(prompt: str | list[dict]) -> list[dict]:
    """A string prompt is one user message; `<image>` marks in any text become image parts."""
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    return [{**message, "content": _content(message["content"])} for message in prompt]


def _content(content: str | list[dict]) -> str | list[dict]:
    if isinstance(content, str):
        return _parts(content) if MARK in content else content
    return [piece for part in content for piece in (_parts(part["text"]) if part["type"] == "text" else [part])]


def _parts(text: str) -> list[dict]:
    first, *rest = text.split(MARK)
    parts: list[dict] = [{"type": "text", "text": first}] if first else []
    for piece in rest:
        parts.append({"type": "image"})
        piece = piece.removeprefix("\n")  # the template writes its own line break behind an image
        if piece:
            parts.append({"type": "text", "text": piece})
    return parts
