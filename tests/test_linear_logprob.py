"""linear_logprobs and logprobs_from_logits against their reference, by the relative rule."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v2_fast.ops.linear_logprob import linear_logprobs, logprobs_from_logits
from r1v2_fast.reference import linear_logprob as reference
from r1v2_fast.testing.accuracy import assert_as_accurate

OUTPUTS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def inputs(n=13, h=24, v=97, dtype=torch.float32, seed=0, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    hidden = (torch.randn(n, h, generator=g) * scale).to(dtype)
    weight = (torch.randn(v, h, generator=g) / h**0.5).to(dtype)
    bias = torch.randn(v, generator=g).to(dtype)
    targets = torch.randint(0, v - 4, (n,), generator=g)
    upstream = torch.randn(n, generator=g)
    return hidden, weight, bias, targets, upstream


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "per token": {"temperature": "per token"},
    "softcap": {"softcap": 3.0, "logit_scale": 1.7},
    "forbidden": {"forbidden": torch.tensor([94, 96])},
    "all": {"temperature": 1.3, "softcap": 4.0, "logit_scale": 0.6, "forbidden": torch.tensor([95])},
}


def run(function, tensors, targets, upstream, options, grad_entropy=None, **kwargs):
    leaves = [t.clone().requires_grad_() for t in tensors]
    hidden, weight, bias = leaves
    out = function(hidden, weight, targets, bias=bias, **options, **kwargs)
    logprobs = out["logprobs"] if isinstance(out, dict) else out.logprobs
    loss = (logprobs * upstream.to(logprobs.dtype)).sum()
    if grad_entropy is not None:
        entropy = out["entropy"] if isinstance(out, dict) else out.entropy
        loss = loss + (entropy * grad_entropy.to(entropy.dtype)).sum()
    loss.backward()
    return out, [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("entropy_grad", [False, True, None])
def test_values_and_gradients_follow_the_relative_rule(dtype, name, entropy_grad):
    *tensors, targets, upstream = inputs(dtype=dtype)
    options = dict(OPTIONS[name])
    if options.get("temperature") == "per token":
        options["temperature"] = torch.linspace(0.5, 2.0, len(targets))
    targets[3] = -100
    grad_entropy = torch.linspace(-1, 1, len(targets)) if entropy_grad is not False else None
    ours, grads = run(
        linear_logprobs, tensors, targets, upstream, options, grad_entropy, outputs=OUTPUTS, entropy_grad=entropy_grad
    )
    plain, plain_grads = run(reference.linear_logprobs, tensors, targets, upstream, options, grad_entropy)
    truth, truth_grads = run(
        reference.linear_logprobs, [t.double() for t in tensors], targets, upstream, options, grad_entropy
    )
    for field in ("logprobs", "entropy", "mean_logits", "log_sum_sq_probs"):
        value = getattr(ours, field)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert_as_accurate(value, plain[field], truth[field].detach(), field)
    assert torch.equal(ours.is_top1[truth["is_top1"]], truth["is_top1"][truth["is_top1"]])
    for grad, plain_grad, truth_grad, what in zip(
        grads, plain_grads, truth_grads, ("hidden", "weight", "bias"), strict=True
    ):
        assert_as_accurate(grad, plain_grad, truth_grad, f"gradient of {what}")


def test_the_reference_passes_gradcheck_in_fp64():
    hidden, weight, bias, targets, _ = inputs(5, 6, 11, torch.float64)
    targets = targets.clamp(max=8)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def function(h, w, b):
        out = reference.linear_logprobs(
            h, w, targets, bias=b, softcap=3.0, temperature=0.8, forbidden=torch.tensor([10])
        )
        return out["logprobs"], out["entropy"]

    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("workspace", [None, 1, 97 * 8 * 8])
def test_the_op_passes_gradcheck_whatever_the_workspace_keeps(workspace):
    hidden, weight, bias, targets, _ = inputs(6, 5, 97, torch.float64)
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]

    def function(h, w, b):
        out = linear_logprobs(
            h, w, targets, bias=b, outputs=("entropy",), entropy_grad=True, workspace_bytes=workspace, softcap=5.0
        )
        return out.logprobs, out.entropy

    assert torch.autograd.gradcheck(function, leaves)


def test_rows_without_needs_grad_keep_their_value_and_lose_their_gradient():
    hidden, weight, _, targets, upstream = inputs()
    hidden.requires_grad_()
    wanted = torch.arange(len(targets)) % 2 == 0
    full = linear_logprobs(hidden, weight, targets).logprobs
    (full_grad,) = torch.autograd.grad((full * upstream).sum(), hidden)
    half = linear_logprobs(hidden, weight, targets, needs_grad=wanted).logprobs
    (half_grad,) = torch.autograd.grad((half * upstream).sum(), hidden)
    hidden64 = hidden.detach().double().requires_grad_()
    truth = reference.linear_logprobs(hidden64, weight.double(), targets)["logprobs"]
    (truth_grad,) = torch.autograd.grad((truth * upstream.double()).sum(), hidden64)
    assert_as_accurate(half.detach(), full.detach(), truth.detach())
    assert torch.equal(half_grad[~wanted], torch.zeros_like(half_grad[~wanted]))
    assert_as_accurate(half_grad[wanted], full_grad[wanted], truth_grad[wanted])


def test_near_certainty_the_log_prob_and_its_gradient_keep_their_relative_precision():
    v, h = 50, 8
    hidden = torch.zeros(1, h)
    hidden[0, 0] = 1.0
    weight = torch.zeros(v, h)
    weight[3, 0] = 25.0  # p = 1 - 49 exp(-25), which fp32 rounds to 1
    hidden.requires_grad_()
    out = linear_logprobs(hidden, weight, torch.tensor([3])).logprobs
    out.sum().backward()
    truth = torch.log1p(
        -49 * torch.exp(torch.tensor(-25.0).double()) / (1 + 49 * torch.exp(torch.tensor(-25.0).double()))
    )
    gradient = 25 * (49 * torch.exp(torch.tensor(-25.0).double()))
    assert abs(out.item() - truth.item()) <= 1e-6 * abs(truth.item())
    assert abs(hidden.grad[0, 0].item() - gradient.item()) <= 1e-6 * gradient.item()


def test_bf16_inputs_with_logits_near_twenty_stay_within_2e_5_nat():
    hidden, weight, _, targets, _ = inputs(64, 128, 1000, torch.bfloat16, scale=7.0)
    truth = reference.linear_logprobs(hidden.double(), weight.double(), targets)["logprobs"]
    assert reference.logits(hidden.double(), weight.double()).abs().max() > 18
    ours = linear_logprobs(hidden, weight, targets).logprobs
    assert (ours.double() - truth).abs().max() <= 2e-5


@pytest.mark.parametrize("n", [0, 1, 4])
def test_empty_and_all_ignored_batches_give_a_differentiable_zero(n):
    hidden, weight, _, _, _ = inputs(n)
    hidden.requires_grad_()
    weight.requires_grad_()
    out = linear_logprobs(hidden, weight, torch.full((n,), -100)).logprobs
    out.sum().backward()
    assert torch.equal(out, torch.zeros(n))
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight))


def test_leading_dimensions_and_strides_do_not_matter():
    hidden, weight, _, targets, _ = inputs(12)
    flat = linear_logprobs(hidden, weight, targets).logprobs
    strided = torch.stack([hidden, hidden], 2)[:, :, 0]
    wide = weight.T.contiguous().T
    assert not strided.is_contiguous() and not wide.is_contiguous()
    shaped = linear_logprobs(strided.reshape(3, 4, -1), wide, targets.reshape(3, 4)).logprobs
    assert shaped.shape == (3, 4)
    truth = reference.linear_logprobs(hidden.double(), weight.double(), targets)["logprobs"]
    assert_as_accurate(shaped.reshape(-1), flat, truth)


def test_the_same_call_gives_the_same_bits():
    hidden, weight, _, targets, _ = inputs(300, 32, 4000)
    assert torch.equal(
        linear_logprobs(hidden, weight, targets).logprobs, linear_logprobs(hidden, weight, targets).logprobs
    )


def test_the_row_pass_gives_the_same_bits_for_any_split():
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(7, 5000, generator=g) * 5, torch.randint(0, 5000, (7,), generator=g)
    whole = logprobs_from_logits(logits, targets, outputs=("log_sum_sq_probs",))
    for split in (1, 2, 3):
        parts = [
            logprobs_from_logits(a, b).logprobs for a, b in zip(logits.split(split), targets.split(split), strict=True)
        ]
        assert torch.equal(torch.cat(parts), whole.logprobs)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probs_from_logits_agree_with_the_reference(dtype, inplace):
    g = torch.Generator().manual_seed(1)
    logits = (torch.randn(3, 5, 61, generator=g) * 3).to(dtype)
    targets = torch.randint(0, 60, (3, 5), generator=g)
    targets[0, 0] = -100
    ge = torch.linspace(-1, 1, 15).reshape(3, 5)

    def reference_run(values):
        leaf = values.reshape(-1, 61).clone().requires_grad_()
        z = (leaf / 0.9).index_fill(1, torch.tensor([60]), -torch.inf)
        out = reference.statistics(z, targets.reshape(-1))
        (out["logprobs"].sum() + (out["entropy"] * ge.reshape(-1).to(leaf.dtype)).sum()).backward()
        return out, leaf.grad

    leaf = logits.clone().requires_grad_()
    held = leaf * 1  # a non-leaf may be overwritten
    held.retain_grad()
    out = logprobs_from_logits(
        held,
        targets,
        temperature=0.9,
        forbidden=torch.tensor([60]),
        outputs=("entropy",),
        entropy_grad=True,
        inplace_grad=inplace,
    )
    (out.logprobs.sum() + (out.entropy * ge.to(out.entropy.dtype)).sum()).backward()
    plain, plain_grad = reference_run(logits)
    truth, truth_grad = reference_run(logits.double())
    assert_as_accurate(out.logprobs.reshape(-1), plain["logprobs"], truth["logprobs"].detach())
    assert_as_accurate(leaf.grad.reshape(-1, 61), plain_grad, truth_grad)
    assert torch.equal(held.detach(), held.grad) == inplace


def test_opcheck_accepts_the_registered_ops():
    module = importlib.import_module("r1v2_fast.ops._linear_logprob_autograd")
    logits_module = importlib.import_module("r1v2_fast.ops._linear_logprob_logits")
    hidden, weight, bias, targets, upstream = inputs()
    for matrix in (weight, weight.T.contiguous().T):
        shared = (hidden, matrix, bias, targets, None, 1.0, 1.0, None, -100, None, None, None, "", "torch")
        torch.library.opcheck(module._forward, (*shared, ["entropy"], True, True, 4, 0.0))
        torch.library.opcheck(module._entropy_unit_grad, shared)
        kept = module._forward(*shared, ["entropy"], True, True, 4, 0.0)[-3:]
        torch.library.opcheck(module._head_grads, (*shared, *kept, upstream, None))
    logits = hidden @ weight.T
    shared = (targets, None, 1.0, None, None, -100, "torch")
    torch.library.opcheck(logits_module._forward, (logits, *shared, ["entropy"]))
    known = logits_module._forward(logits, *shared, ["entropy"])[-1]
    torch.library.opcheck(logits_module._backward, (logits, *shared, known, upstream, upstream))
    torch.library.opcheck(logits_module._backward_inplace, (logits, *shared, known, upstream, None))


def test_it_compiles_into_one_graph():
    hidden, weight, bias, targets, upstream = inputs()

    def step(h, w, b):
        out = linear_logprobs(h, w, targets, bias=b, outputs=("entropy",), entropy_grad=True)
        return (out.logprobs * upstream).sum() + out.entropy.sum()

    def grads(function):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight, bias)]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    compiled = grads(torch.compile(step, fullgraph=True, backend="aot_eager"))
    for ours, eager in zip(compiled, grads(step), strict=True):
        assert torch.equal(ours, eager)


def test_compiling_with_a_lazy_entropy_gradient_asks_for_a_choice():
    hidden, weight, _, targets, _ = inputs()

    def step(h):
        return linear_logprobs(h, weight, targets, outputs=("entropy",)).entropy

    with pytest.raises(Exception, match="True or False"):
        torch.compile(step, fullgraph=True, backend="eager")(hidden.requires_grad_())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": torch.zeros(3, 5)}, "must agree"),
        ({"targets": torch.zeros(2, dtype=torch.int64)}, "targets must be"),
        ({"targets": torch.zeros(3, dtype=torch.int32)}, "int64"),
        ({"targets": torch.tensor([0, 7, 0])}, r"\[0, 7\), got 7 at token 1"),
        ({"forbidden": torch.tensor([0])}, "forbidden"),
        ({"outputs": ("entropies",)}, "outputs must be among"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": torch.tensor([1.0, -1.0, 1.0])}, "above 0, got -1"),
        ({"temperature": torch.ones(2)}, r"a float or \(3,\).*got \(2,\)"),
        ({"temperature": torch.ones(3, requires_grad=True)}, "no gradient"),
        ({"forbidden": [0]}, "tensor .F., got list"),
        ({"forbidden": torch.tensor([9])}, r"\[0, 7\), got \[9\]"),
        ({"process_group": "world"}, "ProcessGroup, got str"),
        ({"weight": torch.zeros(0, 4)}, "must not be empty"),
        ({"weight": torch.zeros(7, 4, dtype=torch.int64)}, "floating point"),
        ({"workspace_bytes": 0}, "above 0"),
        ({"softcap": 0.0}, "above 0"),
        ({"outputs": ("entropy",), "entropy_grad": "lazy"}, "True, False or None"),
        ({"backend": "tritn"}, "must be one of"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(change, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        linear_logprobs(**{**arguments, **change})


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(0, 9),
    h=st.integers(1, 9),
    v=st.integers(2, 40),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.1, 1, 30]),
)
def test_any_shape_and_scale_follows_the_relative_rule(n, h, v, seed, scale):
    n *= 100  # of few rows the largest error is chance, and one that is certain has no error to compare with
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(n, h, generator=g) * scale, torch.randn(v, h, generator=g)
    targets = torch.randint(0, v, (n,), generator=g)
    plain = reference.linear_logprobs(hidden, weight, targets)["logprobs"]
    truth = reference.linear_logprobs(hidden.double(), weight.double(), targets)["logprobs"]
    ours = linear_logprobs(hidden, weight, targets).logprobs
    assert_as_accurate(ours, plain, truth)
    assert (ours <= 0).all()


@settings(deadline=None, max_examples=30)
@given(
    n=st.integers(0, 9),
    v=st.integers(2, 40),
    seed=st.integers(0, 999),
    scale=st.sampled_from([0.1, 1, 30]),
    temperature=st.floats(0.3, 3.0),
)
def test_any_logits_follow_the_relative_rule(n, v, seed, scale, temperature):
    n *= 300  # the largest error of a few rows is chance: the rule compares two maxima, so both need many
    g = torch.Generator().manual_seed(seed)
    logits = (torch.randn(n, v, generator=g) * scale).requires_grad_()
    targets, upstream = torch.randint(0, v, (n,), generator=g), torch.randn(n, generator=g)

    def plain(to):
        leaf = logits.detach().to(to).requires_grad_()
        value = (leaf / temperature).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
        return value.detach(), torch.autograd.grad(value, leaf, upstream.to(to))[0]

    ours = logprobs_from_logits(logits, targets, temperature=temperature).logprobs
    grad = torch.autograd.grad(ours, logits, upstream)[0]
    for value, same, exact in zip((ours.detach(), grad), plain(torch.float32), plain(torch.float64), strict=True):
        assert_as_accurate(value, same, exact)


def test_log_probs_from_logits_compile_into_one_graph():
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(5, 11, generator=g), torch.randint(0, 11, (5,), generator=g)

    def grads(function):
        leaf = logits.clone().requires_grad_()
        out = function(leaf * 1.0)
        (out.logprobs.sum() + out.entropy.sum()).backward()
        return out.logprobs.detach(), leaf.grad

    def step(z):
        return logprobs_from_logits(z, targets, temperature=0.7, outputs=("entropy",), entropy_grad=True)

    for ours, eager in zip(grads(torch.compile(step, fullgraph=True, backend="aot_eager")), grads(step), strict=True):
        assert torch.equal(ours, eager)


def test_autocast_chooses_the_compute_dtype_and_the_gradient_returns_in_the_inputs():
    hidden, weight, _, targets, _ = inputs()
    leaf = hidden.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_logprobs(leaf, weight, targets).logprobs
    ours.sum().backward()
    half = hidden.bfloat16().requires_grad_()
    own = linear_logprobs(half, weight.bfloat16(), targets).logprobs
    own.sum().backward()
    assert ours.dtype == torch.float32 and torch.equal(ours, own)
    assert leaf.grad.dtype == torch.float32 and torch.equal(leaf.grad, half.grad.float())
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert not torch.equal(linear_logprobs(hidden, weight, targets).logprobs, ours.detach())
