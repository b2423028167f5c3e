"""A reward model: the policy's backbone with a scalar head read at the last token (Skywork-VL Reward, 2505.07263)."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import InternVLModel

from r1v2_fast.config import LoRA, Part
from r1v2_fast.models.feature_cache import FeatureCache
from r1v2_fast.models.policy import Backbone, Pixels, Policy

HEAD_FILE = "value_head.safetensors"  # the released reward model's own file and tensor names
HEAD_NAMES = {"weight": "v_head.summary.weight", "bias": "v_head.summary.bias"}


class RewardModel(Backbone):
    """Scores a prompt and its response with one unbounded number, trained by Bradley-Terry pairs."""

    def __init__(self, internvl, head: nn.Linear, pixels: Pixels, features: FeatureCache):
        super().__init__(internvl, pixels, features)
        self.head = head

    @classmethod
    def from_policy(cls, policy: Policy) -> RewardModel:
        """A copy of the policy's backbone, its frozen vision tower shared, with a head that starts at zero."""
        assert policy.vision_frozen, "the tower is shared, so it must not train"
        with torch.no_grad():
            internvl = copy.deepcopy(policy.internvl, {id(policy.internvl.vision_tower): policy.internvl.vision_tower})
        head = nn.Linear(internvl.language_model.config.hidden_size, 1).to(internvl.device, internvl.dtype)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        return cls(internvl, head, policy.pixels, policy.features)

    def own_tower(self) -> None:
        """Stop sharing the policy's vision tower, which is about to train."""
        self.internvl.vision_tower = copy.deepcopy(self.internvl.vision_tower)
        self.features = self.features.like()

    def train_parts(self, parts: list[str], lora_parts: Mapping[Part, LoRA] | None = None, *, seed: int = 0) -> None:
        super().train_parts(parts, lora_parts, seed=seed)
        self.head.to(torch.promote_types(self.dtype, torch.float32)).requires_grad_(True)
        self.parameters |= {f"head.{name}": parameter for name, parameter in self.head.named_parameters()}

    def settle(self) -> None:
        super().settle()
        self.head.to(self.dtype).requires_grad_(False)

    def scores(self, batch) -> torch.Tensor:
        """Score of every sequence, [S]: the head at its last token."""
        hidden = self.hidden(batch)
        with self.precision():
            scores = self.head(hidden[batch.last]).squeeze(-1)
        return scores.to(torch.promote_types(scores.dtype, torch.float32))

    def save(self, path: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
        """`state` is what `gathered` gave."""
        self.internvl.save_pretrained(path, state_dict=self.gathered() if state is None else state)
        tensors = {name: getattr(self.head, part).detach().contiguous() for part, name in HEAD_NAMES.items()}
        save_file(tensors, str(Path(path) / HEAD_FILE), metadata={"source": json.dumps("r1v2_fast")})

    @classmethod
    def load(cls, path: str | Path, pixels: Pixels, features: FeatureCache, *, device: torch.device) -> RewardModel:
        internvl = InternVLModel.from_pretrained(path, local_files_only=True).to(device)
        head = nn.Linear(internvl.language_model.config.hidden_size, 1).to(device, internvl.dtype)
        tensors = load_file(str(Path(path) / HEAD_FILE), device=str(device))
        head.load_state_dict({part: tensors[name] for part, name in HEAD_NAMES.items()})
        model = cls(internvl.eval(), head, pixels, features)
        model.settle()
        return model
