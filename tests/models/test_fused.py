"""When the fused layers are put in, what is refused and how, and whose forward changes: all that needs no liger-kernel."""

import copy
import importlib.metadata
from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaModel, Qwen2Config, Qwen2Model

from r1v2_fast import config
from r1v2_fast.log import Log
from r1v2_fast.models import fused
from r1v2_fast.train.context import Context

SIZES = {
    "hidden_size": 96, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 11, "max_position_embeddings": 64,
}  # fmt: skip
KNOWN = {
    "LigerRMSNormFunction": lambda ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None: X,
    "LigerRopeFunction": lambda ctx, q, k, cos, sin, position_ids=None, unsqueeze_dim=1: (q, k),
    "LigerSiLUMulFunction": lambda ctx, a, b: a,
}


def qwen(**changes):
    return Qwen2Model(Qwen2Config(**SIZES | changes))


def shadowed(model) -> list[str]:
    return [name for name, module in model.named_modules() if "forward" in vars(module)]


@pytest.fixture
def liger(monkeypatch):
    """liger(version, **functions): what is installed, None for nothing."""

    def install(version, **functions):
        def version_of(package, real=importlib.metadata.version):
            if package != "liger-kernel":
                return real(package)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(package)
            return version

        monkeypatch.setattr(importlib.metadata, "version", version_of)
        ops = {name: SimpleNamespace(forward=forward) for name, forward in (KNOWN | functions).items()}
        monkeypatch.setattr(fused, "_liger", lambda layer: ops[fused.LAYERS[layer].name])

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    install("0.8.5")
    return install


@pytest.mark.parametrize("wanted", ["off", "auto"])
def test_off_and_auto_on_a_cpu_touch_nothing(liger, wanted):
    model = qwen()
    assert fused.install(model, wanted, "cpu") is None and shadowed(model) == []


def test_off_on_a_gpu_and_auto_without_liger_touch_nothing_and_say_nothing(liger):
    model = qwen()
    assert fused.install(model, "off", "cuda") is None and shadowed(model) == []
    liger(None)
    assert fused.install(model, "auto", "cuda") is None and shadowed(model) == []


def test_on_without_a_gpu_says_why_and_what_works(liger):
    model = qwen()
    said = "RMSNorm, RoPE, SwiGLU: it needs a CUDA device, got cpu.*TRITON_INTERPRET=1.*model.fused_layers=off works"
    with pytest.raises(RuntimeError, match=said):
        fused.install(model, "on", "cpu")
    assert shadowed(model) == []


@pytest.mark.parametrize(
    ("version", "said"),
    [(None, "liger-kernel is not installed; `pip install"), ("0.7.9", "needs liger-kernel 0.8 or newer, got 0.7.9")],
)
def test_on_with_no_liger_or_an_old_one_says_so(liger, version, said):
    model = qwen()
    liger(version)
    assert said in fused.why_not("cuda")
    with pytest.raises(RuntimeError, match=f"model.fused_layers=on cannot run.*{said}"):
        fused.install(model, "on", "cuda")


@pytest.mark.parametrize("wanted", ["on", "auto"])
def test_on_a_gpu_every_norm_mlp_and_attention_is_replaced_and_comes_back(liger, wanted):
    model, other = qwen(), qwen()
    names = list(model.state_dict())
    assert fused.install(model, wanted, "cuda") is None
    assert (
        len(shadowed(model)) == 2 * 4 + 1 and shadowed(other) == []
    )  # two norms, attention and MLP a layer; the last norm
    assert list(model.state_dict()) == names
    fused.install(model, wanted, "cuda")  # again, as a run's next stage does
    fused.remove(model)
    assert shadowed(model) == []


