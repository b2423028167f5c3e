"""sample_by_priority: the random stream, the distribution, the errors."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from r1v2_fast import _native
from r1v2_fast.ops.priority_sample import _op, sample_by_priority
from r1v2_fast.reference import priority_sample as reference

BACKENDS = ["torch"] + ["cuda"] * (_native.why_not("cpu") is None)


def test_philox_gives_the_published_words():
    zero, ones = torch.zeros(1, dtype=torch.int64), torch.full((1,), 0xFFFFFFFF)
    words = [f"{int(w):08x}" for w in reference.philox_rounds([zero] * 4, [0, 0])]
    assert words == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    words = [f"{int(w):08x}" for w in reference.philox_rounds([ones] * 4, [0xFFFFFFFF] * 2)]
    assert words == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]


def test_draws_without_replacement_follow_sequential_weighted_sampling():
    weights, draws = [1.0, 2.0, 3.0, 0.0, 4.0], 4000
    counts: dict = {}
    for seed in range(draws):
        pair = tuple(sample_by_priority(torch.tensor(weights), 2, seed=seed).indices.tolist())
        counts[pair] = counts.get(pair, 0) + 1
    total, chi_square, cells = sum(weights), 0.0, 0
    for a, b in itertools.permutations([0, 1, 2, 4], 2):
        expected = draws * weights[a] / total * weights[b] / (total - weights[a])
        chi_square += (counts.pop((a, b), 0) - expected) ** 2 / expected
        cells += 1
    assert not counts, "index 3 has no weight"
    assert chi_square < 31.3  # 0.999 quantile at 11 degrees of freedom
    assert cells == 12


def test_draws_with_replacement_follow_the_powered_priorities():
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0])
    out = sample_by_priority(weights, 20000, seed=5, alpha=2.0, replacement=True)
    share = torch.bincount(out.indices, minlength=4).double() / 20000
    exact = weights.double() ** 2 / 14
    spread = (exact * (1 - exact) / 20000).sqrt()
    assert (share[2] == 0) and ((share - exact).abs() <= 4 * spread).all()
    assert torch.equal(out.probabilities, exact[out.indices].float())


def test_the_same_seed_draws_the_same_and_another_does_not():
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    a, b, c = (sample_by_priority(weights, 50, seed=s).indices for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert len(set(a.tolist())) == 50


def test_a_longer_draw_begins_with_the_shorter_one():
    weights = torch.rand(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(
        sample_by_priority(weights, 9, seed=3).indices[:4], sample_by_priority(weights, 4, seed=3).indices
    )


def test_tiny_and_huge_priorities_keep_their_order_of_magnitude():
    weights = torch.tensor([1e-38, 1.0, 1e38])
    first = [sample_by_priority(weights, 1, seed=s).indices.item() for s in range(200)]
    assert set(first) == {2}


@pytest.mark.parametrize(
    ("priorities", "k", "message"),
    [
        ([1.0, float("nan")], 1, "got nan at index 1"),
        ([1.0, float("inf")], 1, "got inf at index 1"),
        ([-1.0, 1.0], 1, "got -1.0 at index 0"),
        ([1.0, 0.0], 2, "k = 2 from 1 positive priorities of 2"),
        ([0.0, 0.0], 1, "k = 1 from 0 positive"),
    ],
)
def test_bad_priorities_are_named(priorities, k, message):
    with pytest.raises(ValueError, match=message):
        sample_by_priority(torch.tensor(priorities), k, seed=0)


def test_alpha_has_a_range():
    for alpha in (-0.1, 1000.5, float("nan")):
        with pytest.raises(ValueError, match=r"alpha must lie in \[0, 1000\], got"):
            sample_by_priority(torch.ones(3), 1, seed=0, alpha=alpha)


def test_whole_numbers_are_asked_for():
    for k in (3.0, -1, True, "3", None):
        with pytest.raises(ValueError, match="k must be an integer of 0 or more, got"):
            sample_by_priority(torch.ones(3), k, seed=0)
    for seed in (5.0, -1, 2**63):
        with pytest.raises(ValueError, match=r"seed must be an integer in \[0, 2\^63\), got"):
            sample_by_priority(torch.ones(3), 1, seed=seed)
    expected = sample_by_priority(torch.ones(3), 2, seed=5).indices
    assert torch.equal(sample_by_priority(torch.ones(3), np.int64(2), seed=np.uint32(5)).indices, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_ratios_come_in_their_order(alpha, dtype, backend):
    values = (10.0 ** torch.linspace(-30, 30, 61, dtype=torch.float64)).to(dtype)
    ours = sample_by_priority(values, 61, seed=11, alpha=alpha, backend=backend)
    keys = reference.race_keys(values, 11, alpha)
    assert torch.equal(ours.indices, keys.argsort(stable=True))
    if alpha >= 2:  # a hundredfold a step: hardly any two change places
        assert (ours.indices.flip(0) - torch.arange(61)).abs().max() <= 2
    assert ours.probabilities.isfinite().all() and abs(ours.probabilities.double().sum().item() - 1) < 1e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_one_and_more_than_there_are(backend):
    values = torch.rand(1000, generator=torch.Generator().manual_seed(3))
    assert sample_by_priority(values, 1000, seed=1, backend=backend).indices.sort().values.tolist() == list(range(1000))
    one = torch.zeros(1000)
    one[777] = 1e-40
    assert sample_by_priority(one, 1, seed=1, backend=backend).indices.tolist() == [777]
    with pytest.raises(ValueError, match="cannot draw k = 2 from 1 positive priorities of 1000"):
        sample_by_priority(one, 2, seed=1, backend=backend)
    assert sample_by_priority(one, 2, seed=1, replacement=True, backend=backend).indices.tolist() == [777, 777]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_a_million_draws_from_many_are_distributed_as_they_should_be(alpha):
    """2^20 priorities: ten draws of 10^5 without replacement, one of 10^6 with, over 50 bins of the priority."""
    values = torch.rand(1 << 20, generator=torch.Generator().manual_seed(4))
    mass = values.double() ** alpha
    bins = (values * 50).long()

    def chi_square(counts, expected):
        return (((counts - expected) ** 2) / expected).sum().item()

    total = lambda weights: torch.bincount(bins, weights, minlength=50)  # noqa: E731
    time = 0.1 * len(values) / mass.sum()
    for _ in range(50):  # the time by which 10^5 have come, in the mean: Newton's
        left = (-time * mass).exp()
        time += (100_000 - (1 - left).sum()) / (mass * left).sum()
    inclusion = total(1 - (-time * mass).exp())
    counts = torch.zeros(50, dtype=torch.float64)
    for seed in range(10):
        drawn = sample_by_priority(values, 100_000, seed=seed, alpha=alpha).indices
        counts += torch.bincount(bins[drawn], minlength=50)
    assert 15 < chi_square(counts, 10 * inclusion) < 90  # df 49, and less spread than a multinomial's: 0.9997 below 90
    drawn = sample_by_priority(values, 1_000_000, seed=99, alpha=alpha, replacement=True).indices
    assert 18 < chi_square(torch.bincount(bins[drawn], minlength=50), 1_000_000 * total(mass) / mass.sum()) < 90


def test_unchecked_draws_mark_what_cannot_be_drawn():
    out = sample_by_priority(torch.tensor([0.0, 2.0]), 3, seed=0, check=False)
    assert out.indices.tolist() == [1, -1, -1] and out.probabilities.tolist() == [1.0, 0.0, 0.0]


def test_opcheck_accepts_it_and_it_compiles_into_one_graph():
    weights = torch.rand(20, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(_op, (weights, 3, 1, 1.0, False))
    compiled = torch.compile(
        lambda w: sample_by_priority(w, 3, seed=1, check=False).indices, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(weights), sample_by_priority(weights, 3, seed=1).indices)


@settings(deadline=None, max_examples=50)
@given(
    priorities=st.lists(st.floats(0, 2.0**99, width=32), min_size=1, max_size=40),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    alpha=st.floats(0, 3),
)
def test_any_draw_is_distinct_positive_and_the_smallest_keys(priorities, share, seed, alpha):
    values = torch.tensor(priorities)
    k = int(share * int((values > 0).sum()))
    out = sample_by_priority(values, k, seed=seed, alpha=alpha)
    assert len(set(out.indices.tolist())) == k and bool((values[out.indices] > 0).all())
    keys = reference.race_keys(values, seed, alpha)
    assert torch.equal(keys[out.indices], keys.sort().values[:k])
