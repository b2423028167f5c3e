"""liger-kernel's layers in our language models against transformers' own, in fp32 with truth in fp64.

On a GPU they run as they are. Without one, Triton's interpreter runs the kernels' own code in a process of its own, mended
in two places where it is not what a compiled kernel meets: see `mend`. It has no bfloat16: that and speed take a GPU.
"""

import copy
import os
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Qwen2Config, Qwen2Model, Qwen3Config, Qwen3Model
from transformers.modeling_layers import GradientCheckpointingLayer

from r1v2_fast.config import LoRA
from r1v2_fast.models import attention, fused, lora
from r1v2_fast.models.attention import Layout
from r1v2_fast.testing.accuracy import assert_as_accurate
from r1v2_fast.testing.double import to_double

pytestmark = pytest.mark.peers
pytest.importorskip("liger_kernel", reason="`make peers` installs liger-kernel")

CUDA, INTERPRETED = torch.cuda.is_available(), os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if CUDA else "cpu"
runs = pytest.mark.skipif(
    not (CUDA or INTERPRETED), reason="runs in the interpreter's process, which another test starts"
)
# heads of 24, 40 and 96 columns: none fills its block
SIZES = {
    "hidden_size": 96, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 24,
    "num_key_value_heads": 2, "vocab_size": 40, "max_position_embeddings": 64,
}  # fmt: skip
MODELS = {"qwen2": (Qwen2Config, Qwen2Model), "qwen3": (Qwen3Config, Qwen3Model)}
GROUPS = [(7, [3, 5]), (4, [6])]
HALVES = [torch.float16, torch.bfloat16] if CUDA else [torch.float16]  # the interpreter computes no bfloat16
KINDS = pytest.mark.parametrize("kind", MODELS)


