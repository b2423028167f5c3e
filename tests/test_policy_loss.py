"""policy_loss against its reference in value and gradient, and the promises of its contract."""

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from r1v2_fast.ops import _policy_loss_autograd
from r1v2_fast.ops._policy_loss_autograd import _torch_op
from r1v2_fast.ops._policy_loss_settings import KINDS, METRICS
from r1v2_fast.ops.policy_loss import policy_loss
from r1v2_fast.testing.accuracy import assert_as_accurate
from r1v2_fast.testing.responses import EVERYTHING, SETTINGS, by_reference, op_arguments, ours, plain, responses

N = 12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_follow_the_reference(kind, name, dtype):
    batch = responses().to(dtype)
    found, _ = ours(batch, kind, SETTINGS[name])
    same, truth = (plain(batch, kind, SETTINGS[name], to) for to in (dtype, torch.float64))
    for value, own, exact in zip(found, same, truth, strict=True):
        assert_as_accurate(value, own, exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "everything", "everything, per token"])
def test_the_reference_passes_gradcheck_with_what_it_holds_constant_held(kind, name):
    batch = responses()

    def function(logprobs, entropy):
        return by_reference(logprobs, entropy, batch, kind, SETTINGS[name], anchor_N=batch.logprobs)

    leaves = [batch.logprobs.clone().requires_grad_(), batch.entropy.clone().requires_grad_()]
    assert torch.autograd.gradcheck(function, leaves)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["plain", "per token", "sequence mask", "everything", "everything, per token"])
def test_padded_and_packed_give_the_same_bits_and_padding_may_hold_anything(kind, name):
    batch = responses(seed=3).to(torch.float32)
    chosen = SETTINGS[name] | ({"normalizer": 20.0} if kind == "dr_grpo" else {})
    packed, metrics = ours(batch, kind, chosen)
    wide, wide_metrics = ours(batch, kind, chosen, padded=True)
    assert torch.equal(packed[0], wide[0])
    for values, padded in zip(packed[1:], wide[1:], strict=True):
        assert torch.equal(values, padded[batch.mask])
        assert torch.equal(padded[~batch.mask], torch.zeros_like(padded[~batch.mask]))
    assert metrics.keys() == wide_metrics.keys()
    for metric in metrics:
        assert torch.equal(metrics[metric], wide_metrics[metric]), metric


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=5),
    kind=st.sampled_from(list(KINDS)),
    seed=st.integers(0, 99),
)
def test_any_mask_gives_the_bits_of_its_tokens_packed(rows, kind, seed):
    mask = torch.tensor(rows)
    batch = responses(tuple(mask.sum(1).tolist()), seed=seed).to(torch.float32)
    options = {"kind": kind, "normalizer": 3.0, "clip_high": 1.2 if kind == "cispo" else 0.2}

    def spread(values):
        return values.new_full(mask.shape, torch.nan).masked_scatter(mask, values)

    packed, wide = batch.logprobs.clone().requires_grad_(), spread(batch.logprobs).requires_grad_()
    a = policy_loss(packed, batch.old_logprobs, batch.advantages, offsets=batch.offsets, **options)
    b = policy_loss(wide, spread(batch.old_logprobs), batch.advantages, mask=mask, **options)
    a.loss.backward()
    b.loss.backward()
    assert torch.equal(a.loss, b.loss) and a.metrics == b.metrics
    assert torch.equal(packed.grad, wide.grad[mask]) and (wide.grad[~mask] == 0).all()


def test_tokens_of_no_sequence_are_left_alone():
    batch = responses((3, 4))
    logprobs = torch.cat([torch.full((2,), torch.nan), batch.logprobs, torch.full((1,), torch.nan)]).requires_grad_()
    old = torch.cat([torch.zeros(2), batch.old_logprobs, torch.zeros(1)])
    inside = policy_loss(batch.logprobs, batch.old_logprobs, batch.advantages, offsets=batch.offsets, kind="dapo")
    out = policy_loss(logprobs, old, batch.advantages, offsets=batch.offsets + 2, kind="dapo")
    out.loss.backward()
    assert out.loss == inside.loss
    assert logprobs.grad[[0, 1, 9]].tolist() == [0, 0, 0] and (logprobs.grad[2:9] != 0).any()


