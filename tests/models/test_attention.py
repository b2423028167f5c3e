"""Attention over a packed row: three ways against the dense one, in fp64, forward and backward."""

import sys
import types

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from r1v2_fast.models import attention, attention_flash, attention_flex
from r1v2_fast.models.attention import Layout
from r1v2_fast.testing.accuracy import assert_as_accurate

HEADS, KV_HEADS, SIZE = 4, 2, 8
GROUPS = {
    "ragged groups, an empty response, a group without any": [(37, [3, 0, 11]), (1, [5]), (20, []), (7, [30, 1, 2, 9])],
    "one response": [(9, [4])],
    "prompts alone": [(9, []), (3, [])],
    "several tiles": [(150, [3, 40, 128]), (256, [1, 129])],
}
LAYOUTS = pytest.mark.parametrize("groups", GROUPS.values(), ids=GROUPS)


def tensors(length: int, dtype=torch.float64):
    torch.manual_seed(length)
    shapes = (HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(1, heads, length, SIZE, dtype=dtype, requires_grad=True) for heads in shapes]


def dense(query, key, value, layout, scale=SIZE**-0.5):
    key, value = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (key, value))
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(~sees(layout.groups), -torch.inf)
    return scores.softmax(-1) @ value


def sees(groups) -> torch.Tensor:
    """The mask written out, token by token."""
    tokens = []  # (group, response or None, position)
    for g, (prompt, responses) in enumerate(groups):
        tokens += [(g, None, i) for i in range(prompt)]
        tokens += [(g, r, prompt + i) for r, length in enumerate(responses) for i in range(length)]
    rows = [
        [a[0] == b[0] and (b[1] is None or b[1] == a[1]) and b[2] <= a[2] for b in tokens]  # b seen by a
        for a in tokens
    ]
    return torch.tensor(rows)


