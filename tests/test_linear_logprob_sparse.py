"""grad_tolerance: the bound on the hidden gradient, what it costs, and that it repeats."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v2_fast.ops import linear_logprobs
from r1v2_fast.ops._linear_logprob_sparse import FOLD, _largest
from r1v2_fast.testing.flops import matmul_flops
from r1v2_fast.testing.peaked import peaked_policy


def gradient(hidden, weight, targets, tolerance, upstream=None, **options):
    leaf = hidden.clone().requires_grad_()
    out = linear_logprobs(leaf, weight, targets, grad_tolerance=tolerance, **options).logprobs
    return torch.autograd.grad(out, leaf, torch.ones_like(out) if upstream is None else upstream)[0]


def worst(hidden, weight, targets, tolerance, **options):
    """The largest error of a row over tau c max |W_v|, against fp64 without a tolerance."""
    near = gradient(hidden, weight, targets, tolerance, **options).double()
    exact = gradient(hidden.double(), weight.double(), targets, 0.0, **options)
    temperature = options.get("temperature", 1.0)
    c = options.get("logit_scale", 1.0) / (
        temperature.double() if isinstance(temperature, torch.Tensor) else temperature
    )
    return ((near - exact).norm(dim=1) / (tolerance * c * weight.double().norm(dim=1).max())).max().item()


@pytest.mark.parametrize("tolerance", [2**-10, 2**-6, 0.25])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.7, "logit_scale": 1.3},
        {"temperature": torch.linspace(0.5, 2, 40), "softcap": 20.0},
        {"forbidden": torch.tensor([7, 11])},
    ],
    ids=["plain", "scaled", "softcap", "forbidden"],
)
def test_the_error_stays_within_the_bound(tolerance, options):
    hidden, weight, targets = peaked_policy(40, 96, 9001)
    targets[(targets == 7) | (targets == 11)] = 8
    bound = worst(hidden, weight, targets, tolerance, **options)
    assert 1e-4 < bound <= 1.0, bound  # something was dropped, and no more than promised


def adversarial(kind, v, h=8):
    """Rows whose tail points one way, so that no part of the error cancels."""
    weight = torch.zeros(v, h)
    weight[:, 0] = 1.0
    weight[0] = torch.eye(h)[1]
    logits = {
        "flat": torch.zeros(v),
        "one": torch.cat((torch.tensor([30.0]), torch.zeros(v - 1))),
        "just within": torch.cat(
            (torch.tensor([0.0]), torch.full((v - 1,), -torch.tensor((v - 1) * 1024.0).log().item()))
        ),
        "steps": -torch.arange(v) * 0.02,
    }[kind]
    return weight, logits


@pytest.mark.parametrize("kind", ["flat", "one", "just within", "steps"])
def test_adversarial_rows_stay_within_the_bound(kind):
    v = 4096
    weight, logits = adversarial(kind, v)
    hidden = torch.ones(3, 1)
    whole = torch.cat((weight, logits[:, None]), 1)  # the last column makes the logits, the others the error
    hidden = torch.cat((torch.zeros(3, 8), hidden), 1)
    targets = torch.tensor([0, 5, v - 1])
    for tolerance in (2**-10, 2**-12, 2**-4):
        near = gradient(hidden, whole, targets, tolerance)[:, :8].double()
        exact = gradient(hidden.double(), whole.double(), targets, 0.0)[:, :8]
        assert ((near - exact).norm(dim=1) <= tolerance * (1 + 1e-6)).all(), (kind, tolerance)


@settings(deadline=None, max_examples=25)
@given(
    v=st.integers(66, 3000),
    scale=st.sampled_from([0.1, 1.0, 5.0, 30.0]),
    tolerance=st.sampled_from([1e-7, 1e-4, 2**-10, 0.1, 2.0]),
    seed=st.integers(0, 99),
)
def test_any_row_stays_within_the_bound(v, scale, tolerance, seed):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(7, 12, generator=g) * scale, torch.randn(v, 12, generator=g)
    targets = torch.randint(0, v, (7,), generator=g)
    near = gradient(hidden, weight, targets, tolerance).double()
    exact = gradient(hidden.double(), weight.double(), targets, 0.0)
    plain = gradient(hidden, weight, targets, 0.0).double()
    largest = weight.double().norm(dim=1).max()
    rounding = (plain - exact).norm(dim=1) + 1e-6 * largest
    assert ((near - exact).norm(dim=1) <= tolerance * largest + rounding).all()


def test_a_peaked_policy_costs_a_matmul_and_its_dense_rows():
    n, h, v = 200, 64, 16384
    hidden, weight, targets = peaked_policy(n, h, v)
    nhv = n * h * v
    spent = matmul_flops(lambda: gradient(hidden, weight, targets, 2**-10)) / nhv
    assert 2.19 <= spent <= 2.41, spent  # a tenth, or two where gathering 1,000 rows would cost more, goes dense
    assert matmul_flops(lambda: gradient(hidden, weight, targets, 0.0)) / nhv == pytest.approx(4, rel=0.01)


def test_the_same_call_gives_the_same_bits_and_the_log_probs_do_not_change():
    hidden, weight, targets = peaked_policy(50, 64, 9000)
    assert torch.equal(gradient(hidden, weight, targets, 2**-10), gradient(hidden, weight, targets, 2**-10))
    near = linear_logprobs(hidden.requires_grad_(), weight, targets, grad_tolerance=2**-10).logprobs
    assert torch.equal(near, linear_logprobs(hidden, weight, targets).logprobs)


def test_rows_that_are_kept_for_a_training_head_and_the_heads_gradient_are_exact():
    hidden, weight, targets = peaked_policy(30, 64, 4096)

    def grads(tolerance, room):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        out = linear_logprobs(*leaves, targets, grad_tolerance=tolerance, workspace_bytes=room)
        out.logprobs.sum().backward()
        return [leaf.grad for leaf in leaves]

    for near, exact in zip(grads(2**-6, None), grads(0.0, None), strict=True):
        assert torch.equal(near, exact)
    near, exact = grads(2**-6, 4096 * 4 * 20), grads(0.0, 4096 * 4 * 20)
    assert (near[1] - exact[1]).abs().max() <= 1e-5 * exact[1].abs().max()  # other chunks, the same sum
    assert not torch.equal(near[0][20:], exact[0][20:])


@pytest.mark.parametrize("v", [FOLD * 300, FOLD * 300 + 5])
def test_the_folded_search_finds_what_topk_finds(v):
    g = torch.Generator().manual_seed(0)
    matrix = torch.rand(9, v, generator=g)
    matrix[:, -3:] += 1  # in the tail that the view leaves out
    rows = torch.tensor([0, 3, 8])
    values, ids = _largest(matrix, rows, 64)
    assert torch.equal(values, matrix[rows].topk(64).values)
    assert torch.equal(matrix[rows].gather(1, ids), values)


def test_a_negative_tolerance_is_refused():
    with pytest.raises(ValueError, match="grad_tolerance must be 0 or above, got -0.1"):
        linear_logprobs(torch.zeros(1, 2), torch.zeros(3, 2), torch.tensor([0]), grad_tolerance=-0.1)