def test_zero_advantage_is_exactly_nothing_even_at_an_infinite_ratio():
    logprobs = torch.tensor([0.0, -1.0], requires_grad=True)
    out = policy_loss(
        logprobs,
        torch.tensor([-1e4, -1.0]),
        torch.tensor([0.0, 1.0]),
        offsets=torch.tensor([0, 1, 2]),
        log_ratio_clamp=None,
    )
    out.loss.backward()
    assert out.loss == -0.5 and logprobs.grad.tolist() == [0.0, -0.5]


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"dr_grpo"}))
def test_on_policy_the_gradient_is_minus_the_advantage_over_the_divisor(kind):
    """At rho = 1 every kind is the policy gradient."""
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    chosen = {"aggregate": "token_sum", "kind": kind, "clip_high": 5.0 if kind == "cispo" else 0.2}
    policy_loss(
        logprobs, logprobs.detach(), torch.tensor([3.0]), offsets=torch.tensor([0, 2]), **chosen
    ).loss.backward()
    assert torch.allclose(logprobs.grad, torch.tensor([-3.0, -3.0]), rtol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_nan_is_not_swallowed(kind):
    """Neither by a clamp nor by a clip: loss and gradient say it."""
    batch = responses((3, 2)).to(torch.float32)
    batch.token_advantages[:] = 1.0
    broken = batch._replace(logprobs=batch.logprobs.index_fill(0, torch.tensor(1), torch.nan))
    unscored = batch._replace(token_advantages=batch.token_advantages.index_fill(0, torch.tensor(1), torch.nan))
    for poisoned in (broken, unscored):
        (loss, grad, _), _ = ours(poisoned, kind, {"per_token": True, "normalizer": 2.0})
        assert loss.isnan() and grad.isnan().any()


def test_the_replay_weight_is_capped_and_constant():
    logprobs = torch.tensor([-1.0], requires_grad=True)
    out = policy_loss(
        logprobs, logprobs.detach(), torch.tensor([1.0]), offsets=torch.tensor([0, 1]),
        behaviour_logprobs=torch.tensor([-9.0]), behaviour_cap=2.0,
    )  # fmt: skip
    out.loss.backward()
    assert logprobs.grad.item() == -2.0
    assert out.metrics["sampling/importance_sampling_ratio/max"] == 2.0


def test_a_replayed_token_is_weighted_and_clipped_as_the_decoupled_objective_says():
    """min(exp(prox - behaviour), cap) min(r A, clip(r) A), r = exp(logprob - prox)."""
    prox, behaviour = torch.tensor([-1.0, -1.0]), torch.tensor([-1.2, -0.9])
    logprobs = torch.tensor([-0.5, -1.1])
    out = policy_loss(
        logprobs, prox, torch.tensor([1.0]), offsets=torch.tensor([0, 2]), behaviour_logprobs=behaviour,
        aggregate="token_sum",
    )  # fmt: skip
    expected = -(torch.exp(torch.tensor(0.2)) * 1.2 + torch.exp(torch.tensor(-0.1)) * torch.exp(torch.tensor(-0.1)))
    assert out.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_clip_metrics_count_what_was_clipped():
    old = torch.zeros(4)
    logprobs = torch.tensor([0.5, -0.5, 0.5, 0.0])
    out = policy_loss(logprobs, old, torch.tensor([1.0, -1.0, -1.0, 1.0]), offsets=torch.arange(5))
    assert out.metrics["clip_ratio/high_mean"] == 0.25 and out.metrics["clip_ratio/low_mean"] == 0.25
    assert out.metrics["clip_ratio/region_mean"] == 0.5 and "kl" not in out.metrics
    assert out.metrics["clip_ratio/high_max"] == 1 and out.metrics["clip_ratio/low_min"] == 0


def test_a_second_derivative_is_refused_and_not_left_out():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    out = policy_loss(
        logprobs, torch.tensor([-1.1, -2.0]), torch.tensor([1.0]), offsets=torch.tensor([0, 2]), kind="sapo"
    )
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(out.loss, logprobs, create_graph=True)


def test_an_infinite_weight_is_reported_as_it_is():
    logprobs = torch.tensor([-1.0, -2.0])
    weights = torch.tensor([torch.inf, 1.0])
    out = policy_loss(logprobs, logprobs, torch.tensor([1.0]), offsets=torch.tensor([0, 2]), importance_weights=weights)
    assert out.metrics["sampling/importance_sampling_ratio/max"] == torch.inf


def test_only_metrics_that_mean_something_are_reported():
    batch = responses()
    shown = {kind: set(ours(batch, kind, {})[1]) for kind in KINDS}
    assert "cispo_clip_ratio" in shown["cispo"] and "clip_ratio/low_mean" not in shown["cispo"]
    assert "vespo/phi_seq_mean" in shown["vespo"] and shown["sapo"] == {"ratio/mean"}
    everything = set(ours(batch, "grpo", EVERYTHING)[1])
    assert everything == set(METRICS) - {"cispo_clip_ratio", "vespo/phi_seq_mean"}


def test_bnpo_without_a_normalizer_divides_by_the_tokens_of_the_call_and_dapo_by_the_batch():
    batch = responses((2, 6))
    whole, _ = ours(batch, "bnpo", {})
    assert torch.equal(whole[1], ours(batch, "dapo", {"normalizer": 8.0})[0][1])


def test_an_all_masked_batch_gives_a_differentiable_zero():
    logprobs = torch.full((2, 3), float("nan"), requires_grad=True)
    for kind in KINDS:
        mask, cap = torch.zeros(2, 3, dtype=torch.bool), 5.0 if kind == "cispo" else 0.2
        out = policy_loss(logprobs, logprobs.detach(), torch.ones(2), mask=mask, kind=kind, clip_high=cap)
        (grad,) = torch.autograd.grad(out.loss, logprobs)
        assert out.loss == 0 and torch.equal(grad, torch.zeros(2, 3))
        assert all(value.isfinite() for value in out.metrics.values())
    empty = torch.zeros(0, requires_grad=True)
    policy_loss(empty, empty.detach(), torch.zeros(0), offsets=torch.zeros(1, dtype=torch.int64)).loss.backward()
    assert empty.grad.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_inputs_give_an_fp32_loss_and_a_gradient_in_their_dtype(dtype):
    batch = responses().to(dtype)
    (loss, grad, _), metrics = ours(batch, "grpo", SETTINGS["everything"])
    wide, _ = ours(batch.to(torch.float32), "grpo", SETTINGS["everything"])
    assert loss.dtype == metrics["kl"].dtype == torch.float32 and grad.dtype == dtype
    assert torch.equal(loss, wide[0]) and torch.equal(grad, wide[1].to(dtype))


def test_opcheck_accepts_it_and_it_compiles_into_one_graph(monkeypatch):
    batch, called = responses().to(torch.float32), []
    monkeypatch.setattr(_policy_loss_autograd, "_torch_op", lambda *inputs: called.append(inputs) or _torch_op(*inputs))
    ours(batch, "grpo", EVERYTHING)
    ours(batch, "vespo", {}, padded=True)
    monkeypatch.undo()
    for inputs in called:
        torch.library.opcheck(_torch_op, [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs])

    def step(logprobs, entropy):
        return policy_loss(logprobs, **{**op_arguments(batch, "grpo", EVERYTHING), "entropy": entropy}).loss

    seen = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves = [batch.logprobs.clone().requires_grad_(), batch.entropy.clone().requires_grad_()]
        seen.append(torch.autograd.grad(function(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_compiled_step_takes_another_normalizer_every_time(backend, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the device is no objection; the kernel itself is not run
    monkeypatch.setattr(_policy_loss_autograd, "_triton_op", _torch_op)
    batch = responses().to(torch.float32)
    given = op_arguments(batch, "grpo", {"given": ("entropy",), "entropy_coef": 0.1}) | {"backend": backend}
    step = lambda logprobs, n: policy_loss(logprobs, **given, normalizer=n, entropy_normalizer=n + 1).loss  # noqa: E731
    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in (3.0, 4.0, 5.5, 6.0, 7.0, 8.0):
            assert torch.equal(compiled(batch.logprobs, n), step(batch.logprobs, n))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "grp"}, "kind must be one of"),
        ({"ratio_level": "word"}, "ratio_level must be one of"),
        ({"kind": "gspo", "ratio_level": "token"}, "defined by its sequence's ratio"),
        ({"rollout_mode": "truncate"}, "rollout_mode must be one of"),
        ({"offsets": None}, "not both or neither"),
        ({"offsets": torch.tensor([0, 3, 2])}, "must not decrease"),
        ({"offsets": torch.tensor([0, 2, 5])}, r"must lie in \[0, N = 4\], got 0 and 5"),
        ({"offsets": torch.tensor([0.0, 2, 4])}, "offsets int"),
        ({"logprobs": torch.zeros(4, dtype=torch.int64)}, "must be floats"),
        ({"kind": "dr_grpo"}, "B \\* L_max"),
        ({"kl_coef": 0.1}, "needs ref_logprobs"),
        ({"entropy_coef": 0.1}, "needs entropy"),
        ({"normalizer": 0.0}, "normalizer must be above 0, got 0.0"),
        ({"entropy_normalizer": -1.0}, "entropy_normalizer must be above 0"),
        ({"normalizer": torch.ones(2)}, r"normalizer must be one number, got a tensor of shape \(2,\)"),
        ({"normalizer": torch.zeros(0)}, "normalizer must be one number"),
        ({"rollout_min": 5.0}, "rollout_min must be at most rollout_cap = 3.0, got 5.0"),
        ({"kind": "cispo"}, "cap of the ratio itself"),
        ({"kind": "sapo", "dual_clip": 3.0}, "dual_clip has no meaning for this kind, but for grpo"),
        ({"kind": "vespo", "ratio_cap": 3.0}, "ratio_cap has no meaning"),
        ({"cispo_low": 0.2}, "cispo_low has no meaning for this kind, but for cispo"),
        ({"gmpo_clamp": (0.4, 0.4, 0.1)}, "gmpo_clamp must be 2 numbers"),
        ({"vespo": (1.0, torch.nan, 1.0, 1.0)}, "vespo must be 4 numbers"),
        ({"kl_coef": torch.nan}, "kl_coef must be 0 or more"),
        ({"off_policy_threshold": torch.nan}, "off_policy_threshold must be a number"),
        ({"dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"clip_low": -0.1}, "clip_low must be 0 or more"),
        ({"sapo_tau": (0.0, 1.0)}, "temperatures above 0"),
        ({"advantages": torch.zeros(3)}, r"advantages must be \[2\]"),
        ({"importance_weights": torch.zeros(3)}, r"importance_weights must be \[2\]"),
        ({"old_logprobs": torch.zeros(3)}, "old_logprobs must be"),
        ({"backend": "cuda"}, "must be one of"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(change, message):
    arguments = {
        "logprobs": torch.zeros(4), "old_logprobs": torch.zeros(4), "advantages": torch.zeros(2),
        "offsets": torch.tensor([0, 2, 4]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**arguments, **change})


@settings(deadline=None, max_examples=120)
@example(lengths=[2, 5], kind="grpo", name="k3", spread=0.01, seed=1)  # terms of both signs cancel
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    kind=st.sampled_from(list(KINDS)),
    name=st.sampled_from(list(SETTINGS)),
    spread=st.sampled_from([0.01, 1.0, 40.0]),
    seed=st.integers(0, 999),
)
def test_any_batch_follows_the_relative_rule(lengths, kind, name, spread, seed):
    batch = responses(tuple(lengths), seed=seed, spread=spread).to(torch.float32)
    assume(sum(lengths) != len(lengths))  # where N = B a value for each token is taken for one for each sequence
    found, _ = ours(batch, kind, SETTINGS[name])
    same, truth = (plain(batch, kind, SETTINGS[name], to) for to in (torch.float32, torch.float64))
    if not all(value.isfinite().all() for value in truth):  # a chain rule of infinities, as autograd makes it
        return
    for value, own, exact in zip(found, same, truth, strict=True):
        assert_as_accurate(value, own, exact)
