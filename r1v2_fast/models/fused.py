"""liger-kernel's RMSNorm, RoPE and SwiGLU for transformers' own, in one language model and in no other of the process.

x [B, L, H], query and key [B, heads, L, D], cos and sin [B or 1, L, D].

A replacement shadows `forward` on the instance, bound to it: weights keep their names, a deep copy's forward is bound to
the copy, and LoRA finds its layers. Liger computes in transformers' order (fp32 inside, rounded, then times the weight),
but returns its inputs' dtype where transformers would promote. It writes three results over what it read:
  RoPE    query and key, which are a projection's fresh output, and their gradients, which are the attention's own
  SwiGLU  the gradients, over gate and up: a second backward through the same graph raises
  RMSNorm the gradient over the incoming one, unless told not to. It is told: that may be a caller's own tensor.
Not yet run on a GPU; checked in Triton's interpreter, which has no bfloat16 (tests/peers/test_fused_layers.py).
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import itertools
import os
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch

Setting = Literal["auto", "on", "off"]
FLOOR = (0, 8)  # of liger-kernel


class Function(NamedTuple):
    """An autograd function of `liger_kernel.ops`, by what it must look like."""

    name: str
    takes: tuple[str, ...]
    """What we pass, in this order; what follows must have defaults."""


LAYERS = {
    "RMSNorm": Function("LigerRMSNormFunction", ("X", "W", "eps", "offset", "casting_mode", "in_place")),
    "RoPE": Function("LigerRopeFunction", ("q", "k", "cos", "sin")),
    "SwiGLU": Function("LigerSiLUMulFunction", ("a", "b")),
}
CLASSES = {
    "Qwen2RMSNorm": "RMSNorm", "Qwen2Attention": "RoPE", "Qwen2MLP": "SwiGLU",
    "Qwen3RMSNorm": "RMSNorm", "Qwen3Attention": "RoPE", "Qwen3MLP": "SwiGLU",
}  # fmt: skip


def install(language_model, wanted: Setting, device: torch.device | str) -> str | None:
    """Do what `model.fused_layers` asks for; a sentence where auto leaves out what this device could run.

    device  where the model will run: one that is about to be sharded is not there yet
    raises  RuntimeError where "on" was asked for and a layer cannot run
    """
    if wanted == "off" or (wanted == "auto" and (torch.device(device).type != "cuda" or version() is None)):
        return None
    reasons: dict[str, list[str]] = {}
    for layer in LAYERS:
        if why := why_not(device, layer) or _unfit(language_model, layer):
            reasons.setdefault(why, []).append(layer)
    out = "; ".join(f"{', '.join(layers)}: {why}" for why, layers in reasons.items())
    if out and wanted == "on":
        raise RuntimeError(f"model.fused_layers=on cannot run {out}; model.fused_layers=off works")
    apply(language_model, LAYERS.keys() - {layer for layers in reasons.values() for layer in layers})
    return f"model.fused_layers=auto leaves to transformers {out}" if out else None


def apply(language_model, layers: Iterable[str] = tuple(LAYERS)) -> list[str]:
    """Replace `layers` in `language_model`, whether or not they run here; returns the modules' names."""
    wanted, replaced = set(layers), []
    for name, module in language_model.named_modules():
        if (layer := CLASSES.get(type(module).__name__)) in wanted:
            module.forward = types.MethodType(_forward(layer, type(module)), module)
            replaced.append(name)
    return replaced


def remove(language_model) -> None:
    """Give every module its class's forward back."""
    for module in language_model.modules():
        layer = CLASSES.get(type(module).__name__)
        own = getattr(vars(module).get("forward"), "__func__", None)  # someone else's wrapper stays
        if layer is not None and own is _forward(layer, type(module)):
            del module.forward


def version() -> str | None:
    """liger-kernel's, None where it is not installed."""
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


def why_not(device: torch.device | str, layer: str | None = None) -> str | None:
    """Why `layer`, or without one the first that is out, cannot run on `device`; None if it can."""
    if layer is None:
        return next((why for each in LAYERS if (why := why_not(device, each))), None)
    installed, kind = version(), torch.device(device).type
    if installed is None:
        return "liger-kernel is not installed; `pip install 'r1v2-fast[liger]'`"
    if tuple(int(part) for part in installed.split(".")[:2]) < FLOOR:
        return f"it needs liger-kernel {'.'.join(map(str, FLOOR))} or newer, got {installed}; upgrade it"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if kind != "cuda" and not interpreted:
        return f"it needs a CUDA device, got {kind}; here only Triton's interpreter could run it (TRITON_INTERPRET=1)"
    return _unknown(layer, installed) or (_fails_interpreted(layer, installed) if interpreted else None)


