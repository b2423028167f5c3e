"""PriorityIndex: what it holds, what it draws, that a sample leaves no trace, and that kernels and CPU draw the same."""

import copy
import math
import pickle
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from r1v2_fast import _native
from r1v2_fast.ops import PriorityIndex, _backend
from r1v2_fast.reference import priority_index as reference

needs_native = pytest.mark.skipif(_native.why_not("cpu") is not None, reason=str(_native.why_not("cpu")))
BACKENDS = [pytest.param("cuda", marks=needs_native), "torch"]


def index_of(priorities, **settings) -> PriorityIndex:
    values = torch.as_tensor(priorities)
    index = PriorityIndex(len(values), **settings)
    index.update(torch.arange(len(values), device=index.device), values.to(index.device))
    return index


def bits(index: PriorityIndex) -> list[torch.Tensor]:
    """Copies of all that it keeps, as integers, so that a NaN or a -0 would show."""
    arrays = [getattr(index._sums, name, None) for name in ("leaves", "powers", "sums")]
    return [a.clone().view(torch.int32 if a.dtype == torch.float32 else torch.int64) for a in arrays if a is not None]


def all_equal(a, b) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def run(program: Path, *arguments: str) -> str:
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=300)  # a lost barrier may hang
    assert done.returncode == 0 and done.stdout.startswith("drawn as the sums say"), done.stdout + done.stderr
    return done.stdout


TWIN = ("priority_index_test.cpp", "priority_index.cpp", "priority_draw.cpp", "block_sums.cpp")
KERNELS = ("priority_index.cu", "priority_draw.cu")


def test_kernels_and_cpu_make_the_same_bits_in_every_order_of_threads_and_on_every_generation(compiled):
    """The sums and draws are those of a loop over the leaves; draws one after the other pass a chi-square test."""
    emulated = compiled(*TWIN, *KERNELS, emulated=True)
    assert len({run(emulated, str(seed)) for seed in (0, 1, 2)} | {run(compiled(*TWIN))}) == 1  # one checksum


@pytest.mark.slow
def test_sanitizers_find_nothing(compiled):
    run(compiled(*TWIN, sanitize="address,undefined"))
    run(compiled(*TWIN, sanitize="thread"))
    run(compiled(*TWIN, *KERNELS, sanitize="address,undefined", emulated=True), "3")


class Model(RuleBasedStateMachine):
    """Any sequence of calls, against a dictionary."""

    @initialize(
        capacity=st.sampled_from([1, 5, 256, 257, 1000]), alpha=st.sampled_from([0.0, 0.5, 1.0, 2.0]), data=st.data()
    )
    def start(self, capacity, alpha, data):
        backend = data.draw(st.sampled_from(["cuda", "torch"] if _native.why_not("cpu") is None else ["torch"]))
        self.index, self.model = PriorityIndex(capacity, alpha=alpha, backend=backend), {}

    @rule(data=st.data())
    def update(self, data):
        where = st.integers(0, len(self.index) - 1)
        value = st.one_of(st.just(0.0), st.floats(2.0**-20, 2.0**20, width=32))
        pairs = data.draw(st.lists(st.tuples(where, value), max_size=30))
        self.index.update(torch.tensor([i for i, _ in pairs], dtype=torch.int64), torch.tensor([p for _, p in pairs]))
        self.model.update(pairs)

    @rule(share=st.floats(0, 1), seed=st.integers(0, 2**63 - 1), replacement=st.booleans())
    def sample(self, share, seed, replacement):
        positive = {i for i, p in self.model.items() if p > 0}
        k = round(share * len(positive))
        before = bits(self.index)
        out = self.index.sample(k, seed=seed, replacement=replacement)
        assert all_equal(before, bits(self.index))
        drawn = out.indices.tolist()
        assert len(drawn) == k and set(drawn) <= positive and (replacement or len(set(drawn)) == k)
        total = math.fsum(self.model[i] ** self.index.alpha for i in positive)
        shares = torch.tensor([self.model[i] ** self.index.alpha / total for i in drawn])
        torch.testing.assert_close(out.probabilities, shares, rtol=2e-7, atol=0)
        with pytest.raises(ValueError, match=rf"k = {len(positive) + 1} from {len(positive)} positive priorities"):
            self.index.sample(len(positive) + 1, seed=seed)
        assert all_equal(before, bits(self.index))

    @invariant()
    def holds_what_was_written(self):
        if not hasattr(self, "index"):
            return
        truth = torch.zeros(len(self.index))
        for i, p in self.model.items():
            truth[i] = p
        assert torch.equal(self.index.priorities, truth)
        total = math.fsum(p**self.index.alpha for p in self.model.values() if p > 0)
        assert abs(float(self.index.total) - total) <= 1e-12 * total


