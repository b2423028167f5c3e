"""policy_loss against its reference in value and gradient, and the promises of its contract."""

import itertools

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from r1v2_fast.ops.policy_loss import KINDS, _op, policy_loss
from r1v2_fast.reference import policy_loss as reference
from r1v2_fast.testing.accuracy import assert_as_accurate

OFFSETS = torch.tensor([0, 3, 3, 8, 12])
N, B = 12, 4


def inputs(dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda scale: torch.randn(N, generator=g, dtype=torch.float64) * scale  # noqa: E731
    logprobs = -draw(1.0).abs()
    tensors = {
        "logprobs": logprobs,
        "old": logprobs + draw(0.3),
        "ref": logprobs + draw(0.2),
        "behaviour": logprobs + draw(0.5),
        "advantages": torch.tensor([1.0, 2.0, -1.0, 0.0], dtype=torch.float64),
    }
    return {name: value.to(dtype) for name, value in tensors.items()}


def rows():
    return torch.searchsorted(OFFSETS[1:], torch.arange(N), right=True)


def padded(values):
    out = torch.full((B, 5), float("nan"), dtype=values.dtype)
    for b in range(B):
        own = values[OFFSETS[b] : OFFSETS[b + 1]]
        out[b, : len(own)] = own
    return out


MASK = padded(torch.ones(N)) == 1


def both(x, kind, kl_kind, dtype):
    normalizer = 20.0 if kind == "dr_grpo" else None
    common = {"kl_coef": 0.1, "kl_kind": kl_kind, "normalizer": normalizer}
    leaf = x["logprobs"].to(dtype).clone().requires_grad_()
    ours = policy_loss(
        leaf, x["old"].to(dtype), x["advantages"].to(dtype), offsets=OFFSETS, kind=kind,
        ref_logprobs=x["ref"].to(dtype), behaviour_logprobs=x["behaviour"].to(dtype), **common,
    ).loss  # fmt: skip

    def plain(to):
        t = {name: value.to(dtype).to(to) for name, value in x.items()}
        own = t["logprobs"].clone().requires_grad_()
        value = reference.policy_loss(
            own, t["old"], t["advantages"][rows()], OFFSETS.tolist(), ref_N=t["ref"], behaviour_N=t["behaviour"],
            aggregate=KINDS[kind], **common,
        )  # fmt: skip
        return value.detach(), torch.autograd.grad(value, own)[0]

    return (ours.detach(), torch.autograd.grad(ours, leaf)[0]), plain(dtype), plain(torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kl_kind", ["k1", "k2", "k3"])
def test_loss_and_gradient_follow_the_reference(kind, kl_kind, dtype):
    ours, plain, truth = both(inputs(), kind, kl_kind, dtype)
    for value, same, exact in zip(ours, plain, truth, strict=True):
        assert_as_accurate(value, same, exact)


def test_the_reference_passes_gradcheck():
    x = inputs()
    function = lambda lp: reference.policy_loss(  # noqa: E731
        lp, x["old"], x["advantages"][rows()], OFFSETS.tolist(), ref_N=x["ref"], kl_coef=0.1, behaviour_N=x["behaviour"]
    )
    assert torch.autograd.gradcheck(function, x["logprobs"].requires_grad_())


@pytest.mark.parametrize("kind", KINDS)
def test_padded_and_packed_give_the_same_bits_and_padding_may_hold_anything(kind):
    x = inputs(torch.float32)
    packed, wide = x["logprobs"].clone().requires_grad_(), padded(x["logprobs"]).requires_grad_()
    a = policy_loss(packed, x["old"], x["advantages"], offsets=OFFSETS, kind=kind, normalizer=20.0)
    b = policy_loss(wide, padded(x["old"]), x["advantages"], mask=MASK, kind=kind, normalizer=20.0)
    a.loss.backward()
    b.loss.backward()
    assert torch.equal(a.loss, b.loss)
    assert torch.equal(packed.grad, wide.grad[MASK])
    assert torch.equal(wide.grad[~MASK], torch.zeros_like(wide.grad[~MASK]))
    for name in a.metrics:
        assert torch.equal(a.metrics[name], b.metrics[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_any_split_into_micro_batches_gives_the_same_gradient(kind):
    x = inputs()
    whole = x["logprobs"].clone().requires_grad_()
    policy_loss(whole, x["old"], x["advantages"], offsets=OFFSETS, kind=kind, normalizer=7.0).loss.backward()
    parts = x["logprobs"].clone().requires_grad_()
    for first, last in ((0, 1), (1, 3), (3, 4)):
        at = slice(int(OFFSETS[first]), int(OFFSETS[last]))
        offsets = OFFSETS[first : last + 1] - OFFSETS[first]
        policy_loss(
            parts[at], x["old"][at], x["advantages"][first:last], offsets=offsets, kind=kind, normalizer=7.0
        ).loss.backward()
    assert_as_accurate(parts.grad, whole.grad, whole.grad)


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


def test_on_policy_the_gradient_is_minus_the_advantage():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    policy_loss(logprobs, logprobs.detach(), torch.tensor([3.0]), offsets=torch.tensor([0, 2])).loss.backward()
    assert logprobs.grad.tolist() == [-1.5, -1.5]


def test_the_replay_weight_is_capped_and_constant():
    logprobs = torch.tensor([-1.0], requires_grad=True)
    out = policy_loss(
        logprobs, logprobs.detach(), torch.tensor([1.0]), offsets=torch.tensor([0, 1]),
        behaviour_logprobs=torch.tensor([-9.0]), behaviour_cap=2.0,
    )  # fmt: skip
    out.loss.backward()
    assert logprobs.grad.item() == -2.0
    assert out.metrics["sampling/importance_sampling_ratio/max"] == 2.0


def test_clip_metrics_count_what_was_clipped():
    old = torch.zeros(4)
    logprobs = torch.tensor([0.5, -0.5, 0.5, 0.0])
    out = policy_loss(logprobs, old, torch.tensor([1.0, -1.0, -1.0, 1.0]), offsets=torch.arange(5))
    assert out.metrics["clip_ratio/high_mean"] == 0.25 and out.metrics["clip_ratio/low_mean"] == 0.25
    assert out.metrics["clip_ratio/region_mean"] == 0.5 and "kl" not in out.metrics


def test_an_all_masked_batch_gives_a_differentiable_zero():
    logprobs = torch.full((2, 3), float("nan"), requires_grad=True)
    out = policy_loss(logprobs, logprobs.detach(), torch.ones(2), mask=torch.zeros(2, 3, dtype=torch.bool))
    out.loss.backward()
    assert out.loss == 0 and torch.equal(logprobs.grad, torch.zeros(2, 3))
    empty = torch.zeros(0, requires_grad=True)
    policy_loss(empty, empty.detach(), torch.zeros(0), offsets=torch.zeros(1, dtype=torch.int64)).loss.backward()
    assert empty.grad.shape == (0,)


def test_opcheck_accepts_it_and_it_compiles_into_one_graph():
    x = inputs(torch.float32)
    live = torch.ones(N, dtype=torch.bool)
    arguments = (B, 0, x["ref"], x["behaviour"], 0.2, 0.2, 20.0, 0.1, "k3", 2.0, "token_mean", None)
    torch.library.opcheck(_op, (x["logprobs"], x["old"], x["advantages"][rows()], live, rows(), *arguments))

    def step(logprobs):
        return policy_loss(logprobs, x["old"], x["advantages"], offsets=OFFSETS).loss

    grads = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = x["logprobs"].clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "grp"}, "kind must be one of"),
        ({"offsets": None}, "not both or neither"),
        ({"kind": "dr_grpo"}, "B \\* L_max"),
        ({"kl_coef": 0.1}, "needs ref_logprobs"),
        ({"advantages": torch.zeros(3)}, r"advantages must be \[2\]"),
        ({"old_logprobs": torch.zeros(3)}, "old_logprobs must be"),
        ({"backend": "triton"}, "must be one of"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(change, message):
    arguments = {
        "logprobs": torch.zeros(4), "old_logprobs": torch.zeros(4), "advantages": torch.zeros(2),
        "offsets": torch.tensor([0, 2, 4]),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        policy_loss(**{**arguments, **change})


@settings(deadline=None, max_examples=40)
@example(lengths=[2, 5], kind="grpo", spread=0.01, kl_coef=0.3, seed=1)  # terms of both signs cancel
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6),
    kind=st.sampled_from(list(KINDS)),
    spread=st.sampled_from([0.01, 1.0, 40.0]),
    kl_coef=st.sampled_from([0.0, 0.3]),
    seed=st.integers(0, 999),
)
def test_any_batch_follows_the_relative_rule(lengths, kind, spread, kl_coef, seed):
    g = torch.Generator().manual_seed(seed)
    n, offsets = sum(lengths), [0, *itertools.accumulate(lengths)]
    logprobs, old, ref = (-torch.rand(n, generator=g) * spread for _ in range(3))
    advantages = torch.randint(-1, 2, (len(lengths),), generator=g).float()
    common = {"kl_coef": kl_coef, "normalizer": 20.0 if kind == "dr_grpo" else None}

    def plain(to):
        leaf = logprobs.to(to).requires_grad_()
        own = advantages.to(to).repeat_interleave(torch.tensor(lengths))
        value = reference.policy_loss(leaf, old.to(to), own, offsets, ref_N=ref.to(to), aggregate=KINDS[kind], **common)
        return value.detach(), torch.autograd.grad(value, leaf)[0]

    leaf = logprobs.clone().requires_grad_()
    loss = policy_loss(leaf, old, advantages, offsets=torch.tensor(offsets), kind=kind, ref_logprobs=ref, **common).loss
    ours = (loss.detach(), torch.autograd.grad(loss, leaf)[0])
    for value, same, exact in zip(ours, plain(torch.float32), plain(torch.float64), strict=True):
        assert_as_accurate(value, same, exact)
