"""mpo_loss against its reference, and the running shift."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v2_fast.ops.mpo_loss import RewardShift, _op, mpo_loss
from r1v2_fast.reference import mpo_loss as reference
from r1v2_fast.testing.accuracy import assert_as_accurate

OFFSETS = torch.tensor([0, 3, 5, 8, 12])


def inputs(dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    logprobs = -torch.randn(12, generator=g, dtype=torch.float64).abs()
    return logprobs.to(dtype), (logprobs + torch.randn(12, generator=g, dtype=torch.float64)).to(dtype)


OPTIONS = {
    "default": {},
    "token": {"generation": "token"},
    "everything": {
        "beta": 0.7, "weights": (1.0, 2.0, 0.3), "delta": 0.4, "label_smoothing": 0.1,
        "pair_weights": torch.tensor([1.0, 0.5], dtype=torch.float64), "normalizer": 3.0, "generation_normalizer": 5.0,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_loss_terms_and_gradient_follow_the_reference(name, dtype):
    def run(function, to, offsets):
        logprobs, ref = (t.to(to) for t in inputs(dtype))
        logprobs.requires_grad_()
        out = function(logprobs, ref, offsets, **OPTIONS[name])
        return [v.detach() for v in out], torch.autograd.grad(out[0], logprobs)[0]

    ours, grad = run(mpo_loss, dtype, OFFSETS)
    plain, plain_grad = run(reference.mpo_loss, dtype, OFFSETS.tolist())
    truth, truth_grad = run(reference.mpo_loss, torch.float64, OFFSETS.tolist())
    for value, same, exact in zip(ours, plain, truth, strict=True):
        assert_as_accurate(value, same, exact)
    assert_as_accurate(grad, plain_grad, truth_grad)


def test_the_reference_passes_gradcheck():
    logprobs, ref = inputs()
    function = lambda lp: reference.mpo_loss(lp, ref, OFFSETS.tolist(), **OPTIONS["everything"])[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, logprobs.requires_grad_())


def test_with_normalizers_any_split_gives_the_same_gradient():
    logprobs, ref = inputs()
    whole = logprobs.clone().requires_grad_()
    options = {"normalizer": 2.0, "generation_normalizer": 2.0, "delta": 0.2}
    mpo_loss(whole, ref, OFFSETS, **options).loss.backward()
    parts = logprobs.clone().requires_grad_()
    for pair in (0, 1):
        at = torch.cat([torch.arange(int(OFFSETS[s]), int(OFFSETS[s + 1])) for s in (pair, 2 + pair)])
        lengths = [int(OFFSETS[s + 1] - OFFSETS[s]) for s in (pair, 2 + pair)]
        offsets = torch.tensor([0, lengths[0], sum(lengths)])
        mpo_loss(parts[at], ref[at], offsets, **options).loss.backward()
    assert_as_accurate(parts.grad, whole.grad, whole.grad)


def test_only_the_loss_is_differentiable():
    logprobs, ref = inputs()
    out = mpo_loss(logprobs.requires_grad_(), ref, OFFSETS)
    assert out.loss.requires_grad and not any(value.requires_grad for value in out[1:])


def test_the_shift_is_the_mean_of_all_rewards_so_far():
    shift = RewardShift()
    assert shift.delta == 0
    shift.update(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.0]))
    shift.update(torch.tensor([5.0]), torch.tensor([5.0]))
    assert shift.delta.item() == pytest.approx(12 / 6)
    other = RewardShift()
    other.load_state_dict(shift.state_dict())
    other.update(torch.tensor([2.0]), torch.tensor([2.0]))
    shift.update(torch.tensor([2.0]), torch.tensor([2.0]))
    assert torch.equal(other.delta, shift.delta)


def test_update_first_counts_each_call_once_as_trl_did():
    shift = RewardShift(update_first=True)
    shift.update(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    shift.update(torch.tensor([6.0]), torch.tensor([6.0]))
    assert shift.delta.item() == pytest.approx((2.0 + 6.0) / 2)


def test_opcheck_accepts_it_and_it_compiles_into_one_graph():
    logprobs, ref = inputs(torch.float32)
    torch.library.opcheck(
        _op, (logprobs, ref, OFFSETS, torch.zeros(()), None, None, None, 0.1, [0.8, 0.2, 1.0], 0.0, True)
    )
    grads = []
    step = lambda lp: mpo_loss(lp, ref, OFFSETS).loss  # noqa: E731
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = logprobs.clone().requires_grad_()
        function(leaf).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("offsets", "options", "message"),
    [
        (torch.tensor([0, 12]), {}, "2P"),
        (torch.tensor([0, 4, 4, 8, 12]), {}, "sequence 1 has no tokens"),
        (torch.tensor([0, 4, 6, 8, 11]), {}, "N = 12"),
        (OFFSETS, {"generation": "tokens"}, "generation must be"),
        (OFFSETS, {"pair_weights": torch.ones(3)}, r"must be \[2\]"),
        (OFFSETS, {"label_smoothing": 0.7}, "label_smoothing"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(offsets, options, message):
    with pytest.raises(ValueError, match=message):
        mpo_loss(torch.zeros(12), torch.zeros(12), offsets, **options)


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    spread=st.sampled_from([0.01, 1.0, 100.0]),
    generation=st.sampled_from(["sequence", "token"]),
    seed=st.integers(0, 999),
)
def test_any_pairs_follow_the_relative_rule(lengths, spread, generation, seed):
    g = torch.Generator().manual_seed(seed)
    offsets = [0, *itertools.accumulate(lengths + lengths[::-1])]
    logprobs, ref = (-torch.rand(offsets[-1], generator=g) * spread for _ in range(2))

    def run(function, to, where):
        leaf = logprobs.to(to).requires_grad_()
        out = function(leaf, ref.to(to), where, delta=0.3, generation=generation)
        return [value.detach() for value in out] + [torch.autograd.grad(out[0], leaf)[0]]

    ours = run(mpo_loss, torch.float32, torch.tensor(offsets))
    plain, truth = (run(reference.mpo_loss, to, offsets) for to in (torch.float32, torch.float64))
    for value, same, exact in zip(ours, plain, truth, strict=True):
        assert_as_accurate(value, same, exact)