Model.TestCase.settings = settings(max_examples=25, stateful_step_count=12, deadline=None)
test_any_sequence_of_calls = Model.TestCase


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_of_several_priorities_for_an_index_counts(backend):
    index = PriorityIndex(4, backend=backend)
    index.update(torch.tensor([2, 0, 2, 2, 0]), torch.tensor([9.0, 5.0, 8.0, 3.0, 1.0]))
    assert index.priorities.tolist() == [1, 0, 3, 0] and float(index.total) == 4
    index.update(torch.tensor([2]), torch.tensor([-0.0]))
    assert index.priorities.tolist() == [1, 0, 0, 0] and not index.priorities.signbit().any()


@needs_native
@settings(deadline=None, max_examples=60)
@given(
    values=st.lists(st.one_of(st.just(0.0), st.floats(2.0**-10, 2.0**10, width=32)), min_size=1, max_size=700),
    share=st.floats(0, 1),
    seed=st.integers(0, 2**63 - 1),
    alpha=st.sampled_from([0.0, 0.5, 1.0, 3.0]),
    replacement=st.booleans(),
)
def test_block_sums_draw_what_the_definition_draws(values, share, seed, alpha, replacement):
    ours, truth = (index_of(values, alpha=alpha, backend=backend) for backend in ("cuda", "torch"))
    k = round(share * sum(v > 0 for v in values))
    a, b = (index.sample(k, seed=seed, replacement=replacement) for index in (ours, truth))
    assert torch.equal(a.indices, b.indices)
    torch.testing.assert_close(a.probabilities, b.probabilities, rtol=2e-7, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_a_million_draws_with_replacement_follow_the_powers(backend, alpha):
    weights = torch.tensor([1.0, 2.0, 0.0, 3.0, 0.25])
    draws = index_of(weights, alpha=alpha, backend=backend).sample(10**6, seed=5, replacement=True).indices
    exact = torch.where(weights > 0, weights.double() ** alpha, 0)
    expected = exact / exact.sum() * 10**6
    counts = torch.bincount(draws, minlength=5).double()
    assert counts[2] == 0
    assert (
        (counts - expected)[exact > 0] ** 2 / expected[exact > 0]
    ).sum() < 21.1  # 0.9999 quantile, 3 degrees of freedom


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [3.0, 6.0])
def test_ratios_of_sixty_decades_come_in_order(backend, alpha):
    """Each outweighs what is left by far more than a round has draws: one is accepted a round."""
    values = torch.tensor([10.0**e for e in range(-30, 31, 4)])
    shuffled = torch.randperm(len(values), generator=torch.Generator().manual_seed(0))
    index = index_of(values[shuffled], alpha=alpha, backend=backend)
    before = bits(index)
    out = index.sample(len(values), seed=1)
    assert torch.equal(out.indices, values[shuffled].argsort(descending=True))
    assert out.probabilities[0] == 1 and all_equal(before, bits(index))


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_positive_all_positive_and_too_many_asked_for(backend):
    index = PriorityIndex(600, backend=backend)
    assert float(index.total) == 0
    with pytest.raises(ValueError, match="cannot draw k = 1 from 0 positive priorities of 600"):
        index.sample(1, seed=0, replacement=True)
    assert index.sample(2, seed=0, replacement=True, check=False).indices.tolist() == [-1, -1]
    index.update(torch.tensor([577]), torch.tensor([1e-40]))  # subnormal
    out = index.sample(1, seed=0)
    assert out.indices.tolist() == [577] and out.probabilities.tolist() == [1]
    with pytest.raises(ValueError, match="cannot draw k = 2 from 1 positive priorities of 600"):
        index.sample(2, seed=0)
    out = index.sample(3, seed=0, check=False)
    assert out.indices.tolist() == [577, -1, -1] and out.probabilities.tolist() == [1, 0, 0]
    index.update(torch.arange(600), torch.rand(600) + 0.1)
    assert sorted(index.sample(600, seed=1).indices.tolist()) == list(range(600))
    assert index.sample(700, seed=1, check=False).indices[600:].tolist() == [-1] * 100
    assert index.sample(0, seed=1).indices.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_longer_draw_with_replacement_begins_with_the_shorter_and_seeds_differ(backend):
    index = index_of(torch.rand(300, generator=torch.Generator().manual_seed(0)), backend=backend)
    a, b = (index.sample(k, seed=4, replacement=True).indices for k in (9, 50))
    assert torch.equal(a, b[:9])
    c, d, e = (index.sample(50, seed=seed).indices for seed in (4, 4, 5))
    assert torch.equal(c, d) and not torch.equal(d, e)


