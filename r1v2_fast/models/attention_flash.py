"""flash-attn over a packed row: prompts, then each response over its prompt and over itself, merged by log-sum-exps.

L tokens of the row, Hq query heads, Hk key and value heads, D head size, lse [Hq, tokens] fp32. With s = q k^T scale,

    out = sum over parts of exp(lse_part - lse) out_part,    lse = log sum over parts of exp(lse_part)

flash-attn's backward takes p = exp(s - lse) and delta = rowsum(dout out): with the merged out and lse it gives each part's
gradient of the whole. Autograd through the merge would lack the term through lse_part, which flash-attn's own function
does not return. transformers' flash path knows no prompt shared by several sequences. Not yet run on a GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from r1v2_fast.ops._once import differentiable_once

if TYPE_CHECKING:
    from r1v2_fast.models.attention import Layout


@dataclass(frozen=True)
class Spans:
    """Which queries see which keys, span i of the one all of span i of the other (up to the diagonal if causal)."""

    queries: torch.Tensor  # [tokens] of the row
    keys: torch.Tensor
    query_edges: torch.Tensor  # [spans + 1] int32, flash-attn's cu_seqlens
    key_edges: torch.Tensor
    longest_query: int
    longest_key: int
    causal: bool


class Kernels(NamedTuple):
    """Attention over spans, its queries, keys and values gathered: [tokens, heads, D]."""

    forward: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    """(q, k, v, spans, scale) to (out, lse)."""
    backward: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    """(dout, q, k, v, out, lse, spans, scale) to (dq, dk, dv)."""


def attend(query, key, value, layout: Layout, scale: float | None) -> torch.Tensor:
    """query [1, Hq, L, D], key and value [1, Hk, L, D] to [1, Hq, L, D]."""
    return merged(query, key, value, layout, scale, flash_attn())


def merged(query, key, value, layout: Layout, scale: float | None, kernels: Kernels) -> torch.Tensor:
    """`attend` with any kernels."""
    plan = layout.once("flash", lambda: spans_of(layout))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    rows = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    return _Merged.apply(*rows, plan, scale, kernels).transpose(0, 1)[None]


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan: tuple[Spans, Spans, Spans], scale: float, kernels: Kernels):
        prompts, shared, own = plan
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        out[prompts.queries], prompt_lse = _forward(kernels, q, k, v, prompts, scale)
        lse = prompt_lse.new_empty(q.shape[1], 0)
        if len(own.queries):
            shared_out, shared_lse = _forward(kernels, q, k, v, shared, scale)
            own_out, own_lse = _forward(kernels, q, k, v, own, scale)
            lse = torch.logaddexp(shared_lse, own_lse)
            out[own.queries] = (
                _weighted(shared_out, shared_lse - lse) + _weighted(own_out, own_lse - lse)
            ).to(out.dtype)  # fmt: skip
        ctx.save_for_backward(q, k, v, out, prompt_lse, lse)
        ctx.plan, ctx.scale, ctx.kernels = plan, scale, kernels
        return out

    @staticmethod
    @differentiable_once
    def backward(ctx, dout):
        q, k, v, out, prompt_lse, lse = ctx.saved_tensors
        gradients = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)]
        for spans, own_lse in zip(ctx.plan, (prompt_lse, lse, lse), strict=True):
            if not len(spans.queries):
                continue
            a, b = spans.queries, spans.keys
            parts = ctx.kernels.backward(dout[a], q[a], k[b], v[b], out[a], own_lse, spans, ctx.scale)
            for gradient, part, where in zip(gradients, parts, (a, b, b), strict=True):
                gradient.index_add_(0, where, part)
        return *gradients, None, None, None


def _forward(kernels: Kernels, q, k, v, spans: Spans, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    return kernels.forward(q[spans.queries], k[spans.keys], v[spans.keys], spans, scale)


def _weighted(out: torch.Tensor, log_weight: torch.Tensor) -> torch.Tensor:
    """[tokens, Hq, D] by exp of [Hq, tokens]."""
    return out * log_weight.exp().transpose(0, 1)[..., None]


def spans_of(layout: Layout) -> tuple[Spans, Spans, Spans]:
    """Prompts over themselves, responses over their prompts, responses over themselves."""
    device = layout.own_start.device
    prompts = [prompt for prompt, _ in layout.groups]
    behind = [sum(responses) for _, responses in layout.groups]
    responses = [length for _, group in layout.groups for length in group]
    in_prompt = torch.arange(len(layout), device=device) < layout.prompt_end
    first, rest = in_prompt.nonzero().flatten(), (~in_prompt).nonzero().flatten()

    def edges(lengths: list[int]) -> tuple[torch.Tensor, int]:
        ends = torch.tensor([0, *lengths]).cumsum(0)
        return ends.to(device, torch.int32), max(lengths, default=0)

    def spans(queries, keys, of_queries: list[int], of_keys: list[int], causal: bool) -> Spans:
        (query_edges, longest_query), (key_edges, longest_key) = edges(of_queries), edges(of_keys)
        return Spans(queries, keys, query_edges, key_edges, longest_query, longest_key, causal)

    return (
        spans(first, first, prompts, prompts, True),
        spans(rest, first, behind, prompts, False),
        spans(rest, rest, responses, responses, True),
    )


@functools.cache
def flash_attn() -> Kernels:
    """flash-attn's variable-length kernels; raises RuntimeError where they are older than 2.7 or not installed."""
    try:
        from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward
    except ImportError as error:
        raise RuntimeError(f"model.attention=flash needs flash-attn 2.7 or newer ({error}); flex works") from error

    def forward(q, k, v, spans: Spans, scale: float):
        assert q.shape[-1] % 8 == 0, f"flash-attn's kernels take head sizes that 8 divides, got {q.shape[-1]}"
        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, spans.query_edges, spans.key_edges, spans.longest_query, spans.longest_key,
            dropout_p=0.0, softmax_scale=scale, causal=spans.causal, window_size_left=-1, window_size_right=-1,
            softcap=0.0, alibi_slopes=None, return_softmax=False,
        )  # fmt: skip
        return out, lse

    def backward(dout, q, k, v, out, lse, spans: Spans, scale: float):
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        _flash_attn_varlen_backward(
            dout, q, k, v, out, lse, *gradients, spans.query_edges, spans.key_edges, spans.longest_query,
            spans.longest_key, dropout_p=0.0, softmax_scale=scale, causal=spans.causal, window_size_left=-1,
            window_size_right=-1, softcap=0.0, alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return gradients

    return Kernels(forward, backward)
