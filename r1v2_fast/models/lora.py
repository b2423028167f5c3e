"""LoRA on single parts of the model, through peft: injected in place for a stage, merged into the weights after it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from r1v2_fast.config import LoRA, Part
from r1v2_fast.models.freeze import part_of

MARK = ".lora_"  # in every adapter parameter's name


def inject(model: nn.Module, parts: Mapping[Part, LoRA], *, seed: int) -> None:
    """Add adapters to the linear layers of `parts`, B = 0: the model answers as before.

    raises  ImportError without peft; ValueError where a part has no such layer
    """
    if not parts:
        return
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("lora needs peft: pip install 'r1v2-fast[lora]'") from error
    chosen = layers(model, parts)
    ranks = {name: settings.rank for name, settings in chosen.items()}
    alphas = {name: settings.alpha for name, settings in chosen.items()}
    config = LoraConfig(target_modules=list(ranks), rank_pattern=ranks, alpha_pattern=alphas)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)


def layers(model: nn.Module, parts: Mapping[Part, LoRA]) -> dict[str, LoRA]:
    """The linear layers that `parts` name, with their settings; raises ValueError where a part has no such layer."""
    found: dict[str, LoRA] = {}
    for part, settings in parts.items():
        linear = [
            n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head" and part_of(n) == part
        ]
        chosen = [n for n in linear if settings.targets == "all-linear" or n.rsplit(".", 1)[-1] in settings.targets]
        if not chosen:
            known = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise ValueError(f"lora.{part}.targets must be among {known}, got {settings.targets}")
        found |= dict.fromkeys(chosen, settings)
    return found


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the adapters add nothing: the model as it was before them."""
    layers = [layer for _, layer in _layers(model)]
    trained = [(p, p.requires_grad) for layer in layers for p in layer.parameters()]  # peft's switch changes that too
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, wanted in trained:
            parameter.requires_grad_(wanted)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict of the model without adapters that answers as this one does."""
    state = {n.replace(".base_layer.", "."): t for n, t in model.state_dict().items() if MARK not in n}
    for name, layer in _layers(model):
        weight = state[f"{name}.weight"]
        delta = sum(layer.get_delta_weight(adapter).float() for adapter in layer.active_adapters)
        state[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return state


def merge(model: nn.Module) -> None:
    """Put the adapters into the weights and take them out of the model."""
    layers = _layers(model)
    if not layers:
        return
    state = merged_state(model)
    for name, layer in layers:
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer.get_base_layer())
    model.load_state_dict(state)
    if hasattr(model, "peft_config"):
        del model.peft_config


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    """peft's layers by name; none where nothing was injected, and then peft need not be installed."""
    return [(name, module) for name, module in model.named_modules() if hasattr(module, "get_delta_weight")]
