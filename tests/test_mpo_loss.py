"""mpo_loss against its reference, promise by promise, and the running shift. Its kernel: kernel_checks/mpo_loss.py."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v2_fast.ops import RewardShift, mpo_loss
from r1v2_fast.ops.mpo_loss import Numbers, _torch_op
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
OPTIONS["everything by token"] = {**OPTIONS["everything"], "generation": "token"}


def run(function, logprobs, ref, offsets, **options):
    """Every field, then the gradient."""
    leaf = logprobs.detach().clone().requires_grad_()
    out = function(leaf, ref, offsets, **options)
    return [value.detach() for value in out] + [torch.autograd.grad(out[0], leaf)[0]]


def assert_follows_the_reference(logprobs, ref, offsets, **options):
    ours = run(mpo_loss, logprobs, ref, torch.as_tensor(offsets), **options)
    plain = run(reference.mpo_loss, logprobs, ref, offsets, **options)
    truth = run(reference.mpo_loss, logprobs.double(), ref.double(), offsets, **options)
    for value, same, exact in zip(ours, plain, truth, strict=True):
        assert value.isfinite().all()
        assert_as_accurate(value, same, exact)
    return ours


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_field_and_the_gradient_follow_the_reference(name, dtype):
    *fields, grad = assert_follows_the_reference(*inputs(dtype), OFFSETS.tolist(), **OPTIONS[name])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {field.dtype for field in fields} == {wide} and grad.dtype == dtype


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
    assert_follows_the_reference(logprobs, ref, offsets, delta=0.3, generation=generation)


@pytest.mark.parametrize("delta", [0.0, 1e6, -1e6])
@pytest.mark.parametrize("reward", [1e4, -1e4])
def test_extreme_rewards_and_shifts_stay_finite_and_right(reward, delta):
    """Four sequences of one token, and a pair of 131,072 each: as long as a context is today."""
    lengths = [1, 1, 131_072, 1, 1, 131_072]
    offsets = [0, *itertools.accumulate(lengths)]
    g = torch.Generator().manual_seed(0)
    logprobs = -torch.rand(offsets[-1], generator=g)
    ref = logprobs + 0.1 * torch.randn(offsets[-1], generator=g)
    ref[0], ref[1] = logprobs[0] - reward / 0.1, logprobs[1] + reward / 0.1  # r_c of either sign, r_r near 0
    assert_follows_the_reference(logprobs, ref, offsets, delta=delta, label_smoothing=0.1)


def test_a_million_short_pairs_are_a_thousand_a_thousand_times():
    copies, pairs = 1000, 1000
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 3, (2 * pairs,), generator=g)
    offsets = [0, *lengths.cumsum(0).tolist()]
    logprobs, ref = (-torch.rand(offsets[-1], generator=g) for _ in range(2))

    def repeated(values, cut):
        return torch.cat([values[:cut].repeat(copies), values[cut:].repeat(copies)])

    def expected(fields):
        *fields, grad = fields
        fields = [field.repeat(copies) if field.dim() else field for field in fields]
        return [*fields, repeated(grad, middle) / copies]

    middle = offsets[pairs]
    many = torch.cat([torch.zeros(1, dtype=torch.int64), repeated(lengths, pairs).cumsum(0)])
    ours = run(mpo_loss, repeated(logprobs, middle), repeated(ref, middle), many)
    plain, truth = (run(reference.mpo_loss, logprobs.to(t), ref.to(t), offsets) for t in (torch.float32, torch.float64))
    for value, same, exact in zip(ours, expected(plain), expected(truth), strict=True):
        assert_as_accurate(value, same, exact)


@pytest.mark.parametrize("generation", ["sequence", "token"])
def test_the_reference_passes_gradcheck(generation):
    logprobs, ref = inputs()
    options = {**OPTIONS["everything"], "generation": generation}
    function = lambda lp: reference.mpo_loss(lp, ref, OFFSETS.tolist(), **options)[0]  # noqa: E731
    assert torch.autograd.gradcheck(function, logprobs.requires_grad_())


@pytest.mark.parametrize("generation", ["sequence", "token"])
def test_with_normalizers_any_split_gives_the_same_gradient(generation):
    logprobs, ref = inputs()
    weights = torch.tensor([1.0, 0.5])
    options = {"normalizer": 2.0, "generation_normalizer": 5.0, "delta": 0.2, "generation": generation}
    whole = run(mpo_loss, logprobs, ref, OFFSETS, pair_weights=weights, **options)
    parts = logprobs.clone().requires_grad_()
    losses = []
    for pair in (0, 1):
        at = torch.cat([torch.arange(int(OFFSETS[s]), int(OFFSETS[s + 1])) for s in (pair, 2 + pair)])
        lengths = [int(OFFSETS[s + 1] - OFFSETS[s]) for s in (pair, 2 + pair)]
        offsets = torch.tensor([0, lengths[0], sum(lengths)])
        losses.append(mpo_loss(parts[at], ref[at], offsets, pair_weights=weights[pair : pair + 1], **options).loss)
        losses[-1].backward()
    assert_as_accurate(parts.grad, whole[-1], whole[-1])
    assert_as_accurate(sum(losses).detach(), whole[0], whole[0])


def test_metrics_are_unweighted_and_of_this_call():
    logprobs, ref = inputs()
    weighted = mpo_loss(logprobs, ref, OFFSETS, pair_weights=torch.tensor([1.0, 0.0]), normalizer=7.0)
    chosen, rejected = weighted.chosen_rewards, weighted.rejected_rewards
    assert weighted.accuracy == (chosen > rejected).double().mean()
    assert torch.allclose(weighted.margin, (chosen - rejected).mean(), rtol=1e-14, atol=0)


def test_only_the_loss_is_differentiable_and_once():
    logprobs, ref = inputs()
    out = mpo_loss(logprobs.requires_grad_(), ref.requires_grad_(), OFFSETS)
    assert out.loss.requires_grad and not any(value.requires_grad for value in out[1:])
    with pytest.raises(RuntimeError, match="not differentiable twice"):
        torch.autograd.grad(out.loss, logprobs, create_graph=True)


def test_loss_scaling_reaches_a_gradient_that_fp16_could_not_hold():
    logprobs, ref = inputs(torch.float16)
    scale, tokens = 2.0**16, 2.0**26  # a share of 2^-26 is below half of fp16's smallest number
    leaf = logprobs.clone().requires_grad_()
    out = mpo_loss(leaf, ref, OFFSETS, weights=(0, 0, 1), generation="token", generation_normalizer=tokens)
    (out.loss * scale).backward()
    assert (leaf.grad[:5] == -(scale / tokens)).all() and (leaf.grad[5:] == 0).all()


def test_numbers_in_tensors_and_strides_change_no_bit():
    logprobs, ref = inputs(torch.float32)
    numbers = {"delta": 0.3, "normalizer": 3.0, "generation_normalizer": 7.0}
    weights = torch.tensor([0.5, 0.5])
    plain = run(mpo_loss, logprobs, ref, OFFSETS, pair_weights=weights, **numbers)
    assert all(map(torch.equal, plain, run(mpo_loss, logprobs, ref, OFFSETS, pair_weights=weights, **numbers)))
    for shape in ((), (1,)):
        tensors = {name: torch.full(shape, value, dtype=torch.float64) for name, value in numbers.items()}
        strided = [torch.stack([tensor, tensor], 1)[:, 0] for tensor in (logprobs, ref, OFFSETS.int())]
        assert not any(tensor.is_contiguous() for tensor in strided)
        other = run(mpo_loss, *strided, pair_weights=torch.tensor(0.5).expand(2), **tensors)
        assert all(map(torch.equal, plain, other))


@pytest.mark.parametrize("per_sequence", [True, False])
def test_opcheck_accepts_it(per_sequence):
    logprobs, ref = inputs(torch.float32)
    numbers = list(Numbers(0.1, 0.8, 0.2, 1.0, 0.1, 0.3, 2.0, 2.0 if per_sequence else float("nan")))
    torch.library.opcheck(_torch_op, (logprobs, ref, OFFSETS, None, None, None, None, numbers, per_sequence))
    tensors = torch.ones(2), torch.tensor(0.4), torch.tensor([3]), torch.tensor(5.0)
    torch.library.opcheck(_torch_op, (logprobs.bfloat16(), ref, OFFSETS, *tensors, numbers, per_sequence))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("delta", [0.3, torch.tensor(0.3)], ids=["number", "tensor"])
def test_it_compiles_into_one_graph(dtype, delta):
    logprobs, ref = inputs(dtype)
    step = lambda lp: mpo_loss(lp, ref, OFFSETS, delta=delta)  # noqa: E731
    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = logprobs.clone().requires_grad_()
        out = function(leaf)
        out.loss.backward()
        results.append([*out, leaf.grad])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize(
    ("offsets", "options", "message"),
    [
        (torch.tensor([0, 12]), {}, r"ints \[2P \+ 1\] with P >= 1, got torch.int64 \(2,\)"),
        (OFFSETS.double(), {}, "got torch.float64"),
        (torch.tensor([0, 4, 4, 8, 12]), {}, "sequence 1 has no tokens"),
        (torch.tensor([0, 4, 6, 8, 11]), {}, "N = 12, got 0 to 11"),
        (OFFSETS, {"generation": "tokens"}, "generation must be sequence or token, got 'tokens'"),
        (OFFSETS, {"pair_weights": torch.ones(3)}, r"must be \[2\], got \(3,\)"),
        (OFFSETS, {"label_smoothing": 0.7}, "label_smoothing must lie in .*, got 0.7"),
        (OFFSETS, {"weights": (1.0, 2.0)}, "preference, quality and generation, got"),
        (OFFSETS, {"delta": torch.zeros(2)}, r"delta must be one number, got a tensor of shape \(2,\)"),
        (OFFSETS, {"normalizer": 0.0}, "normalizer must be above 0, got 0.0"),
        (OFFSETS, {"generation_normalizer": -1.0}, "generation_normalizer must be above 0, got -1.0"),
        (OFFSETS, {"backend": "cuda"}, r"must be one of \['auto', 'triton', 'torch'\], got 'cuda'"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(offsets, options, message):
    with pytest.raises(ValueError, match=message):
        mpo_loss(torch.zeros(12), torch.zeros(12), offsets, **options)


def test_wrong_logprobs_say_what_was_expected_and_what_came():
    with pytest.raises(ValueError, match=r"packed \[N\] log-probs, got \(12,\) and \(11,\)"):
        mpo_loss(torch.zeros(12), torch.zeros(11), OFFSETS)
    with pytest.raises(ValueError, match="must be floats, got torch.int64"):
        mpo_loss(torch.zeros(12, dtype=torch.int64), torch.zeros(12), OFFSETS)


def test_triton_says_what_it_lacks(monkeypatch):
    pytest.importorskip("triton")
    with pytest.raises(RuntimeError, match="need a CUDA tensor, got one on cpu"):
        mpo_loss(*inputs(torch.float32), OFFSETS, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the device is no objection
    with pytest.raises(RuntimeError, match="log-probs are fp64; use backend='torch'"):
        mpo_loss(*inputs(), OFFSETS, backend="triton")


def test_nothing_waits_for_the_device():
    """A meta tensor has no value: reading one on the host would raise."""
    shift = RewardShift()
    logprobs = torch.zeros(12, device="meta", requires_grad=True)
    for _ in range(2):
        out = mpo_loss(
            logprobs, logprobs, OFFSETS.to("meta"), delta=shift.delta, normalizer=torch.ones((), device="meta")
        )
        out.loss.backward()
        shift.update(out.chosen_rewards, out.rejected_rewards)
        assert shift.delta.device == shift.count.device == logprobs.device  # read there from now on


def test_the_shift_is_the_mean_of_all_rewards_so_far_and_survives_a_checkpoint():
    shift = RewardShift()
    assert shift.delta == 0
    shift.update(torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 0.0]))
    shift.update(torch.tensor([5.0]), torch.tensor([5.0]))
    assert shift.delta.item() == pytest.approx(12 / 6)
    other = RewardShift()
    other.load_state_dict(shift.state_dict())
    other.update(torch.tensor([2.0]), torch.tensor([2.1]))
    shift.update(torch.tensor([2.0]), torch.tensor([2.1]))
    assert other.state_dict() == shift.state_dict()


def test_the_shift_does_not_stop_moving_late_in_a_run():
    shift = RewardShift()
    shift.load_state_dict({"delta": 1.0, "count": 1e8, "update_first": False})
    for _ in range(100):
        shift.update(torch.tensor([2.0]), torch.tensor([2.0]))  # each moves it by 2e-8, a third of fp32's half ulp
    assert shift.delta.item() - 1 == pytest.approx(200 / (1e8 + 200))


@pytest.mark.parametrize("update_first", [False, True])
def test_no_rewards_move_no_shift(update_first):
    shift, none = RewardShift(update_first=update_first), torch.zeros(0)
    shift.update(none, none)
    assert shift.delta == 0 and shift.count == 0
    shift.update(torch.tensor([3.0]), none)
    shift.update(none, none)
    assert shift.delta == 3 and shift.count == 1


def test_update_first_counts_each_call_once_as_trl_did():
    shift = RewardShift(update_first=True)
    shift.update(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]))
    shift.update(torch.tensor([6.0]), torch.tensor([6.0]))
    assert shift.delta.item() == pytest.approx((2.0 + 6.0) / 2)