def _unknown(layer: str, installed: str) -> str | None:
    """Why the function is not the one that we know, by its signature."""
    name, takes = LAYERS[layer]
    try:
        found = list(inspect.signature(_liger(layer).forward).parameters.values())[1:]  # behind ctx
    except (ImportError, AttributeError) as error:
        return f"liger-kernel {installed} gives no {name} ({error})"
    names = tuple(parameter.name for parameter in found)
    if names[: len(takes)] == takes and all(p.default is not p.empty for p in found[len(takes) :]):
        return None
    return f"liger-kernel {installed}'s {name} takes ({', '.join(names)}), known is ({', '.join(takes)})"


@functools.cache
def _fails_interpreted(layer: str, installed: str) -> str | None:
    """The interpreter lacks some of the language, and tells which kernels need that when it meets them."""
    x = torch.ones(1, 1, 2, 4)  # each layer takes it for its own shape
    norm: Any = types.SimpleNamespace(weight=x[0, 0, 0], variance_epsilon=1e-6)
    try:
        {
            "RMSNorm": lambda: _rms_norm(norm, x),
            "RoPE": lambda: _rope(x, x.clone(), x[0], x[0]),
            "SwiGLU": lambda: _liger(layer).apply(x, x),
        }[layer]()
    except Exception as error:  # whatever the kernel's own code raises there
        return f"liger-kernel {installed} does not run in Triton's interpreter ({error}); a CUDA device does it"
    return None


def _unfit(language_model, layer: str) -> str | None:
    """Why `layer` of this language model is none that liger computes."""
    classes = {type(m) for m in language_model.modules() if CLASSES.get(type(m).__name__) == layer}
    config = language_model.config
    if not classes:
        return f"expected a qwen2 or qwen3 language model, got {config.model_type}"
    if language_model.dtype == torch.float64:
        return "liger-kernel computes in 32 bits at the most, the weights are float64"
    if layer == "SwiGLU" and config.hidden_act not in ("silu", "swish"):
        return f"expected hidden_act silu, got {config.hidden_act}"
    if layer == "RoPE" and any("apply_rotary_pos_emb" not in cls.forward.__code__.co_names for cls in classes):
        return f"transformers {importlib.metadata.version('transformers')}'s attention calls no apply_rotary_pos_emb"
    return None


@functools.cache
def _liger(layer: str):
    from liger_kernel import ops

    return getattr(ops, LAYERS[layer].name)


def _forward(layer: str, cls: Any) -> Any:
    """The function that stands in for `cls.forward`, the same one each time."""
    return _turning_by_liger(cls) if layer == "RoPE" else _rms_norm if layer == "RMSNorm" else _swiglu


@functools.cache
def _turning_by_liger(cls: Any) -> types.FunctionType:
    # The rotation is a function of the attention's module: the same code runs over a copy of its names, with ours for it
    own = cls.forward
    names = {**own.__globals__, "apply_rotary_pos_emb": _rope}
    return types.FunctionType(own.__code__, names, own.__name__, own.__defaults__, own.__closure__)


def _rms_norm(self, x: torch.Tensor) -> torch.Tensor:
    offset, in_place = 0.0, False
    return _liger("RMSNorm").apply(x, self.weight, self.variance_epsilon, offset, "llama", in_place)


def _rope(query, key, cos, sin) -> tuple[torch.Tensor, torch.Tensor]:
    return _liger("RoPE").apply(query, key, cos, sin)


def _swiglu(self, x: torch.Tensor) -> torch.Tensor:
    product = _liger("SwiGLU").apply(self.gate_proj(x), self.up_proj(x))
    if product.grad_fn is not None:
        product.grad_fn.register_prehook(_once())
    return self.down_proj(product)


def _once() -> Callable[[Any], None]:
    """A hook in front of a backward that may run a single time."""
    runs = itertools.count()

    def hook(_) -> None:
        if next(runs):
            raise RuntimeError("SwiGLU wrote its gradients over what this graph saved; run the forward again as well")

    return hook