def mend() -> None:
    """What the interpreter lacks: a kernel's float arguments as fp32 scalars with a `.to`, and libdevice's rsqrt."""
    import liger_kernel.ops.rms_norm
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    converted = interpreter._implicit_cvt

    def with_floats(argument):
        if not isinstance(argument, float):
            return converted(argument)
        return tl.tensor(interpreter.TensorHandle(np.array([argument], np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats
    liger_kernel.ops.rms_norm.rsqrt = lambda x: tl.math.rsqrt(x)  # looked up when called, once it is patched itself
    fused._fails_interpreted.cache_clear()


UNMENDED = {}
if INTERPRETED:
    UNMENDED = {layer: fused.why_not("cpu", layer) for layer in fused.LAYERS}
    mend()


@pytest.mark.skipif(CUDA or INTERPRETED, reason="the tests below run right here")
def test_in_tritons_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-6000:] + done.stderr[-2000:]


def plain(kind="qwen2") -> nn.Module:
    configuration, model = MODELS[kind]
    torch.manual_seed(0)
    made = model(configuration(**SIZES)).eval().to(DEVICE)
    for parameter in made.parameters():  # norms of ones and small weights would hide a factor that was forgotten
        parameter.data.normal_(std=0.1) if parameter.dim() > 1 else parameter.data.uniform_(0.5, 1.5)
    attention.install(made, "sdpa")
    return made


def three(model: nn.Module) -> tuple[nn.Module, nn.Module, nn.Module]:
    """(ours, reference, truth) of one model."""
    ours, truth = copy.deepcopy(model), copy.deepcopy(model)
    to_double(truth)
    assert fused.install(ours, "on", DEVICE) is None
    return ours, model, truth


def outcome(model: nn.Module, packed=True) -> dict[str, torch.Tensor]:
    """Hidden states, and the gradients of all that trains, for an arriving gradient that must stay what it is."""
    draw = torch.Generator().manual_seed(1)
    layout = Layout.of(GROUPS).to(DEVICE)
    rows, length = (1, len(layout)) if packed else (3, 9)
    x = torch.randn(rows, length, SIZES["hidden_size"], generator=draw).to(DEVICE, model.dtype).requires_grad_()
    positions = (torch.arange(len(layout), device=DEVICE) - layout.own_start)[None] if packed else None
    if packed:
        behind = layout.own_start != layout.prompt_start
        positions = positions + behind * (layout.prompt_end - layout.prompt_start)
    mask = {"full_attention": layout} if packed else None
    hidden = model(inputs_embeds=x, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    arriving = torch.randn(hidden.shape, generator=draw).to(hidden)
    kept = arriving.clone()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "embed_tokens" not in name}
    gradients = torch.autograd.grad(hidden, [x, *trained.values()], arriving)
    assert torch.equal(arriving, kept), "the caller's gradient was overwritten"
    return dict(zip(["hidden", "x", *trained], [hidden.detach(), *gradients], strict=True))


def same(ours: nn.Module, reference: nn.Module, truth: nn.Module, packed=True) -> None:
    got, expected, exact = (outcome(model, packed) for model in (ours, reference, truth))
    assert got.keys() == expected.keys() == exact.keys() and len(got) > 8
    # Each gradient by its own largest value, all in one comparison: many small ones would each ask for luck in a last bit
    hidden = [values.pop("hidden") for values in (got, expected, exact)]
    assert_as_accurate(*hidden, "hidden states")
    scale = {name: value.abs().max() for name, value in exact.items()}
    joined = [
        torch.cat([(value.double() / scale[name]).flatten() for name, value in values.items()])
        for values in (got, expected, exact)
    ]
    assert_as_accurate(joined[0].float(), joined[1].float(), joined[2], "gradients")


@runs
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@KINDS
def test_hidden_states_and_gradients_follow_the_relative_rule(kind, packed):
    same(*three(plain(kind)), packed)


@runs
@pytest.mark.parametrize("layer", fused.LAYERS)
def test_each_layer_alone_does(layer):
    model = plain()
    ours, truth = copy.deepcopy(model), copy.deepcopy(model)
    to_double(truth)
    assert fused.apply(ours, [layer])
    same(ours, model, truth)


@runs
@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_weights_are_rounded_where_transformers_rounds(dtype):
    same(*three(plain().to(dtype)))


@runs
@pytest.mark.parametrize("dtype", HALVES)
def test_fp32_weights_under_autocast_do_too(dtype):
    ours, reference, truth = three(plain())
    for model in (ours, reference):
        model.forward = torch.autocast(DEVICE, dtype)(model.forward)
    same(ours, reference, truth)


@runs
@KINDS
def test_checkpointed_with_lora_they_do(kind):
    def prepared(model):
        holder = nn.Module()  # freeze and lora go by the names of the whole model
        holder.language_model = model
        lora.inject(holder, {"llm": LoRA(rank=2, alpha=4)}, seed=0)
        draw = torch.Generator().manual_seed(2)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(lora.MARK in name)
            if "lora_B" in name:  # zero, the adapters would not show
                parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw).to(parameter)
        return model

    models = [prepared(model) for model in three(plain(kind))]
    for layer in models[0].modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.gradient_checkpointing = layer.training = True
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
    same(*models)


@runs
@KINDS
def test_prefill_and_a_step_through_the_cache_follow_it_too(kind):
    ids = torch.randint(40, (2, 9), generator=torch.Generator().manual_seed(3)).to(DEVICE)

    def decode(model):
        with torch.no_grad():
            first = model(input_ids=ids[:, :8], use_cache=True)
            second = model(input_ids=ids[:, 8:], past_key_values=first.past_key_values, use_cache=True)
        return torch.cat([first.last_hidden_state, second.last_hidden_state], 1)

    assert_as_accurate(*(decode(model) for model in three(plain(kind))), "prefill and decode")


@runs
def test_a_copy_has_its_own_weights_other_models_are_untouched_and_remove_gives_the_same_bits_again():
    ours, other, _ = three(plain())
    before, fused_once = outcome(other)["hidden"], outcome(ours)["hidden"]
    assert not torch.equal(fused_once, before), "Liger rounds otherwise somewhere: nothing was replaced"
    copied = copy.deepcopy(ours)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert torch.equal(outcome(copied)["hidden"], fused_once)
    fused.remove(copied)
    assert torch.equal(outcome(copied)["hidden"], before) and torch.equal(outcome(other)["hidden"], before)


@runs
def test_two_backwards_give_the_same_bits_and_deterministic_algorithms_accept_them():
    ours, _, _ = three(plain())
    first = outcome(ours)
    torch.use_deterministic_algorithms(True)
    try:
        second = outcome(ours)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(first[name], second[name]) for name in first)


@runs
def test_a_second_backward_through_one_graph_raises_where_swiglu_overwrote_what_it_saved():
    ours, _, _ = three(plain())
    x = torch.randn(1, 5, SIZES["hidden_size"], device=DEVICE, requires_grad=True)
    loss = ours.layers[0].mlp(x).square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="SwiGLU wrote its gradients over what this graph saved"):
        loss.backward()


@pytest.mark.skipif(not INTERPRETED, reason="about the interpreter")
def test_what_the_interpreter_as_it_is_cannot_run_is_refused_by_name():
    for layer, why in UNMENDED.items():  # a later Triton may run them all
        assert why is None or f"{fused.version()} does not run in Triton's interpreter" in why, layer