def test_rounds_continue_the_stream_of_draws():
    """The reference by hand: with one heavy index the first round's repeats leave room, which draw 33 and on fill."""
    leaves = torch.tensor([1e9, 1.0, 2.0])
    first = reference.draws(reference.masses(leaves, 1.0), 0, 34, 8)
    assert set(first.tolist()) == {0}
    second = reference.draws(torch.tensor([0.0, 1.0, 2.0]).double(), 34, 33, 8)  # 1 is needed: 1 + 0 + 32 draws
    assert reference.sample(leaves, 2, 8, 1.0, False).tolist() == [0, int(second[0])]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_priorities_of_any_float_and_indices_of_both_widths(backend, dtype):
    values = torch.rand(40, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    index = PriorityIndex(40, backend=backend)
    index.update(torch.arange(40, dtype=torch.int32), values)
    assert torch.equal(index.priorities, values.float())
    index.update(torch.arange(80)[::2][:20], values[::2])  # strided
    assert torch.equal(index.priorities[:40:2], values[::2].float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("indices", "priorities", "message"),
    [
        ([0, 5], [1.0, 1.0], r"indices must lie in \[0, 5\), got 5 at position 1"),
        ([-1, 0], [1.0, 1.0], r"indices must lie in \[0, 5\), got -1 at position 0"),
        ([0, 1], [1.0, math.nan], "priorities must be 0 or more, finite .* got nan at position 1"),
        ([0, 1], [math.inf, 1.0], "got inf at position 0"),
        ([0, 1], [1.0, -2.0], "got -2.0 at position 1"),
        ([0, 1], [1.0, 1e-60], "got 1e-60 at position 1"),
        ([0, 1], [1.0, 1e60], r"got 1e\+60 at position 1"),
    ],
)
def test_a_bad_pair_is_named_before_anything_is_written(backend, indices, priorities, message):
    index = index_of([1.0, 2.0, 3.0, 4.0, 5.0], backend=backend)
    before = bits(index)
    pair = torch.tensor(indices), torch.tensor(priorities, dtype=torch.float64)
    with pytest.raises(ValueError, match=message):
        index.update(*pair)
    assert all_equal(before, bits(index))


@pytest.mark.parametrize("backend", BACKENDS)
def test_unchecked_updates_skip_bad_pairs(backend):
    index = PriorityIndex(3, backend=backend)
    indices = torch.tensor([0, 1, 2, 0, 1, -1, 3, 2**40])
    priorities = torch.tensor([7.0, 8.0, 9.0, math.nan, -1.0, 5.0, 5.0, 5.0])
    index.update(indices, priorities, check=False)
    assert index.priorities.tolist() == [7, 8, 9] and float(index.total) == 24


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda i: PriorityIndex(0), r"capacity must be an integer in \[1, 2\^48\), got 0"),
        (lambda i: PriorityIndex(4, alpha=6.5), r"alpha must lie in \[0, 6\], got 6.5"),
        (lambda i: PriorityIndex(4, alpha=math.nan), r"alpha must lie in \[0, 6\], got nan"),
        (
            lambda i: i.update(torch.tensor([[0]]), torch.tensor([[1.0]])),
            r"int32 or int64 \[n\], got torch.int64 \(1, 1\)",
        ),
        (lambda i: i.update(torch.tensor([0.0]), torch.tensor([1.0])), r"got torch.float32 \(1,\)"),
        (lambda i: i.update(torch.tensor([0]), torch.tensor([1.0, 2.0])), r"floats \(1,\) .* got torch.float32 \(2,\)"),
        (lambda i: i.update(torch.tensor([0]), torch.tensor([1])), r"floats \(1,\) .* got torch.int64 \(1,\)"),
        (lambda i: i.update(torch.tensor([0], device="meta"), torch.tensor([1.0])), "on cpu, got meta and cpu"),
        (lambda i: i.sample(-1, seed=0), "k must be an integer of 0 or more, got -1"),
        (lambda i: i.sample(1, seed=-1), r"seed must be an integer in \[0, 2\^63\), got -1"),
        (
            lambda i: i.load_state_dict({"alpha": 2.0, "priorities": torch.ones(4)}),
            "alpha must be 1.0, got a state of 2.0",
        ),
        (
            lambda i: i.load_state_dict({"alpha": 1.0, "priorities": torch.ones(5)}),
            r"torch.float32 \(4,\), got .* \(5,\)",
        ),
        (lambda i: i.load_state_dict({"alpha": 1.0, "priorities": -torch.ones(4)}), "got -1.0 at index 0"),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(PriorityIndex(4))
    with pytest.raises(ValueError, match=r"must be one of \['auto', 'cuda', 'torch'\], got 'triton'"):
        PriorityIndex(4, backend="triton")


