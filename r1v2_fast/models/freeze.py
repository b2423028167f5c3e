"""Which parts of the model train: adapter (R1V2's choice), llm, vision; in full, or through LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.tensor import DTensor

PARTS = ("adapter", "llm", "vision")


def part_of(name: str) -> str:
    """The part a parameter belongs to, by its name in `InternVLForConditionalGeneration` or `InternVLModel`."""
    if "vision_tower." in name:
        return "vision"
    if "multi_modal_projector." in name:
        return "adapter"
    return "llm"


def set_trainable(model: nn.Module, parts: Iterable[str]) -> dict[str, nn.Parameter]:
    """Freeze everything but `parts` and LoRA's parameters; return what trains, held in fp32.

    16-bit weights cannot take small steps: what trains is kept in fp32, and matmuls run under autocast.
    raises  ValueError on an unknown part
    """
    wanted = set(parts)
    if unknown := wanted - set(PARTS):
        raise ValueError(f"parts to train must be among {PARTS}, got {sorted(unknown)}")
    trained = {}
    for name, parameter in model.named_parameters():
        trains = ".lora_" in name or part_of(name) in wanted
        parameter.requires_grad_(trains)
        if trains:
            trained[name] = parameter
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return trained


def snapshot(parameters: Iterable[nn.Parameter]) -> list[torch.Tensor]:
    """A copy of the values: with the adapter alone training, this is the whole reference model."""
    return [parameter.detach().clone() for parameter in parameters]


@contextmanager
def swapped(parameters: list[nn.Parameter], values: list[torch.Tensor]) -> Iterator[None]:
    """Inside, `parameters` hold `values`; outside they hold their own again.

    Pointers move, nothing is copied; but FSDP gathers from where a shard has always lain, so shards are.
    """

    def swap() -> None:
        for index, parameter in enumerate(parameters):
            if isinstance(parameter, DTensor):
                here, there = parameter.detach().to_local(), values[index].to_local()  # type: ignore[attr-defined]
                held = here.clone()
                here.copy_(there)
                there.copy_(held)
            else:
                parameter.data, values[index] = values[index], parameter.data

    assert len(parameters) == len(values), f"{len(parameters)} parameters, {len(values)} values"
    swap()
    try:
        yield
    finally:
        swap()