def test_apply_names_what_it_replaced_and_remove_leaves_others_wrappers():
    model = qwen()
    assert fused.apply(model, ["SwiGLU"]) == ["layers.0.mlp", "layers.1.mlp"] == shadowed(model)
    model.norm.forward = lambda x: x
    fused.remove(model)
    assert shadowed(model) == ["norm"]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (lambda ctx, q, k, angle: (q, k), "0.9.1's LigerRopeFunction takes .q, k, angle., known is .q, k, cos, sin."),
        (lambda ctx, q, k, cos, sin, layout: (q, k), "0.9.1's LigerRopeFunction takes .q, k, cos, sin, layout."),
    ],
    ids=["renamed", "one-more"],
)
def test_an_unknown_signature_is_refused_by_name_and_version_and_the_others_run(liger, changed, said):
    liger("0.9.1", LigerRopeFunction=changed)
    model = qwen()
    with pytest.raises(RuntimeError, match=f"cannot run RoPE: liger-kernel {said}"):
        fused.install(model, "on", "cuda")
    assert shadowed(model) == []
    sentence = fused.install(model, "auto", "cuda")
    assert sentence.startswith("model.fused_layers=auto leaves to transformers RoPE: liger-kernel 0.9.1's")
    assert not any(name.endswith("self_attn") for name in shadowed(model)) and len(shadowed(model)) == 2 * 3 + 1


def test_what_the_interpreter_cannot_run_is_refused_with_what_it_said(liger, monkeypatch):
    def lacking(*_):
        raise TypeError("'float' object has no attribute 'to'")

    monkeypatch.setattr(
        fused, "_liger", lambda layer: SimpleNamespace(forward=KNOWN["LigerSiLUMulFunction"], apply=lacking)
    )
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    fused._fails_interpreted.cache_clear()
    assert fused.why_not("cpu", "SwiGLU") == (
        "liger-kernel 0.8.5 does not run in Triton's interpreter ('float' object has no attribute 'to'); "
        "a CUDA device does it"
    )
    fused._fails_interpreted.cache_clear()


def test_a_name_that_is_gone_is_refused(liger, monkeypatch):
    def gone(layer):
        raise AttributeError("module 'liger_kernel.ops' has no attribute 'X'")

    monkeypatch.setattr(fused, "_liger", gone)
    assert fused.why_not("cuda", "SwiGLU") == (
        "liger-kernel 0.8.5 gives no LigerSiLUMulFunction (module 'liger_kernel.ops' has no attribute 'X')"
    )


def test_a_model_that_liger_does_not_compute_is_refused(liger, monkeypatch):
    llama = LlamaModel(LlamaConfig(**SIZES))
    with pytest.raises(
        RuntimeError, match="RMSNorm, RoPE, SwiGLU: expected a qwen2 or qwen3 language model, got llama"
    ):
        fused.install(llama, "on", "cuda")
    model = qwen(hidden_act="gelu")
    with pytest.raises(RuntimeError, match="cannot run SwiGLU: expected hidden_act silu, got gelu"):
        fused.install(model, "on", "cuda")
    assert "32 bits at the most" in fused.install(qwen().double(), "auto", "cuda")
    monkeypatch.setattr(type(model.layers[0].self_attn), "forward", lambda self, x: x)
    assert "RoPE: transformers 5" in fused.install(qwen(), "auto", "cuda")


def test_a_copys_forwards_are_its_own():
    model = qwen()
    fused.apply(model)
    copied = copy.deepcopy(model)
    assert shadowed(copied) == shadowed(model)
    for name in shadowed(model):
        assert copied.get_submodule(name).forward.__self__ is copied.get_submodule(name)
        assert model.get_submodule(name).forward.__self__ is model.get_submodule(name)


def test_a_run_says_once_what_auto_left_out_and_on_a_cpu_refuses_on(tmp_path, monkeypatch, capsys, liger):
    sizes = "data.sizes={align: 4, policy: 4, reward: 4, heldout: 4}"
    context = Context(config.load("digits", [sizes, "run.device=cpu"]), tmp_path, Log(tmp_path))
    context.use(context.initial())
    assert shadowed(context.policy.internvl.language_model) == []
    monkeypatch.setattr(fused, "install", lambda model, wanted, device: f"left out, of {wanted}")
    for _ in range(2):
        context.use(context.initial())
    assert capsys.readouterr().out.count("left out, of auto") == 1
    monkeypatch.undo()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    context.recipe.model.fused_layers = "on"
    with pytest.raises(RuntimeError, match="model.fused_layers=on cannot run"):
        context.use(context.initial())
