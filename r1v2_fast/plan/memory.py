"""Memory of one GPU by part, in bytes.

L tokens of a row, N response tokens among them, H hidden size, I MLP size, V vocabulary, b bytes of model.dtype.
Source of the activation formulas: what autograd keeps of transformers' Qwen2 with a frozen language model, which
`tests/plan/test_activations.py` counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from r1v2_fast.plan.shapes import Shapes
from r1v2_fast.plan.work import Kind, Row, Work

Shard = Literal["none", "full"]
TILE = 1 << 30  # of fp32 logits in one chunk of the log-prob op, docs/kernels.md
STATE = 16  # bytes of a parameter that trains: fp32 value, gradient and AdamW's two moments
RESERVE = 0.05  # of the GPU: the allocator's unused blocks
CONTEXT = 0.75 * 2**30  # CUDA context, cuBLAS and NCCL workspaces


@dataclass(frozen=True)
class Settings:
    """What of a recipe's stage bears on memory."""

    width: int
    """Bytes of an element of model.dtype, b."""
    trains_llm: bool
    checkpointing: bool
    attention: Kind
    fused_layers: bool
    """liger-kernel's RMSNorm and SwiGLU."""
    reference: bool
    """A copy of what trains is kept."""
    feature_cache: float
    max_rows: int | None
    prefill_tokens: int | None


def trained(shapes: Shapes, settings: Settings) -> int:
    """Parameters that train: the adapter's, and the language model's with its head."""
    return shapes.adapter + (shapes.language_model + shapes.head if settings.trains_llm else 0)


def weights(shapes: Shapes, settings: Settings) -> dict[str, float]:
    """Frozen weights by tower, b bytes a parameter; what trains is under `states`."""
    frozen: dict[str, float] = {"vision tower": shapes.vision * settings.width}
    if not settings.trains_llm:
        frozen["language model"] = shapes.language_model * settings.width
        frozen["head"] = shapes.head * settings.width
    return frozen


def states(shapes: Shapes, settings: Settings) -> dict[str, float]:
    """Of what trains: fp32 value, gradient and two moments, 16 bytes a parameter, and 4 of the reference's copy."""
    count = trained(shapes, settings)
    parts: dict[str, float] = {"trains: fp32, gradient, AdamW": count * STATE}
    return parts | ({"reference copy": count * 4} if settings.reference else {})


def residual(settings: Settings) -> int:
    """Bytes of an element between layers: an embedding that trains is fp32, and so is what is added to it."""
    return 4 if settings.trains_llm else settings.width


def layer_saved(shapes: Shapes, row: Row, settings: Settings) -> float:
    """What one layer keeps for its backward.

    b (2 Hq D + 2 Hk D) and 4 Hq a token of attention (q, k, v, its output, the log-sum-exp), 3 I b of SwiGLU (gate,
    silu(gate), up; fused 2 I b), 2 (4 H + 4) of the norms (their input in fp32; fused in its own dtype), SDPA's
    masks; of Qwen3's norms of q and k 4 (Hq + Hk) (D + 1) more.
    Where the language model trains, also the matrices' inputs and the norms' products: b (Hq D + I) + 2 H 4 and
    2 H b, or 5 H b in 16 bits, where every matrix has a cast of its own.
    """
    b, query, key = settings.width, shapes.heads * shapes.head_size, shapes.kv_heads * shapes.head_size
    norms = 2 * (shapes.hidden * (residual(settings) if settings.fused_layers else 4) + 4)
    mlp = (2 if settings.fused_layers else 3) * shapes.inner * b
    attention = (2 * query + 2 * key) * b + 4 * shapes.heads
    if shapes.head_norms:
        attention += (query + key) * (b if settings.fused_layers else 4) + 4 * (shapes.heads + shapes.kv_heads)
    inputs = 0
    if settings.trains_llm:
        inputs = (query + shapes.inner + (2 if b == 4 else 5) * shapes.hidden) * b + 8 * shapes.hidden
    return row.tokens * (norms + mlp + attention + inputs) + row.mask(settings.attention) * b


