"""Which tensor is which: the names of the original layout against those that transformers stores.

D width of the tower. The original keeps the tower's q, k and v in one `attn.qkv` [3 D, D], rows in that order.
"""

from __future__ import annotations

import re

TOWER = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
}
LAYER = {  # behind encoder.layers.N, behind encoder.layer.N
    "attn.q_norm.weight": "attention.q_norm.weight",
    "attn.k_norm.weight": "attention.k_norm.weight",
    "attn.proj.weight": "attention.projection_layer.weight",
    "attn.proj.bias": "attention.projection_layer.bias",
    "norm1.weight": "layernorm_before.weight",
    "norm1.bias": "layernorm_before.bias",
    "norm2.weight": "layernorm_after.weight",
    "norm2.bias": "layernorm_after.bias",
    "mlp.fc1.weight": "mlp.fc1.weight",
    "mlp.fc1.bias": "mlp.fc1.bias",
    "mlp.fc2.weight": "mlp.fc2.weight",
    "mlp.fc2.bias": "mlp.fc2.bias",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
ADAPTER = {  # mlp1 is nn.Sequential(LayerNorm, Linear, GELU, Linear)
    f"mlp1.{index}.{kind}": f"multi_modal_projector.{module}.{kind}"
    for index, module in ((0, "layer_norm"), (1, "linear_1"), (3, "linear_2"))
    for kind in ("weight", "bias")
}
QKV = ("q_proj", "k_proj", "v_proj")
LANGUAGE = "language_model."  # the same in both: Qwen2ForCausalLM's own names behind it
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"

_LAYER = re.compile(r"vision_model\.encoder\.layers\.(\d+)\.(.+)")
_LAYER_BACK = re.compile(r"vision_tower\.encoder\.layer\.(\d+)\.(.+)")
_TOWER_BACK, _LAYER_NAMES_BACK, _ADAPTER_BACK = ({new: old for old, new in t.items()} for t in (TOWER, LAYER, ADAPTER))


def to_transformers(name: str) -> list[str] | None:
    """What one original tensor becomes, in the order of its rows: three names for a qkv, else one; None: unknown."""
    if name.startswith(LANGUAGE):
        return [name]
    if match := _LAYER.fullmatch(name):
        root, inner = f"vision_tower.encoder.layer.{match[1]}", match[2]
        if inner in ("attn.qkv.weight", "attn.qkv.bias"):
            return [f"{root}.attention.{part}.{inner.rpartition('.')[2]}" for part in QKV]
        return [f"{root}.{LAYER[inner]}"] if inner in LAYER else None
    new = ADAPTER.get(name) or TOWER.get(name.removeprefix("vision_model."))
    if new is None or (name not in ADAPTER and not name.startswith("vision_model.")):
        return None
    return [new if name in ADAPTER else f"vision_tower.{new}"]


def to_original(name: str) -> tuple[str, int] | None:
    """(the original tensor that holds it, which third of its rows: 0 where it holds nothing else); None: unknown."""
    if name.startswith(LANGUAGE):
        return name, 0
    if match := _LAYER_BACK.fullmatch(name):
        root, inner = f"vision_model.encoder.layers.{match[1]}", match[2]
        module, _, kind = inner.removeprefix("attention.").rpartition(".")
        if inner.startswith("attention.") and module in QKV and kind in ("weight", "bias"):
            return f"{root}.attn.qkv.{kind}", QKV.index(module)
        return (f"{root}.{_LAYER_NAMES_BACK[inner]}", 0) if inner in _LAYER_NAMES_BACK else None
    if name in _ADAPTER_BACK:
        return _ADAPTER_BACK[name], 0
    inner = name.removeprefix("vision_tower.")
    return (f"vision_model.{_TOWER_BACK[inner]}", 0) if inner != name and inner in _TOWER_BACK else None


def stored_name(name: str) -> str:
    """The name in a file of a module's tensor: transformers' modules nest deeper than the names it saves."""
    if name == "lm_head.weight":
        return HEAD
    if name.startswith("model.language_model."):
        return f"language_model.model.{name.removeprefix('model.language_model.')}"
    if name.startswith(("model.vision_tower.", "model.multi_modal_projector.")):
        return name.removeprefix("model.")
    return name
