"""Parameters and bytes: closed forms against real modules, by part."""

from collections import Counter

import pytest
import torch

from r1v2_fast.models import dummy, freeze, load, policy, presets
from r1v2_fast.models.feature_cache import FeatureCache
from r1v2_fast.plan import memory, shapes

CONFIGS = {
    "digits": lambda: presets.digits(40, 6),
    "r1v2-38b": lambda: presets.architecture("r1v2-38b"),
    "internvl3-1b": lambda: presets.architecture("internvl3-1b"),
}


def counted(model) -> Counter:
    counts: Counter = Counter()
    for name, parameter in model.named_parameters():
        counts["head" if name.startswith("lm_head") else freeze.part_of(name)] += parameter.numel()
    return counts


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_parameters_are_the_modules_own_part_by_part(config):
    _compare(config())


def test_parameters_of_qwen3_with_heads_wider_than_the_hidden_size_are_the_modules_own(toys):
    _compare(toys.mid(40, 6, "qwen3"))


def _compare(config):
    real = counted(dummy.on_meta(config, torch.bfloat16))
    of = shapes.of(config)
    assert {"vision": of.vision, "adapter": of.adapter, "llm": of.language_model, "head": of.head} == dict(real)
    assert of.total == sum(real.values())


@pytest.mark.parametrize("train", [("adapter",), ("adapter", "llm")], ids="+".join)
@pytest.mark.parametrize("width, dtype", [(4, torch.float32), (2, torch.bfloat16)], ids=["fp32", "bf16"])
def test_weights_gradients_and_moments_take_the_bytes_of_a_real_training_step(width, dtype, train):
    loaded = load.from_preset("digits", words=["which"], seed=0, dtype=dtype)
    made = policy.Policy(loaded, lambda keys: [], FeatureCache())
    made.train_parts(list(train))
    made.keep_reference()
    optimizer = torch.optim.AdamW(made.parameters.values())
    for parameter in made.parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    frozen = sum(p.nbytes for p in made.root.parameters() if not p.requires_grad)
    trained = sum(p.nbytes + p.grad.nbytes for p in made.parameters.values())
    trained += sum(s[key].nbytes for s in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq"))
    settings = memory.Settings(
        width=width, trains_llm="llm" in train, checkpointing=False, attention="sdpa", fused_layers=False, reference=True,
        feature_cache=0.0, max_rows=None, prefill_tokens=None,
    )  # fmt: skip
    of = shapes.of(loaded.model.config)
    copy = made.reference_state().values()
    assert sum(memory.weights(of, settings).values()) == frozen
    assert list(memory.states(of, settings).values()) == [trained, sum(tensor.nbytes for tensor in copy)]


def test_another_language_model_is_refused():
    config = presets.digits(40, 6)
    config.text_config.model_type = "llama"
    with pytest.raises(ValueError, match=r"expected a language model among \('qwen2', 'qwen3'\), got 'llama'"):
        shapes.of(config)
