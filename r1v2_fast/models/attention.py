"""Attention over a packed row, in one of three ways: SDPA group by group, FlexAttention, or flash-attn in two parts.

L tokens of the row, Hq query heads, Hk key and value heads, D head size. Token q sees token k <= q where k is in q's own
prompt or response, or in its group's prompt:

    k >= own_start[q]  or  prompt_start[q] <= k < prompt_end[q]

Installed once on a language model, it hands any mask that is no `Layout` on to transformers' SDPA.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from r1v2_fast.models import attention_flash, attention_flex

NAME = "r1v2_packed"  # in transformers' registries
Kind = Literal["auto", "sdpa", "flex", "flash"]
SUPPORTED = ("qwen2", "qwen3")  # language models that take ready masks as a dict


@dataclass(frozen=True)
class Layout:
    """Who sees whom in a packed row."""

    groups: list[tuple[int, list[int]]]
    """Prompt length and response lengths, in the row's order."""
    own_start: torch.Tensor
    """[L]: where a token's own prompt or response begins."""
    prompt_start: torch.Tensor
    """[L]: where its group's prompt begins."""
    prompt_end: torch.Tensor
    """[L]: behind its group's prompt."""
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, groups: list[tuple[int, list[int]]]) -> Layout:
        starts, lengths, prompts, ends = [], [], [], []
        place = 0
        for prompt, responses in groups:
            first = place
            for length in (prompt, *responses):
                starts.append(place)
                lengths.append(length)
                prompts.append(first)
                ends.append(first + prompt)
                place += length
        repeats = torch.tensor(lengths)
        own, start, end = (torch.tensor(v).repeat_interleave(repeats) for v in (starts, prompts, ends))
        return cls(groups, own, start, end)

    def __len__(self) -> int:
        return len(self.own_start)

    def to(self, device: torch.device | str) -> Layout:
        return Layout(self.groups, self.own_start.to(device), self.prompt_start.to(device), self.prompt_end.to(device))

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` makes, made once for all layers."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def dense(self) -> torch.Tensor:
        """[L, L] bool, True where row q sees column k."""
        return self.sees(slice(0, len(self)), slice(0, len(self)))

    def sees(self, queries: slice, keys: slice) -> torch.Tensor:
        place = torch.arange(len(self), device=self.own_start.device)
        q, k = place[queries, None], place[None, keys]
        own, start, end = (t[queries, None] for t in (self.own_start, self.prompt_start, self.prompt_end))
        return (k <= q) & ((k >= own) | ((k >= start) & (k < end)))


def supported(language_model) -> bool:
    """Whether packed rows can run through it; else its prompts are repeated and padded."""
    config = language_model.config
    return config.model_type in SUPPORTED and not getattr(language_model, "has_sliding_layers", False)


def install(language_model, kind: Kind = "auto") -> None:
    """Let `language_model` take a `Layout` for a mask.

    raises  RuntimeError where `kind` was asked for and cannot run on the model's device
    """
    chosen = _choose(kind, language_model.device, language_model.dtype)
    language_model.config._attn_implementation = f"{NAME}_{chosen}"


def _choose(kind: Kind, device: torch.device, dtype: torch.dtype) -> str:
    half, cuda = dtype in (torch.float16, torch.bfloat16), device.type == "cuda"
    flash = importlib.util.find_spec("flash_attn") is not None
    if kind == "auto":
        return ("flash" if flash and half else "flex") if cuda else "sdpa"
    if kind == "flash" and not (flash and half and cuda):
        raise RuntimeError(
            f"model.attention=flash needs flash-attn (installed: {flash}) and 16-bit weights on a CUDA device, got "
            f"{dtype} on {device}; model.attention={'flex' if cuda else 'sdpa'} works"
        )
    if kind == "flex" and not cuda:
        raise RuntimeError(
            f"model.attention=flex has a backward on CUDA alone, got {device}; model.attention=sdpa works"
        )
    return kind


def _attend(kind: str, module, query, key, value, attention_mask, scaling=None, **kwargs):
    """transformers' attention interface: query [B, Hq, L, D], key and value [B, Hk, L, D] to [B, L, Hq, D]."""
    if not isinstance(attention_mask, Layout):
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    assert query.shape[0] == 1 and query.shape[2] == len(attention_mask), "a packed batch is one row"
    return BACKENDS[kind](query, key, value, attention_mask, scaling).transpose(1, 2), None


def by_group(query, key, value, layout: Layout, scale: float | None) -> torch.Tensor:
    """Each group's prompt causally, then its responses together under a dense mask; nothing between groups is computed."""
    lengths = [length for prompt, responses in layout.groups for length in (prompt, sum(responses))]
    whole = [prompt + sum(responses) for prompt, responses in layout.groups]
    queries = query.split(lengths, 2)
    out = []
    place = 0
    for index, (keys, values) in enumerate(zip(key.split(whole, 2), value.split(whole, 2), strict=True)):
        prompt, behind = lengths[2 * index : 2 * index + 2]
        attend = functools.partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
        out.append(attend(queries[2 * index], keys[:, :, :prompt], values[:, :, :prompt], is_causal=True))
        if behind:
            rows, columns = slice(place + prompt, place + whole[index]), slice(place, place + whole[index])
            mask = layout.once(f"mask {index}", functools.partial(layout.sees, rows, columns))
            out.append(attend(queries[2 * index + 1], keys, values, attn_mask=mask))
        place += whole[index]
    return torch.cat(out, 2)


BACKENDS = {"sdpa": by_group, "flex": attention_flex.attend, "flash": attention_flash.attend}

for _kind in BACKENDS:
    AttentionInterface.register(f"{NAME}_{_kind}", functools.partial(_attend, _kind))
    AttentionMaskInterface.register(f"{NAME}_{_kind}", sdpa_mask)
