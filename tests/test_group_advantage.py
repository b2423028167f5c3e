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


def rewards(components, dtype):
    g = torch.Generator().manual_seed(components)
    values = torch.randint(0, 3, (14, components), generator=g).to(dtype)
    values[4:9] = 1.7
    values[10, 0] = torch.nan
    values[2] = torch.nan
    return values


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("components", [1, 3])
@pytest.mark.parametrize("aggregate", CHOICES["aggregate"])
@pytest.mark.parametrize("scale", CHOICES["scale"])
def test_every_mode_follows_the_reference(dtype, components, aggregate, scale):
    values = rewards(components, dtype)
    weights = torch.linspace(0.5, 1.5, components, dtype=dtype)
    names = ("baseline", "correction", "eps_mode", "singleton")
    for choice in itertools.product(*(CHOICES[name] for name in names), (False, True)):
        options = dict(zip((*names, "zero_uninformative"), choice, strict=True))
        options |= {"aggregate": aggregate, "scale": scale, "component_weights": weights}
        ours = group_advantages(values, OFFSETS, **options)
        truth = reference.group_advantages(values, OFFSETS.tolist(), **options)
        for value, exact in zip(ours[:3], truth[:3], strict=True):
            assert_as_accurate(value, exact.to(dtype), exact)
        assert torch.equal(ours.informative, truth[3])


def test_equal_rewards_give_exactly_zero_whatever_eps_is():
    out = group_advantages(torch.full((7,), 1.7), torch.tensor([0, 3, 7]), eps=0.0)
    assert torch.equal(out.advantages, torch.zeros(7))
    assert not out.informative.any()


def test_a_nan_reward_leaves_its_group_alone():
    clean = group_advantages(torch.tensor([1.0, 0.0, 0.0]), 3).advantages
    out = group_advantages(torch.tensor([1.0, torch.nan, 0.0, 0.0]), 4).advantages
    assert torch.equal(out[[0, 2, 3]], clean)
    assert out[1] == 0


def test_uninformative_groups_are_decided_by_the_values_that_are_given():
    values = torch.tensor([[1.0, 0.2], [1.0, 0.7], [0.0, 0.5], [1.0, 0.5]])
    out = group_advantages(values, 2, informative_from=values[:, 0], zero_uninformative=True)
    assert out.informative.tolist() == [False, True]
    assert torch.equal(out.advantages[:2], torch.zeros(2))
    assert (out.advantages[2:] != 0).all()


def test_advantages_carry_no_gradient():
    assert not group_advantages(torch.randn(4, requires_grad=True), 2).advantages.requires_grad


def test_opcheck_accepts_it_and_it_compiles_into_one_graph():
    values = rewards(3, torch.float32)
    arguments = (torch.ones(3), None, "gdpo", "mean", "group", 1, 1e-4, "add", "zero", 0.0, True)
    torch.library.opcheck(_torch_op, (values, OFFSETS, *arguments))
    torch.library.opcheck(_torch_op, (values.T.contiguous().T, OFFSETS, *arguments))
    compiled = torch.compile(lambda r: group_advantages(r, 7).advantages, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(values), group_advantages(values, 7).advantages)


@pytest.mark.parametrize(
    ("groups", "options", "message"),
    [
        (3, {}, "must divide the number of rewards 4, got 3"),
        (torch.tensor([0, 5]), {}, r"end at len\(rewards\) = 4, got 0 and 5"),
        (torch.tensor([0, 3, 2, 4]), {}, "must not decrease"),
        (2, {"scale": "grup"}, "scale must be one of"),
        (2, {"informative_from": torch.zeros(3)}, r"must be \[4\]"),
        (2, {"backend": "cuda"}, "must be one of"),
    ],
)
def test_wrong_arguments_say_what_was_expected_and_what_came(groups, options, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(4), groups, **options)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), min_size=1, max_size=6))
def test_groups_of_any_sizes_follow_the_relative_rule(groups):
    values = torch.tensor([v for group in groups for v in group], dtype=torch.float64)
    offsets = torch.tensor([0, *itertools.accumulate(map(len, groups))])
    truth = reference.group_advantages(values, offsets.tolist())
    ours = group_advantages(values, offsets)
    assert_as_accurate(ours.advantages, truth[0], truth[0])


def test_ids_of_any_kind_become_groups_in_first_seen_order():
    ids = np.array(["b", "a", "b", "c", "a"], dtype=object)
    order, offsets = groups_from_ids(ids)
    assert ids[order.numpy()].tolist() == ["b", "b", "a", "a", "c"]
    assert order.tolist() == [0, 2, 1, 4, 3] and offsets.tolist() == [0, 2, 4, 5]
    order, offsets = groups_from_ids(torch.tensor([7, 7, 3]))
    assert order.tolist() == [0, 1, 2] and offsets.tolist() == [0, 2, 3]
    with pytest.raises(ValueError, match="int"):
        groups_from_ids(torch.zeros(3))


def test_ids_take_time_linear_in_their_number():
    def seconds(n):
        ids = np.array([f"prompt-{i % (n // 8)}" for i in range(n)], dtype=object)
        best = []
        for _ in range(3):
            start = time.perf_counter()
            groups_from_ids(ids)
            best.append(time.perf_counter() - start)
        return min(best)

    assert seconds(160_000) < 40 * seconds(16_000)  # a quadratic walk would take 100 times as long