def plain(layout: Layout) -> attention_flash.Kernels:
    """flash-attn's contract in plain attention: `backward` believes the out and lse that it is given."""

    def blocks(spans):
        for i in range(len(spans.query_edges) - 1):
            a = slice(int(spans.query_edges[i]), int(spans.query_edges[i + 1]))
            b = slice(int(spans.key_edges[i]), int(spans.key_edges[i + 1]))
            assert a.stop - a.start <= spans.longest_query and b.stop - b.start <= spans.longest_key
            yield a, b

    def scores(q, k, a, b, spans, scale):
        s = torch.einsum("qhd,khd->hqk", q[a], k[b].repeat_interleave(HEADS // KV_HEADS, 1)) * scale
        if spans.causal:
            s = s.masked_fill(~torch.ones(s.shape[1:], dtype=torch.bool).tril(), -torch.inf)
        return s

    def forward(q, k, v, spans, scale):
        out, lse = torch.empty_like(q), q.new_empty(q.shape[1], len(q))
        for a, b in blocks(spans):
            s = scores(q, k, a, b, spans, scale)
            out[a] = torch.einsum("hqk,khd->qhd", s.softmax(-1), v[b].repeat_interleave(HEADS // KV_HEADS, 1))
            lse[:, a] = s.logsumexp(-1)
        return out, lse

    def backward(dout, q, k, v, out, lse, spans, scale):
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for a, b in blocks(spans):
            p = (scores(q, k, a, b, spans, scale) - lse[:, a, None]).exp()
            delta = (dout[a] * out[a]).sum(-1).transpose(0, 1)[..., None]
            dp = torch.einsum("qhd,khd->hqk", dout[a], v[b].repeat_interleave(HEADS // KV_HEADS, 1))
            ds = p * (dp - delta) * scale

            def grouped(gradient):  # the query heads that share a key head
                return gradient.unflatten(1, (KV_HEADS, -1)).sum(2)

            dq[a] = torch.einsum("hqk,khd->qhd", ds, k[b].repeat_interleave(HEADS // KV_HEADS, 1))
            dk[b] = grouped(torch.einsum("hqk,qhd->khd", ds, q[a]))
            dv[b] = grouped(torch.einsum("hqk,qhd->khd", p, dout[a]))
        return dq, dk, dv

    return attention_flash.Kernels(forward, backward)


def same(ours, layout):
    """Forward and the three gradients equal the dense one's to fp64 rounding."""
    inputs = tensors(len(layout))
    wanted = dense(*inputs, layout)
    got = ours(*inputs)
    upstream = torch.randn_like(wanted)
    gradients = [torch.autograd.grad((out * upstream).sum(), inputs) for out in (got, wanted)]
    for a, b in zip((got, *gradients[0]), (wanted, *gradients[1]), strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@LAYOUTS
def test_the_layouts_mask_is_the_one_written_out(groups):
    assert torch.equal(Layout.of(groups).dense(), sees(groups))


@LAYOUTS
def test_group_by_group_is_dense_attention(groups):
    layout = Layout.of(groups)
    same(lambda q, k, v: attention.by_group(q, k, v, layout, None), layout)


@LAYOUTS
def test_the_flash_merge_is_dense_attention(groups):
    layout = Layout.of(groups)
    same(lambda q, k, v: attention_flash.merged(q, k, v, layout, None, plain(layout)), layout)


def test_the_flash_merge_refuses_a_second_derivative():
    layout = Layout.of([(4, [2])])
    inputs = tensors(len(layout))
    out = attention_flash.merged(*inputs, layout, None, plain(layout))
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(out.sum(), inputs, create_graph=True)


@LAYOUTS
def test_flex_attentions_tiles_are_those_that_pytorch_finds(groups):
    from torch.nn.attention.flex_attention import create_block_mask

    layout = Layout.of(groups)
    ours, length = attention_flex.block_mask(layout), len(layout)
    theirs = create_block_mask(ours.mask_mod, None, None, length, length, device="cpu")
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    # a tile is full for us where every row's own interval or prompt covers it: never one that PyTorch finds partial
    assert int(ours.full_kv_num_blocks.sum()) <= int(theirs.full_kv_num_blocks.sum())
    place = torch.arange(length)
    assert torch.equal(ours.mask_mod(0, 0, place[:, None], place[None, :]), sees(groups))


def test_flex_attention_is_dense_attention_and_compiles_at_most_twice_over_20_lengths(monkeypatch):
    """Traced as on a GPU; what runs is its own dense form: PyTorch 2.13's C++ template for the CPU confuses symbols of
    lengths that share a prefix (ks7 and ks77), and Triton's needs a GPU."""
    counter = CompileCounter()
    traced = torch.compile(attention_flex.flex_attention, dynamic=True, backend=counter)
    monkeypatch.setattr(attention_flex, "_compiled", lambda: traced)
    lengths = set()
    for i in range(20):
        layout = Layout.of([(100 + 14 * i, [3, 0, 28]), (7, [13, 1, 2, 9 + i % 2])])
        lengths.add(len(layout))
        inputs = [t.detach() for t in tensors(len(layout), torch.float32)]  # on the CPU there is no backward
        ours, wanted = attention_flex.attend(*inputs, layout, None), dense(*inputs, layout)
        assert_as_accurate(ours, wanted, dense(*(t.double() for t in inputs), layout))
    assert len(lengths) == 20 and 1 <= counter.frame_count <= 2


@pytest.fixture
def pretend_flash_attn(monkeypatch):
    """flash-attn's two functions, by its own signatures, over plain attention; `calls` notes what they were given."""
    calls = []

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and dropout_p == softcap == 0
        spans = attention_flash.Spans(None, None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        calls.append(("forward", causal))
        out, lse = plain(None).forward(q, k, v, spans, softmax_scale)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        spans = attention_flash.Spans(None, None, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal)
        calls.append(("backward", causal))
        parts = plain(None).backward(dout, q, k, v, out, softmax_lse, spans, softmax_scale)
        for into, part in zip((dq, dk, dv), parts, strict=True):
            into.copy_(part)
        return torch.empty(0)

    module = types.ModuleType("flash_attn.flash_attn_interface")
    module._flash_attn_varlen_forward = _flash_attn_varlen_forward
    module._flash_attn_varlen_backward = _flash_attn_varlen_backward
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    attention_flash.flash_attn.cache_clear()
    yield calls
    attention_flash.flash_attn.cache_clear()


def test_flash_attn_is_called_by_its_own_signatures(pretend_flash_attn):
    layout = Layout.of(GROUPS["several tiles"])
    same(lambda q, k, v: attention_flash.attend(q, k, v, layout, None), layout)
    assert pretend_flash_attn == [
        ("forward", True), ("forward", False), ("forward", True),
        ("backward", True), ("backward", False), ("backward", True),
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["flash", "flex"])
def test_a_kind_that_cannot_run_says_why_and_what_would(kind):
    with pytest.raises(RuntimeError, match=f"model.attention={kind} .*cpu.*model.attention=sdpa works"):
        attention._choose(kind, torch.device("cpu"), torch.bfloat16)


def test_without_flash_attn_the_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    attention_flash.flash_attn.cache_clear()
    with pytest.raises(RuntimeError, match=r"needs flash-attn 2\.7 or newer"):
        attention_flash.flash_attn()


@pytest.mark.gpu
@LAYOUTS
@pytest.mark.parametrize("kind", ["sdpa", "flex"])
def test_on_a_gpu_forward_and_backward_follow_the_relative_rule(kind, groups):
    layout = Layout.of(groups).to("cuda")
    torch.manual_seed(0)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    inputs = [
        torch.randn(1, h, len(layout), 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in heads
    ]
    upstream = torch.randn(1, HEADS, len(layout), 64, device="cuda")

    def run(attend, inputs):
        out = attend(*inputs)
        return [out, *torch.autograd.grad((out * upstream.to(out.dtype)).sum(), inputs)]

    def written_out(q, k, v):
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
        scores = (q @ k.transpose(-1, -2) * 64**-0.5).masked_fill(~layout.dense(), -torch.inf)
        return scores.softmax(-1) @ v

    ours = run(lambda q, k, v: attention.BACKENDS[kind](q, k, v, layout, None), inputs)
    theirs = run(written_out, inputs)
    exact = run(written_out, [t.detach().double().requires_grad_() for t in inputs])
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert_as_accurate(a, b, c)
