"""R1V2-38B's tensors, name by name and shape by shape, without its weights."""

import math

import pytest
import torch
from transformers import InternVLForConditionalGeneration

from r1v2_fast.models import presets
from r1v2_fast.models.conversion import config, names, plan

ORIGINAL = {
    "architectures": ["InternVLChatModel"], "model_type": "internvl_chat", "downsample_ratio": 0.5,
    "dynamic_image_size": True, "force_image_size": 448, "use_thumbnail": True, "ps_version": "v2",
    "max_dynamic_patch": 12, "select_layer": -1, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "vision_config": {
        "model_type": "intern_vit_6b", "hidden_size": 3200, "image_size": 448, "intermediate_size": 12800,
        "num_attention_heads": 25, "num_hidden_layers": 45, "patch_size": 14, "qk_normalization": True,
        "qkv_bias": False, "norm_type": "rms_norm", "layer_norm_eps": 1e-6,
    },
    "llm_config": {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": 5120, "num_hidden_layers": 64,
        "num_attention_heads": 40, "num_key_value_heads": 8, "intermediate_size": 27648, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "max_position_embeddings": 131072, "vocab_size": 152064, "tie_word_embeddings": False,
        "eos_token_id": 151645,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def preset():
    with torch.device("meta"):
        return InternVLForConditionalGeneration(presets.r1v2_38b())


@pytest.fixture
def stored(meta_tensors):
    tensors = meta_tensors(ORIGINAL, 152064)
    return {
        name: plan.Stored(name, "BF16", tuple(t.shape), lambda start, stop: iter(())) for name, t in tensors.items()
    }


def test_every_name_and_shape_of_the_preset_comes_out(stored, preset):
    expected = {names.stored_name(name): tuple(t.shape) for name, t in preset.state_dict().items()}
    targets = plan.to_transformers(stored.values())
    assert {name: target.shape for name, target in targets.items()} == expected
    assert (len(stored), len(expected)) == (4 + 45 * 13 + 6 + 64 * 12 + 3, 1456)
    assert sum(target.nbytes for target in targets.values()) == sum(tensor.nbytes for tensor in stored.values())


def test_the_converted_config_is_the_presets(stored):
    made = config.to_transformers(ORIGINAL, tied=False, vocab_size=152064, image_token_id=151671)
    shapes = plan.expected_shapes(made)
    plan.check(stored, plan.original_shapes(shapes), tied=False, where="R1V2-38B")
    wanted = presets.r1v2_38b().to_dict()
    got = made.to_dict()
    for part in ("text_config", "vision_config"):
        differ = {k for k in wanted[part] if wanted[part][k] != got[part][k] and k not in ("dtype", "_name_or_path")}
        assert not differ, {k: (wanted[part][k], got[part][k]) for k in differ}
    for name in (
        "image_token_id",
        "image_seq_length",
        "downsample_ratio",
        "tie_word_embeddings",
        "vision_feature_layer",
    ):
        assert wanted[name] == got[name], name


def test_the_adapter_has_91_786_240_parameters(stored):
    targets = plan.to_transformers(stored.values())
    adapter = {n: t.shape for n, t in targets.items() if n.startswith("multi_modal_projector.")}
    assert sum(map(math.prod, adapter.values())) == 91_786_240 and len(adapter) == 6


def test_the_original_names_come_back(stored):
    targets = plan.to_transformers(stored.values())
    tensors = [plan.Stored(t.name, t.dtype, t.shape, lambda start, stop: iter(())) for t in targets.values()]
    assert {name: target.shape for name, target in plan.to_original(tensors).items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }
