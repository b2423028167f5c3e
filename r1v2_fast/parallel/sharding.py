"""FSDP2 for what is too large for every rank to hold: decoder layers, the tower's layers and the head where they train.

Embeddings, norms, the adapter, a frozen head and a frozen tower (whose features are cached) stay whole on each rank; their
gradients are summed as without sharding. Every forward of a sharded model is a collective of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from r1v2_fast.models import freeze, lora
from r1v2_fast.models.policy import Backbone, Policy
from r1v2_fast.models.reward_model import RewardModel
from r1v2_fast.parallel.world import World

T = TypeVar("T")


def shard(model: Backbone, world: World) -> None:
    """Once what trains has been decided; gradients come out summed over ranks, as losses are shares of the whole.

    raises  RuntimeError with LoRA, whose layers hold frozen and trained weights of two dtypes
    """
    if any(lora.MARK in name for name in model.parameters):
        raise RuntimeError("run.shard=full cannot shard LoRA's layers; run.shard=none works, or train the part in full")
    if model.dtype == torch.float16 and model.parameters:
        raise RuntimeError("run.shard=full cannot scale fp16's loss; model.dtype=bfloat16 or run.shard=none works")
    mesh = init_device_mesh(world.device.type, (world.size,))
    trained = {freeze.part_of(name) for name in model.parameters}
    _shard_layers(model.internvl.language_model, model.internvl.language_model.layers, mesh)
    if "vision" in trained:
        _shard_layers(model.internvl.vision_tower, model.internvl.vision_tower.encoder.layer, mesh)
    head = model.head if isinstance(model, Policy) and model.head.weight.requires_grad and not _tied(model) else None
    if head is not None:
        fully_shard(head, mesh=mesh, reshard_after_forward=True)
    model.root.to(world.device)
    if isinstance(model, Policy):
        model.forbidden = model.forbidden.to(world.device)
    elif isinstance(model, RewardModel):
        model.head.to(world.device)
    if head is not None:  # linear_logprobs averages the gradient of a sharded weight over ranks
        head.weight.register_hook(lambda grad: grad * world.size)
    now = dict(model.root.named_parameters())  # a shard is a parameter of its own
    model.parameters = {name: now.get(name, parameter) for name, parameter in model.parameters.items()}
    model.joins = True


def joined(
    model: Backbone, parts: list[T], nothing: Any, world: World, backward: Callable[[torch.Tensor], None]
) -> Iterator[T]:
    """`parts`, for a forward of `model` each, then forwards and backwards of the batch `nothing` up to the most of any rank.

    Their gradients are 0, but a rank without an image, or without a sample, joins every collective.
    """
    missing = world.most(len(parts)) - len(parts)
    yield from parts
    for _ in range(missing):
        assert isinstance(model, (Policy, RewardModel))
        scores = model.response_logprobs(nothing).logprobs if isinstance(model, Policy) else model.scores(nothing)
        backward(0.0 * scores.sum())


def _shard_layers(stack: nn.Module, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    inside = {parameter for layer in layers for parameter in layer.parameters()}
    around = {parameter for parameter in stack.parameters() if parameter not in inside}
    fully_shard(stack, mesh=mesh, ignored_params=around)  # holds nothing: the layers share its streams
    for module in stack.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum


def _tied(model: Policy) -> bool:
    return model.head.weight is model.internvl.get_input_embeddings().weight
