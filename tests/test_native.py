"""`_C` on tensors: its sampler against the reference, its reasons, and what is done without it."""

import subprocess
import sys
import threading
import time

import pytest
import torch

from r1v2_fast import _native
from r1v2_fast.ops.priority_sample import _native_op, sample_by_priority
from r1v2_fast.reference import priority_sample as reference

needs_native = pytest.mark.skipif(_native.why_not("cpu") is not None, reason=str(_native.why_not("cpu")))


def priorities(dtype, count=5000):
    values = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    values[::7] = 0
    return values.to(dtype)


def assert_same_draw(ours, values, k, seed, alpha):
    """The reference's draw, but where two neighbouring keys lie within 1e-6 of each other."""
    keys = reference.race_keys(values.cpu(), seed, alpha)
    expected, got = keys.sort().values[:k], keys[ours.indices.cpu()]
    assert len(set(ours.indices.tolist())) == k
    assert ((expected - got).abs() <= 1e-6 * expected.abs()).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("seed", "alpha"), [(0, 1.0), (2**63 - 1, 0.6), (17, 0.0), (5, 30.0)])
def test_the_cpu_twin_draws_as_the_reference_does(dtype, seed, alpha):
    values = priorities(dtype)
    ours, truth = _native.race_keys(values, seed, alpha), reference.race_keys(values, seed, alpha)
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert (ours - truth)[finite].abs().max() <= 1e-14 * truth[finite].abs().max()
    ours, truth = (sample_by_priority(values, 300, seed=seed, alpha=alpha, backend=b) for b in ("cuda", "torch"))
    assert_same_draw(ours, values, 300, seed, alpha)
    assert torch.equal(ours.indices, truth.indices)  # no such neighbours here
    assert ours.probabilities.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    ulp = torch.finfo(ours.probabilities.dtype).eps * truth.probabilities.max()
    wide = 1e-12 * truth.probabilities.max() if dtype == torch.float64 else 0  # p^alpha from a logarithm of 53 bits
    assert (ours.probabilities - truth.probabilities).abs().max() <= ulp + wide


@needs_native
@pytest.mark.parametrize("count", [(1 << 24) + 1, 50_000_000])
def test_there_is_no_limit_of_2_to_the_24(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(1))
    values[-1] = 1e9  # beyond 2^24, and certain to come
    ours = sample_by_priority(values, 200, seed=5, backend="cuda")
    keys = _native.race_keys(values, 5, 1.0)
    assert torch.equal(ours.indices, keys.topk(200, largest=False).indices) and count - 1 in ours.indices
    if count == (1 << 24) + 1:
        last = slice(count - 1000, count)
        error = (keys[last] - reference.race_keys(values, 5, 1.0)[last]).abs().max()
        assert error <= 1e-14 * keys[last].abs().max()
    share = values[ours.indices].double() / values.double().sum()
    assert (ours.probabilities - share).abs().max() <= 1.2e-7 * share.max()


@needs_native
@pytest.mark.parametrize("replacement", [False, True])
def test_strided_short_and_unusable_input(replacement):
    draw = lambda values, k, **options: sample_by_priority(  # noqa: E731
        values, k, seed=1, replacement=replacement, backend="cuda", **options
    )
    column = torch.rand(40, 3)[:, 1]
    assert torch.equal(draw(column, 5).indices, draw(column.contiguous(), 5).indices)
    assert draw(torch.zeros(0), 0).indices.shape == (0,)
    assert draw(torch.zeros(0), 2, check=False).indices.tolist() == [-1, -1]
    unusable = torch.tensor([torch.nan, -1.0, torch.inf, 2.0])
    assert draw(unusable, 3, check=False).indices.tolist() == ([3, 3, 3] if replacement else [3, -1, -1])
    torch.library.opcheck(_native_op, (torch.rand(9), 4, 1, 1.0, replacement))


@needs_native
def test_it_compiles_into_one_graph():
    compiled = torch.compile(
        lambda p: sample_by_priority(p, 4, seed=1, check=False, backend="cuda").indices,
        fullgraph=True,
        backend="aot_eager",
    )
    values = torch.rand(9)
    assert torch.equal(compiled(values), sample_by_priority(values, 4, seed=1).indices)


@needs_native
@pytest.mark.parametrize("alpha", [1.0, 0.6])
@pytest.mark.parametrize("draw", [_native.priority_sample, _native.priority_draw])
def test_any_number_of_threads_draws_the_same(draw, alpha):
    values = priorities(torch.float32, 1 << 18)
    one, two, five = (draw(values, 3000, 7, alpha, threads=threads) for threads in (1, 2, 5))
    for other in (two, five):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@needs_native
