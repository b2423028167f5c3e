"""group_advantages against its reference, promise by promise."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v2_fast.ops.group_advantage import CHOICES, _torch_op, group_advantages, groups_from_ids
from r1v2_fast.reference import group_advantage as reference
from r1v2_fast.testing.accuracy import assert_as_accurate

OFFSETS = torch.tensor([0, 3, 3, 4, 9, 14])
NO_VALUE = [torch.nan, torch.inf, -torch.inf]
FLAGS = ("baseline", "correction", "eps_mode", "singleton")


def rewards(components, dtype):
    g = torch.Generator().manual_seed(components)
    values = torch.randint(0, 3, (14, components), generator=g).to(dtype)
    values[4:9] = 1.7
    values[10, 0] = torch.nan
    values[11, -1] = torch.inf
    values[2] = torch.nan
    return values


def compare(values, offsets, groups=None, **options):
    """By the relative rule; informative groups and those without a spread as the reference has them."""
    ours = group_advantages(values, torch.tensor(offsets) if groups is None else groups, **options)
    truth = reference.group_advantages(values, offsets, **options)
    for value, exact in zip(ours[:3], truth[:3], strict=True):
        assert value.dtype == torch.promote_types(values.dtype, torch.float32)
        assert_as_accurate(value, exact.to(value.dtype), exact, f"{options}")
    assert torch.equal(ours.informative, truth[3])
    equal = (truth[2] == 0).repeat_interleave(torch.tensor(offsets).diff())
    assert options.get("aggregate") == "gdpo" or (ours.advantages[equal] == 0).all()
    return ours.advantages


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("aggregate", CHOICES["aggregate"])
@pytest.mark.parametrize("scale", CHOICES["scale"])
def test_every_mode_follows_the_reference(dtype, components, aggregate, scale):
    values = rewards(components, dtype)
    given_weights = torch.linspace(0.5, 1.5, components, dtype=dtype)
    for choice in itertools.product(*(CHOICES[name] for name in FLAGS), (False, True), (None, given_weights)):
        options = dict(zip((*FLAGS, "zero_uninformative", "component_weights"), choice, strict=True))
        compare(values, OFFSETS.tolist(), aggregate=aggregate, scale=scale, **options)


@pytest.mark.parametrize(
    "size", [1, 2, 3, 8, 37, 64, 1500]
)  # alone, padded and unpadded in a kernel, longer than a program
@pytest.mark.parametrize("options", [{}, {"scale": "batch"}, {"aggregate": "gdpo"}], ids=str)
def test_a_uniform_size_is_offsets_of_equal_steps(size, options):
    values = torch.randn(4 * size, 2, generator=torch.Generator().manual_seed(size))
    offsets = list(range(0, 4 * size + 1, size))
    uniform, ragged = compare(values, offsets, size, **options), compare(values, offsets, **options)
    assert_as_accurate(uniform, ragged, compare(values.double(), offsets, **options))


def test_one_huge_group_among_tiny_ones_follows_the_reference():
    offsets = [0, 1, 2, 5, 100_005, 100_005, *range(100_010, 100_100, 3)]
    values = torch.randn(offsets[-1], generator=torch.Generator().manual_seed(0)) + 1e3
    for scale in CHOICES["scale"]:
        compare(values, offsets, scale=scale)


@pytest.mark.parametrize("factor", [1e-12, 1.0, 1e30])
def test_a_tiny_spread_at_a_large_offset_and_huge_rewards_keep_their_digits(factor):
    values = (1e6 + 0.0625 * torch.arange(14.0)) * factor
    for options in ({}, {"eps": 0.0}, {"scale": "batch"}, {"aggregate": "gdpo"}, {"informative_tol": 0.2 * factor}):
        compare(values, OFFSETS.tolist(), **options)


@pytest.mark.parametrize("aggregate", CHOICES["aggregate"])
def test_equal_rewards_give_exactly_zero_whatever_eps_is(aggregate):
    values = torch.cat([torch.full((7,), 1.7), torch.tensor([1.0, 0.0, 5.0])])
    out = group_advantages(values, torch.tensor([0, 3, 7, 10]), eps=0.0, aggregate=aggregate, singleton="raw")
    assert torch.equal(out.advantages[:7], torch.zeros(7)) and (out.advantages[7:] != 0).all()
    assert torch.equal(out.mean[:2], torch.tensor([1.7, 1.7])) and torch.equal(out.std[:2], torch.zeros(2))
    assert out.informative.tolist() == [False, False, True]


def test_what_would_divide_by_zero_is_zero():
    out = group_advantages(torch.full((3,), 1.7), 1, singleton="raw", scale="batch", eps=0.0)
    assert torch.equal(out.advantages, torch.zeros(3))


@pytest.mark.parametrize("no_value", NO_VALUE, ids=str)
@pytest.mark.parametrize("options", [{}, {"scale": "none"}, {"scale": "batch"}, {"aggregate": "gdpo"}], ids=str)
def test_a_reward_that_is_no_number_reaches_nobody_and_gets_zero(no_value, options):
    """TRL 1.16: an inf gives its whole group 0, under scale_rewards="none" -3.4e38; verl 0.9.1: NaN."""
    clean = group_advantages(torch.tensor([1.0, 0.0, 0.0, 3.0, 1.0]), torch.tensor([0, 3, 5]), **options).advantages
    out = group_advantages(torch.tensor([1.0, no_value, 0.0, 0.0, 3.0, 1.0]), torch.tensor([0, 4, 6]), **options)
    assert torch.equal(out.advantages[[0, 2, 3, 4, 5]], clean)
    assert out.advantages[1] == 0 and out.informative.all()


@pytest.mark.parametrize("no_value", NO_VALUE, ids=str)
def test_a_component_that_is_no_number_is_skipped(no_value):
    values = torch.tensor([[1.0, 2.0], [no_value, 3.0], [0.0, 1.0]])
    assert torch.equal(group_advantages(values, 3).mean, torch.tensor([7 / 3]))
    assert all((part == 0).all() for part in group_advantages(torch.full((4, 2), no_value), 2, aggregate="gdpo"))


def test_uninformative_groups_are_decided_by_the_values_that_are_given():
    values = torch.tensor([[1.0, 0.2], [1.0, 0.7], [0.0, 0.5], [1.0, 0.5]])
    out = group_advantages(values, 2, informative_from=values[:, 0], zero_uninformative=True)
    assert out.informative.tolist() == [False, True]
    assert torch.equal(out.advantages[:2], torch.zeros(2))
    assert (out.advantages[2:] != 0).all()
    assert group_advantages(values, 2, informative_from=values[:, 1], informative_tol=0.5).informative.tolist() == [
        False,
        False,
    ]


def test_advantages_carry_no_gradient():
    assert not group_advantages(torch.randn(4, requires_grad=True), 2).advantages.requires_grad


@pytest.mark.parametrize("options", [{}, {"scale": "batch"}, {"aggregate": "gdpo"}], ids=str)
def test_nothing_comes_of_nothing(options):
    for groups, count in ((3, 0), (torch.tensor([0]), 0), (torch.tensor([0, 0, 0]), 2)):
        out = group_advantages(torch.zeros(0, 2), groups, **options)
        assert [len(part) for part in out] == [0, count, count, count] and not any(part.any() for part in out)


def test_opcheck_accepts_it_and_it_compiles_into_one_graph():
    values = rewards(3, torch.float32)
    arguments = (torch.ones(3), None, "gdpo", "mean", "group", 1, 1e-4, "add", "zero", 0.0, True)
    torch.library.opcheck(_torch_op, (values, OFFSETS, 0, *arguments))
    torch.library.opcheck(_torch_op, (values.T.contiguous().T.bfloat16(), None, 7, *arguments))
    for groups in (7, OFFSETS):
        compiled = torch.compile(
            lambda r, groups=groups: group_advantages(r, groups), fullgraph=True, backend="aot_eager"
        )
        assert all(map(torch.equal, compiled(values), group_advantages(values, groups)))


def test_wrong_offsets_that_nobody_looked_at_give_nan():
    wrong = torch.compile(lambda r, o: group_advantages(r, o), fullgraph=True, backend="aot_eager")
    for offsets in ([0, 3], [0, 3, 2, 4], [0, 70, 4], [-5, 4]):
        assert all(part.isnan().all() for part in wrong(torch.zeros(4), torch.tensor(offsets))[:3])


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (3, {}, "must divide the number of rewards 4, got 3"),
        (0, {}, "must divide the number of rewards 4, got 0"),
        (torch.tensor([0, 5]), {}, r"end at len\(rewards\) = 4, got 0 and 5"),
        (torch.tensor([0, 3, 2, 4]), {}, "must not decrease"),
        (torch.tensor([0.0, 4.0]), {}, "int32 or int64"),
        (2, {"scale": "grup"}, "scale must be one of"),
        (2, {"informative_from": torch.zeros(3)}, r"real numbers \[4\]"),
        (2, {"component_weights": torch.zeros(2)}, r"must be \[1\]"),
        (2, {"eps": -1.0}, "0 or more"),
        (2, {"backend": "cuda"}, "must be one of"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(groups, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(4), groups, **options)


@st.composite
def layouts(draw):
    number = st.floats(-1e4, 1e4, width=32)
    member = st.one_of(number, st.sampled_from([0.0, 1.0, 1.7, *NO_VALUE]))
    group = st.one_of(st.lists(member, max_size=9), st.builds(lambda v, n: [v] * n, member, st.integers(0, 300)))
    return draw(st.lists(group, max_size=6))


@settings(deadline=None, max_examples=150)
@given(
    layouts(),
    st.fixed_dictionaries({name: st.sampled_from(CHOICES[name]) for name in ("aggregate", "scale", *FLAGS)}),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_groups_of_any_kind_follow_the_reference(layout, options, dtype):
    values = torch.tensor([v for group in layout for v in group], dtype=dtype)
    compare(values, [0, *itertools.accumulate(map(len, layout))], **options)


IDS = {
    "strings": np.array(["b", "a", "b", "c", "a"], dtype=object),
    "fixed strings": np.array(["b", "a", "b", "c", "a"]),
    "objects": np.array([("q", 1), None, ("q", 1), 2.5, None], dtype=object),
    "ints": np.array([7, 2**62, 7, -3, 2**62]),
    "tensor": torch.tensor([7, 900, 7, -3, 900], dtype=torch.int32),
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_ids_of_any_kind_become_groups_in_first_seen_order(ids):
    order, offsets = groups_from_ids(ids)
    assert order.tolist() == [0, 2, 1, 4, 3] and offsets.tolist() == [0, 2, 4, 5]
    assert order.dtype == offsets.dtype == torch.int64
    order, offsets = groups_from_ids(ids[:0])
    assert order.tolist() == [] and offsets.tolist() == [0]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(-3, 3)))
def test_ints_and_objects_are_grouped_alike(ids):
    as_ints, as_objects = np.array(ids, dtype=np.int64), np.array(ids, dtype=object)
    assert all(map(torch.equal, groups_from_ids(as_ints), groups_from_ids(as_objects)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(3), "ints, strings or objects"),
        (torch.zeros(3, dtype=torch.bfloat16), "ints, strings or objects"),
        (np.zeros(3), "ints, strings or objects"),
        (np.zeros((3, 2), dtype=int), r"\(3, 2\)"),
        (["a", "b"], "got list"),
        (np.array(["a", {}, "a"], dtype=object), "hashable, got dict at index 1"),
    ],
)
def test_ids_that_cannot_be_grouped_say_why(ids, message):
    with pytest.raises(ValueError, match=message):
        groups_from_ids(ids)


@pytest.mark.parametrize("kind", ["strings", "ints"])
def test_ids_take_time_linear_in_their_number(kind):
    def seconds(n):
        ids = np.arange(n) % (n // 8)
        if kind == "strings":
            ids = np.array([f"prompt-{i}" for i in ids], dtype=object)
        best = []
        for _ in range(3):
            start = time.perf_counter()
            groups_from_ids(ids)
            best.append(time.perf_counter() - start)
        return min(best)

    assert seconds(160_000) < 40 * seconds(16_000)  # a quadratic walk would take 100 times as long


def test_ids_may_lie_in_memory_as_they_like():
    ids = np.array([5, 3, 5, 3, 9, 5])
    wanted = groups_from_ids(ids)
    frozen = ids.copy()
    frozen.flags.writeable = False
    for other in (np.repeat(ids, 2)[::2], ids.astype(">i4"), frozen, ids[::-1].copy()[::-1]):
        assert all(torch.equal(a, b) for a, b in zip(groups_from_ids(other), wanted, strict=True))


def test_a_million_ids_take_less_than_half_a_second():
    names = [f"prompt-{i}" for i in range(125_000)]
    ids = np.array(names, dtype=object)[np.random.default_rng(0).permutation(np.repeat(np.arange(125_000), 8))]
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        order, offsets = groups_from_ids(ids)
        seconds.append(time.perf_counter() - start)
    assert len(order) == 1_000_000 and len(offsets) == 125_001
    assert min(seconds) < 0.5, seconds


@pytest.mark.parametrize("ragged", [False, True])
def test_a_compiled_call_takes_any_number_of_rewards(ragged):
    def call(values, offsets):
        return group_advantages(values, offsets if ragged else 4).advantages

    torch.compiler.reset()
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch._dynamo.config.patch(recompile_limit=3):
        for groups in range(2, 12):
            values = torch.arange(4.0 * groups) % 3
            offsets = torch.arange(0, len(values) + 1, 4)
            assert torch.equal(compiled(values, offsets), call(values, offsets))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"component_weights": torch.tensor([torch.nan])}, "finite real numbers"),
        ({"informative_from": torch.zeros(4, dtype=torch.complex64)}, r"real numbers \[4\], got torch.complex64"),
        ({"groups": [0, 4]}, "an int or a tensor of offsets, got list"),
        ({"groups": 2.0}, "an int or a tensor of offsets, got float"),
    ],
)
def test_wrong_values_are_named_too(options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(4), **{"groups": 2, **options})
