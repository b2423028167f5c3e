"""Models small enough to run, and the plan's settings for them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from r1v2_fast import config
from r1v2_fast.data.collate import Sequence, collate
from r1v2_fast.models import attention, load, policy, presets
from r1v2_fast.models.feature_cache import FeatureCache
from r1v2_fast.models.packing import pack
from r1v2_fast.plan import memory, stages
from r1v2_fast.plan.run import plan
from r1v2_fast.plan.work import Row

WORDS = ["which", "digit"]


def mid(vocabulary: int, image_token: int, kind: str = "qwen2") -> InternVLConfig:
    """Another ratio of every size than the toy's: hidden 256, 4 layers, 8 query heads on 2, an MLP 2.75 times as wide."""
    values = presets.digits(vocabulary, image_token).to_dict()
    text = {
        "model_type": kind, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 48 if kind == "qwen3" else 32,
        "vocab_size": vocabulary, "max_position_embeddings": 256, "tie_word_embeddings": False,
    }  # fmt: skip
    return InternVLConfig(**{**values, "text_config": text})


def build(size: str, dtype: torch.dtype = torch.float32, train: tuple[str, ...] = ("adapter",)) -> policy.Policy:
    loaded = load.from_preset("digits", words=WORDS, seed=0, dtype=dtype)
    if size != "digits":
        old, kind = loaded.model.config, "qwen2" if size == "mid" else size
        config = mid(old.text_config.vocab_size, old.image_token_id, kind)
        config.text_config.dtype = config.vision_config.dtype = dtype
        model = InternVLForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        loaded = loaded._replace(model=model.eval())
    made = policy.Policy(loaded, lambda keys: [torch.randn(1, 3, 16, 16) for _ in keys], FeatureCache())
    attention.install(made.internvl.language_model, "sdpa")
    made.train_parts(list(train))
    return made


def batch(made: policy.Policy, row: Row):
    image = made.internvl.config.image_token_id
    other = image + 1
    sequences = [
        Sequence([image] * 4 + [other] * (row.prompt - 4), [other] * row.response, [f"picture {group}"])
        for group in range(row.groups)
        for _ in range(row.sequences)
    ]
    return pack(sequences) if row.packed else collate(sequences, 0)


def settings(width: int = 4, *, checkpointing: bool = False, trains_llm: bool = False) -> memory.Settings:
    return memory.Settings(
        width=width, trains_llm=trains_llm, checkpointing=checkpointing, attention="sdpa", fused_layers=False,
        reference=False, feature_cache=0.0, max_rows=None, prefill_tokens=None,
    )  # fmt: skip


@pytest.fixture
def toys() -> SimpleNamespace:
    return SimpleNamespace(build=build, batch=batch, settings=settings, mid=mid)


@pytest.fixture
def made():
    """A shipped recipe's stages by name."""

    def make(recipe="r1v2-38b-one-gpu", overrides=(), count=1, gpu="h200", **options) -> dict[str, stages.Stage]:
        found = plan(config.load(recipe, list(overrides)), count=count, gpu=gpu, **options)
        return {stage.name: stage for stage in found}

    return make