def test_python_threads_draw_at_once():
    values, found = priorities(torch.float32, 1 << 17), {}

    def draw(seed):
        found[seed] = sample_by_priority(values, 100, seed=seed, backend="cuda").indices

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, indices in found.items():
        assert torch.equal(indices, sample_by_priority(values, 100, seed=seed, backend="cuda").indices)
    assert len(found) == 8


@needs_native
@pytest.mark.slow
def test_it_is_five_times_faster_than_the_race_in_pytorch():
    values, k = torch.rand((1 << 24) + 1), 4096
    seconds = {"ours": [], "race": []}
    for _ in range(5):
        for name, run in {
            "ours": lambda: sample_by_priority(values, k, seed=0),
            "race": lambda: torch.empty_like(values).exponential_().div_(values).topk(k, largest=False),
        }.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    assert 5 * min(seconds["ours"]) < min(seconds["race"])  # the least: others may be at work on the machine


def reason(architectures, runtime, driver, capability=(9, 0)):
    return _native.cuda_why_not(architectures.split(), runtime, driver, lambda: capability)


def test_every_obstacle_to_cuda_has_its_sentence():
    assert "built without CUDA" in reason("", 0, 0)
    assert "needs driver 580 or newer; no driver was found" in reason("80", 13000, 0)
    assert "CUDA 12.8, which needs driver 525 or newer; the driver here serves CUDA 11.4" in reason("80", 12080, 11040)
    assert "this GPU is sm_75; reinstall with R1V2_FAST_ARCHS=75" in reason("80 90a 100 120", 13000, 13000, (7, 5))
    assert "this GPU is sm_110" in reason("80 90a 100 120", 13000, 13000, (11, 0))


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0), (12, 1), (13, 0)])
def test_cards_that_the_build_covers_have_none(capability):
    assert reason("80 90a 100 120", 13000, 13010, capability) is None
    assert reason("80 90a 100 120", 12080, 13000, capability) is None


def test_without_the_extension_torch_takes_over_and_doctor_says_why():
    code = (
        "import sys; sys.modules['r1v2_fast._C'] = None\n"
        "import torch\n"
        "from r1v2_fast import doctor, ops\n"
        "print(ops.sample_by_priority(torch.ones(3), 3, seed=0).indices.sort().values.tolist())\n"
        "sys.exit(doctor.run(['cuda']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "[0, 1, 2]" in done.stdout
    assert "_C is not built; reinstall where a C++17 compiler" in done.stdout
    assert "required backend 'cuda' cannot run any op here" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("alpha", [1.0, 0.7])
@pytest.mark.parametrize(("count", "k"), [(1, 1), (5000, 300), (5000, 4285), (100_003, 4096), ((1 << 24) + 1, 4096)])
@pytest.mark.parametrize("replacement", [False, True])
def test_the_gpu_draws_as_the_cpu_does(dtype, alpha, count, k, replacement):
    values = priorities(dtype, count) + (0.5 if count == 1 else 0)
    if count < 1 << 20:
        assert torch.equal(_native.race_keys(values.cuda(), 3, alpha).cpu(), _native.race_keys(values, 3, alpha))
    ours, truth = (
        sample_by_priority(v, k, seed=3, alpha=alpha, replacement=replacement, backend="cuda")
        for v in (values.cuda(), values)
    )
    assert torch.equal(ours.indices.cpu(), truth.indices)
    ulp = torch.finfo(truth.probabilities.dtype).eps * truth.probabilities.max()
    wide = 1e-12 * truth.probabilities.max() if dtype == torch.float64 else 0
    assert (ours.probabilities.cpu() - truth.probabilities).abs().max() <= ulp + wide


@pytest.mark.gpu
@pytest.mark.parametrize("replacement", [False, True])
def test_on_the_gpu_it_keeps_to_streams_graphs_and_alignment(replacement):
    values = priorities(torch.float32, 70_001).cuda()

    def draw(v):
        return sample_by_priority(v, 500, seed=9, replacement=replacement, check=False, backend="cuda").indices

    expected = draw(values)
    shifted = torch.cat((values[:1], values))[1:]
    assert shifted.data_ptr() % 16 and torch.equal(draw(shifted), expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        assert torch.equal(draw(values), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = draw(values)
    values.copy_(values.flip(0).clone())
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(captured, draw(values)) and not torch.equal(captured, expected)
