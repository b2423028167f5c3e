"""AdamW under a learning-rate schedule, with gradient clipping, and loss scaling where matmuls run in fp16."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from r1v2_fast import config
from r1v2_fast.parallel.gradients import clip, sum_gradients
from r1v2_fast.parallel.stored import Stored
from r1v2_fast.parallel.world import ALONE, World


class Optimizer:
    """Steps `parameters`, held in fp32."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        settings: config.Optimizer,
        *,
        dtype: torch.dtype,
        world: World = ALONE,
    ):
        self.world = world
        self.parameters = parameters
        self.settings = settings
        values = list(parameters.values())
        sharded = [value for value in values if isinstance(value, DTensor)]  # foreach takes no mixture
        groups = [[value for value in values if not isinstance(value, DTensor)], sharded]
        self.adamw = torch.optim.AdamW(
            [{"params": group} for group in groups if group],
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
            foreach=True,
        )
        self.scaler = torch.amp.GradScaler(values[0].device.type, enabled=dtype == torch.float16)

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradient of `loss` to what has come since the last step; none where nothing that trains was used."""
        if loss.requires_grad:
            self.scaler.scale(loss).backward()

    def step(self, rate: float) -> torch.Tensor:
        """Sum the ranks' gradients, clip, step at `rate` and forget them; returns the gradient's norm before clipping.

        A gradient that is not finite changes nothing: for the caller to stop at, or in fp16 for the scale to shrink.
        """
        if self.world.size > 1:
            sum_gradients(self.parameters.values())
        if all(parameter.grad is None for parameter in self.parameters.values()):
            return torch.zeros(())
        self.scaler.unscale_(self.adamw)
        largest = math.inf if self.settings.max_grad_norm is None else self.settings.max_grad_norm
        norm = clip(list(self.parameters.values()), largest)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        if self.scaler.is_enabled() or bool(norm.isfinite()):
            self.scaler.step(self.adamw)
            self.scaler.update()
        self.adamw.zero_grad(set_to_none=True)
        return norm

    def lost(self, norm: torch.Tensor) -> bool:
        """Whether a gradient is beyond saving: not finite, and no loss scale that could shrink further to mend it."""
        return not norm.isfinite() and not (self.scaler.is_enabled() and self.scaler.get_scale() >= 1)

    def state(self) -> tuple[dict[str, torch.Tensor], dict]:
        """Tensors and JSON values."""
        tensors = {
            f"{field}/{name}": torch.as_tensor(value)
            for name, parameter in self.parameters.items()
            for field, value in self.adamw.state[parameter].items()
        }
        return tensors, self.scaler.state_dict()

    def load_state(self, tensors: Stored, meta: dict) -> None:
        for key in tensors:
            field, name = key.split("/", 1)
            parameter = self.parameters[name]
            self.adamw.state[parameter][field] = tensors[key] if field == "step" else tensors.like(key, parameter)
        if self.scaler.is_enabled():
            self.scaler.load_state_dict(meta)


def learning_rate(settings: config.Optimizer, step: int, steps: int) -> float:
    """Linear warm-up, then constant, linear or cosine down to min_lr_ratio: a pure function of the step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    left = (steps - step) / max(1, steps - settings.warmup_steps)
    share = {"none": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}[settings.decay]
    if settings.decay != "none":
        share = settings.min_lr_ratio + (1 - settings.min_lr_ratio) * share
    return settings.lr * share
