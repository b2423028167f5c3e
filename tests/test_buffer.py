"""SelectiveSampleBuffer against a written-out simulation, and its promises."""

import pytest
import torch

from bench.ssb_simulation import Simulation
from r1v2_fast.buffer import SelectiveSampleBuffer


@pytest.mark.parametrize("granularity", ["group", "sample"])
@pytest.mark.parametrize("max_staleness", [None, 2])
@pytest.mark.parametrize("capacity", [1, 5, 100])
def test_it_does_what_the_written_out_simulation_does(granularity, max_staleness, capacity):
    g = torch.Generator().manual_seed(3)
    settings = {"granularity": granularity, "alpha": 0.7, "max_staleness": max_staleness, "seed": 4}
    buffer, simulation = SelectiveSampleBuffer(capacity, **settings), Simulation(capacity, **settings)
    count, drawn_at_all = 0, 0
    for step in range(25):
        fresh = int(torch.randint(0, 5, (1,), generator=g))
        drawn = buffer.fill(4, fresh, step)
        assert [[s["id"] for s in unit.samples] for unit in drawn] == [
            u.samples for u in simulation.fill(4, fresh, step)
        ]
        drawn_at_all += len(drawn)
        sizes = torch.randint(1, 4, (3,), generator=g)
        offsets = [0, *sizes.cumsum(0).tolist()]
        ids = list(range(count, count := count + offsets[-1]))
        advantages = torch.randint(-2, 3, (offsets[-1],), generator=g).double()
        buffer.push([{"id": i} for i in ids], advantages, torch.tensor(offsets), step)
        simulation.push(ids, advantages.tolist(), offsets, step)
        assert len(buffer) == len(simulation.held)
    assert drawn_at_all > 0


def filled(seed=0, capacity=10):
    buffer = SelectiveSampleBuffer(capacity, seed=seed)
    for step in range(4):
        samples = [{"tokens": torch.arange(step + 1), "key": f"k{step}", "ids": [step, 2]} for _ in range(2)]
        buffer.push(samples, torch.tensor([1.0 + step, -1.0]), torch.tensor([0, 2]), step)
    return buffer


def test_only_the_deficit_is_drawn():
    assert [len(filled().fill(3, fresh, 9)) for fresh in (0, 1, 3, 5)] == [3, 2, 0, 0]
    assert len(filled().fill(50, 0, 9)) == 4


def test_draws_follow_the_mean_advantage():
    counts = torch.zeros(4)
    for step in range(3000):
        (unit,) = filled().fill(1, 0, step)
        counts[unit.step] += 1
    exact = torch.tensor([1.0, 1.5, 2.0, 2.5]) / 7.0
    assert (((counts - 3000 * exact) ** 2) / (3000 * exact)).sum() < 16.3  # 0.999 quantile, 3 degrees of freedom


def test_a_restored_buffer_draws_the_same_and_holds_the_same():
    buffer, other = filled(), SelectiveSampleBuffer(10, seed=0)
    state = buffer.state_dict()
    other.load_state_dict(state)
    for a, b in zip(buffer.fill(3, 0, 7), other.fill(3, 0, 7), strict=True):
        assert a.step == b.step and torch.equal(a.advantages, b.advantages)
        for left, right in zip(a.samples, b.samples, strict=True):
            assert torch.equal(left["tokens"], right["tokens"])
            assert (left["key"], left["ids"]) == (right["key"], right["ids"])
    assert buffer.stats() == other.stats()
    assert all(isinstance(v, torch.Tensor) for k, v in state.items() if k != "meta")


def test_uninformative_groups_stay_out_and_an_empty_buffer_draws_nothing():
    buffer = SelectiveSampleBuffer(4)
    buffer.push([{}, {}], torch.zeros(2), torch.tensor([0, 2]), 0)
    assert len(buffer) == 0 and buffer.fill(3, 0, 1) == []


def test_stats_tell_the_share_with_and_without_the_buffer():
    buffer = filled()
    buffer.fill(8, 2, 5)
    stats = buffer.stats()
    assert stats["effective_share_without"] == 0.25 and stats["effective_share"] == 0.75
    assert stats["staleness_max"] == 5


@pytest.mark.parametrize(
    ("samples", "advantages", "message"),
    [
        ([{}], torch.ones(2), "expected 1 advantages"),
        ([{}], torch.tensor([float("nan")]), "got nan for sample 0"),
        ([{"x": object()}], torch.ones(1), "sample 0, field 'x'"),
    ],
)
def test_what_cannot_be_kept_is_named(samples, advantages, message):
    with pytest.raises(ValueError, match=message):
        SelectiveSampleBuffer(2).push(samples, advantages, torch.tensor([0, len(samples)]), 0)
