"""BCO's reward shift: a running mean that lives on the device, across ranks and checkpoints."""

from __future__ import annotations

from typing import Any

import torch


class RewardShift:
    """BCO's delta: the running mean of implicit rewards, 0 before the first update, kept where the rewards are.

    Read `delta` once per optimizer step and call `update` after it, with the rewards of all its micro-batches. Every
    reward counts once, over all ranks. Neither waits for the device.
    `update_first=True` counts as TRL <= 0.28 does, one per call whatever its size; to reproduce it, call `update` with
    the rewards of the whole batch before reading `delta` for that batch's loss.
    """

    def __init__(self, *, update_first: bool = False):
        self.update_first = update_first
        # fp64: late updates are small beside the mean, and fp32 would round them away
        self.delta = torch.zeros((), dtype=torch.float64)
        self.count = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def update(self, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> None:
        """mean <- mean + (batch mean - mean) n / (count + n); sums are all-reduced where ranks are. No rewards: no step."""
        rewards = torch.cat([chosen_rewards, rejected_rewards]).double()
        total = torch.stack([rewards.sum(), torch.ones_like(rewards).sum()])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        summed, number = total.unbind()
        added = number.clamp(max=1) if self.update_first else number
        self.count = self.count.to(total.device) + added
        delta = self.delta.to(total.device)
        self.delta = delta + (summed / number.clamp(min=1) - delta) * added / self.count.clamp(min=1)

    def state_dict(self) -> dict[str, Any]:
        return {"delta": self.delta.item(), "count": self.count.item(), "update_first": self.update_first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delta, self.count = (
            torch.tensor(state[name], dtype=torch.float64, device=self.delta.device) for name in ("delta", "count")
        )
        self.update_first = state["update_first"]