def test_it_needs_no_native_module(monkeypatch):
    monkeypatch.setattr(_native, "module", lambda: ModuleNotFoundError("no _C"))
    assert _backend.auto("priority_index", "cpu") == "torch"
    assert index_of([0.0, 2.0]).sample(1, seed=0).indices.tolist() == [1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_state_gives_the_same_draws_again(backend, alpha):
    index = index_of(torch.rand(700, generator=torch.Generator().manual_seed(0)), alpha=alpha, backend=backend)
    state = index.state_dict()
    index.update(torch.tensor([3]), torch.tensor([5.0]))
    assert state["priorities"][3] != 5, "a state is a copy"
    state = index.state_dict()
    other = PriorityIndex(700, alpha=alpha, backend=backend)
    other.load_state_dict(state)
    assert all_equal(bits(index), bits(other))
    assert torch.equal(index.sample(99, seed=2).indices, other.sample(99, seed=2).indices)


@needs_native
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_any_number_of_threads_keeps_and_draws_the_same_bits(alpha):
    generator = torch.Generator().manual_seed(0)
    values, indices = torch.rand(300_000, generator=generator), torch.randint(300_000, (50_000,), generator=generator)
    results = []
    for threads in (1, 2, 5):
        index = PriorityIndex(300_000, alpha=alpha)
        index._sums.threads = threads
        index.load_state_dict({"alpha": alpha, "priorities": values})
        index.update(indices, values[:50_000])
        drawn = index.sample(40_000, seed=1)
        results.append(
            [*bits(index), drawn.indices, drawn.probabilities, index.sample(40_000, seed=1, replacement=True).indices]
        )
    assert all_equal(results[0], results[1]) and all_equal(results[0], results[2])


@needs_native
def test_an_index_beyond_two_to_the_24_reaches_its_last_leaf():
    capacity = (1 << 24) + 1
    index = PriorityIndex(capacity)
    index.update(torch.tensor([capacity - 1, 0, 1 << 23]), torch.tensor([1.0, 1.0, 2.0]))
    assert sorted(index.sample(3, seed=0).indices.tolist()) == [0, 1 << 23, capacity - 1]
    share = (index.sample(4000, seed=1, replacement=True).indices == capacity - 1).double().mean()
    assert abs(float(share) - 0.25) < 0.03
    index.update(torch.tensor([capacity - 1]), torch.tensor([0.0]))
    assert set(index.sample(100, seed=1, replacement=True).indices.tolist()) == {0, 1 << 23}


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_take_turns(backend):
    """While some sample, which drops leaves for a moment, and others update, nobody sees a dropped leaf."""
    values = torch.tensor([1e6, *([1.0] * 63)])  # the heavy one is dropped in a second round
    index = index_of(values, backend=backend)
    failures = []

    def sample(seed):
        for turn in range(60):
            if index.sample(8, seed=seed * 1000 + turn).indices.unique().numel() != 8:
                failures.append("a repeat")
            if not (index.priorities > 0).all():
                failures.append("a dropped leaf")

    def update():
        for turn in range(60):
            index.update(torch.tensor([turn % 63 + 1]), torch.tensor([1.0]))

    threads = [threading.Thread(target=sample, args=(s,)) for s in range(3)] + [threading.Thread(target=update)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and all_equal(bits(index), bits(index_of(values, backend=backend)))


@pytest.mark.gpu
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_a_gpu_keeps_and_draws_the_cpus_bits(alpha):
    generator = torch.Generator().manual_seed(0)
    values, indices = (
        torch.rand(300_000, generator=generator) ** 9,
        torch.randint(300_000, (5000,), generator=generator),
    )
    results = []
    for device in ("cpu", "cuda"):
        index = PriorityIndex(300_000, alpha=alpha, device=device, backend="cuda")
        index.load_state_dict({"alpha": alpha, "priorities": values.to(device)})
        index.update(indices.to(device), values[:5000].to(device))
        samples = [index.sample(4096, seed=1, replacement=replacement) for replacement in (False, True)]
        skew = index_of([1e30, 1e-30, 0.0, 1.0], device=device).sample(3, seed=2)
        results.append([t.cpu() for t in (*bits(index), *samples[0], *samples[1], *skew)])
    assert all_equal(*results)


@pytest.mark.gpu
def test_a_cuda_graph_captures_updates_and_samples():
    index = index_of(torch.rand(5000), device="cuda")
    indices, priorities = torch.arange(5, device="cuda"), torch.zeros(5, device="cuda")
    index.update(indices, priorities, check=False), index.sample(64, seed=1, check=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        index.update(indices, priorities, check=False)
        drawn = index.sample(64, seed=1, check=False)
    priorities.fill_(1e9)
    graph.replay()
    assert torch.equal(drawn.indices, index.sample(64, seed=1).indices)
    assert set(range(5)) <= set(drawn.indices.tolist())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_copy_is_whole_and_its_own(backend):
    index = index_of(torch.rand(300), alpha=0.5, backend=backend)
    for other in (copy.deepcopy(index), pickle.loads(pickle.dumps(index))):
        assert all_equal(bits(index), bits(other))
        other.update(torch.tensor([7]), torch.tensor([100.0]))
        assert index.priorities[7] < 1 and other.priorities[7] == 100
        assert not torch.equal(index.sample(50, seed=3).probabilities, other.sample(50, seed=3).probabilities)
