"""What the loop asks of a stage."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from r1v2_fast.train import config
from r1v2_fast.train.context import Context

Metrics = dict[str, Any]  # floats, or device tensors that the log reads at the end of the step


class Stage:
    """A stage of training; subclasses say how a batch is made and what the loss on it is."""

    name: str
    trains_policy = True

    def __init__(self, context: Context, config: config.Stage):
        self.context = context
        self.steps = config.steps
        self.optimizer_config = config.optimizer
        self.dataset = context.corpus.dataset(config.data)

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that train."""
        model = self.context.policy.loaded.model
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    def prepare(self) -> None:
        """Work before the first step, such as reference log-probs; the initial parameters are in place."""

    def collect(self, step: int, metrics: Metrics) -> Any | None:
        """This step's batch, made without gradients; None where there is nothing to learn from."""
        raise NotImplementedError

    def loss(self, batch: Any, metrics: Metrics) -> torch.Tensor:
        raise NotImplementedError

    def after_step(self) -> None:
        """Once the optimizer has stepped."""

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """What a checkpoint must hold besides parameters and optimizer: tensors, and JSON values."""
        return {}, {}

    def load_state(self, tensors: dict[str, torch.Tensor], meta: dict[str, Any]) -> None:
        pass

    def save(self, folder) -> None:
        """The stage's product as a folder that loads again."""
        from r1v2_fast.models import load

        load.save_folder(folder, self.context.policy.loaded)