def saved(shapes: Shapes, row: Row, settings: Settings, tiles: int) -> float:
    """All that is kept between a row's forward and its backward, up to the last hidden states.

    Every layer's, or with gradient checkpointing its input and one layer's; once, the rotary tables 2 L D b, the last
    norm's input, a byte a token of where images stand; the adapter's inputs; 16-bit casts of layers that train.
    """
    b, tokens = settings.width, row.tokens
    layer = layer_saved(shapes, row, settings)
    inputs = shapes.layers * tokens * shapes.hidden * residual(settings)
    layers = inputs + layer if settings.checkpointing else shapes.layers * layer
    norm = shapes.hidden * (residual(settings) if settings.fused_layers else 4) + 4
    if settings.trains_llm:
        norm += shapes.hidden * residual(settings)
    once = tokens * (2 * shapes.head_size * residual(settings) + norm + 1)
    casts = shapes.layers * shapes.layer * b if settings.trains_llm and b < 4 else 0
    return layers + once + casts + adapter_saved(shapes, row.groups * tiles * shapes.image_tokens, b)


def adapter_saved(shapes: Shapes, image_tokens: int, width: int) -> float:
    """Of the adapter: the norm's input and output, both matrices' inputs, GELU's, and in 16 bits the cast weights."""
    each = 2 * shapes.channels + 2 * shapes.hidden
    if width == 4:
        return image_tokens * 4 * each
    matrices = shapes.adapter - 2 * shapes.channels - 2 * shapes.hidden
    return image_tokens * (8 * shapes.channels + width * (shapes.channels + 2 * shapes.hidden)) + matrices * width


def working(shapes: Shapes, row: Row, settings: Settings) -> float:
    """Gradients in flight through one layer's MLP, 3 I b + 8 H a token."""
    return row.tokens * (3 * shapes.inner * settings.width + 8 * shapes.hidden)


def head_workspace(shapes: Shapes, row: Row, settings: Settings) -> float:
    """The log-prob op: fp32 logits of a chunk and its probabilities in b bytes, and N H b of ready gradient and inputs.

    A chunk holds as many rows as fit 1 GiB of logits. A head that trains keeps N V b of probabilities as memory lets
    it, a quarter of what is free; that is not counted.
    """
    chunk = min(row.targets, max(1, TILE // (4 * shapes.vocabulary)))
    return chunk * shapes.vocabulary * (4 + settings.width) + 2 * row.targets * shapes.hidden * settings.width


def slots(work: Work, settings: Settings) -> int:
    """Rows of a decode step: rollout.max_rows, or one for every response."""
    responses = work.prompts * work.group_size
    return min(settings.max_rows or responses, responses)


def kv_cache(shapes: Shapes, work: Work, settings: Settings) -> float:
    """slots (P + R) 2 layers Hk D b."""
    return slots(work, settings) * (work.prompt + work.response) * shapes.kv * settings.width


def prefill(shapes: Shapes, work: Work, settings: Settings) -> float:
    """The prompts that begin at once: their keys and values, and one layer's MLP over one prefill, 3 I b + 8 H a token."""
    if not work.group_size:
        return 0.0
    prompts = -(-slots(work, settings) // work.group_size)
    at_once = min(prompts, max(1, settings.prefill_tokens // work.prompt) if settings.prefill_tokens else prompts)
    working = at_once * work.prompt * (3 * shapes.inner * settings.width + 8 * shapes.hidden)
    return prompts * work.prompt * shapes.kv * settings.width + working


def sampling(shapes: Shapes, work: Work, settings: Settings) -> float:
    """Picking a token: logits in b and three times in fp32, slots V."""
    return slots(work, settings) * shapes.vocabulary * (settings.width + 12) if work.group_size else 0.0


def gathered(shapes: Shapes, settings: Settings) -> float:
    """Full sharding: two layers whole, one in use and the next on its way, and the larger of embedding and head."""
    return (2 * shapes.layer + shapes.embedding) * settings.width


def by_part(shapes: Shapes, work: Work, settings: Settings, *, gpus: int, shard: Shard) -> dict[str, dict[str, float]]:
    """Bytes of one GPU: `held` throughout, `training` and `rollout` on top, one after the other."""
    share = gpus if shard == "full" else 1
    whole = {f"{name}, frozen": size for name, size in weights(shapes, settings).items() if size}
    held = {name: size / share for name, size in (whole | states(shapes, settings)).items()}
    held["vision feature cache"] = settings.feature_cache
    if shard == "full":
        held["gathered layers"] = gathered(shapes, settings)
    row = work.largest
    training = {
        "activations" + (", checkpointed" if settings.checkpointing else ""): saved(shapes, row, settings, work.tiles),
        "backward or log-prob workspace": max(working(shapes, row, settings), head_workspace(shapes, row, settings)),
    }
    rollout = {
        "keys and values": kv_cache(shapes, work, settings),
        "prefill": prefill(shapes, work, settings),
        "sampling": sampling(shapes, work, settings),
    }
    return {"held": held, "training": training, "rollout": rollout if work.group_size else {}}
