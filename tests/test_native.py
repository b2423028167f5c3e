"""`_C`: its numbers against the reference, its reasons, and that it carries its own runtime."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from r1v2_fast import _native
from r1v2_fast.ops.priority_sample import _native_op, sample_by_priority
from r1v2_fast.reference import priority_sample as reference

ROOT = Path(__file__).resolve().parent.parent
needs_native = pytest.mark.skipif(_native.why_not("cpu") is not None, reason=str(_native.why_not("cpu")))


def priorities(dtype):
    values = torch.rand(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 8
    values[::7] = 0
    return values.to(dtype)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("seed", "alpha"), [(0, 1.0), (2**63 - 1, 0.6), (17, 0.0)])
def test_the_cpu_twin_makes_the_references_keys(dtype, seed, alpha):
    values = priorities(dtype)
    ours, truth = _native.race_keys(values, seed, alpha), reference.race_keys(values, seed, alpha)
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert (ours - truth)[finite].abs().max() <= 1e-10 * truth[finite].abs().max()
    ours, truth = (sample_by_priority(values, 300, seed=seed, alpha=alpha, backend=b) for b in ("cuda", "torch"))
    assert torch.equal(ours.indices, truth.indices) and torch.equal(ours.probabilities, truth.probabilities)


@needs_native
def test_strided_short_and_unusable_input():
    wide = torch.rand(40, 3)
    column = wide[:, 1]
    a, b = (sample_by_priority(v, 5, seed=1, backend="cuda") for v in (column, column.contiguous()))
    assert torch.equal(a.indices, b.indices)
    assert sample_by_priority(torch.zeros(0), 0, seed=1, backend="cuda").indices.shape == (0,)
    unusable = torch.tensor([torch.nan, -1.0, torch.inf, 2.0])
    assert sample_by_priority(unusable, 3, seed=1, check=False, backend="cuda").indices.tolist() == [3, -1, -1]
    torch.library.opcheck(_native_op, (torch.rand(9), 4, 1, 1.0, False))
    with pytest.raises(RuntimeError, match="without replacement only; use backend='torch'"):
        sample_by_priority(column, 5, seed=1, replacement=True, backend="cuda")


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
def test_the_cpu_twin_is_what_auto_takes_because_it_is_faster():
    values, seconds = torch.rand(200_000), {"cuda": [], "torch": []}
    for _ in range(5):
        for backend, times in seconds.items():
            start = time.perf_counter()
            sample_by_priority(values, 64, seed=0, backend=backend)
            times.append(time.perf_counter() - start)
    assert min(seconds["cuda"]) < min(seconds["torch"])  # the least: others may be at work on the machine


@needs_native
def test_it_needs_no_library_that_a_bare_machine_lacks():
    native = _native.module()
    text = subprocess.run(["ldd", native.__file__], capture_output=True, text=True, check=True).stdout
    for library in ("libcudart", "libstdc++", "libgcc_s", "libtorch", "libcuda.so"):
        assert library not in text


@needs_native
def test_its_cuda_kernels_spill_nothing():
    triton = pytest.importorskip("triton")
    architectures = _native.module().cuda_architectures.split()
    if not architectures:
        pytest.skip("built without CUDA")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", _native.module().__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = re.findall(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert len(kernels) == 2 * len(architectures)
    assert set(kernels) == {("0", "0")}


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


def build(folder, **environment):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", folder]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **path, **environment})


def test_a_build_that_cannot_have_what_was_asked_for_says_so(tmp_path):
    nowhere = build(tmp_path, R1V2_FAST_CUDA="1", CUDA_HOME=str(tmp_path))
    assert nowhere.returncode and "R1V2_FAST_CUDA=1, but nvcc was not found; install the CUDA toolkit" in nowhere.stderr
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    assert "does not run" in build(tmp_path, R1V2_FAST_CUDA="1", CUDA_HOME=str(tmp_path)).stderr
    broken.write_text("#!/bin/sh\nexit 0\n")
    named = build(tmp_path, R1V2_FAST_CUDA="1", CUDA_HOME=str(tmp_path), R1V2_FAST_ARCHS="hopper")
    assert "R1V2_FAST_ARCHS must list" in named.stderr
    assert "must be auto, 1 or 0, got 'yes'" in build(tmp_path, R1V2_FAST_CUDA="yes").stderr
    without = build(tmp_path, CXX="no-such-compiler")
    assert without.returncode == 0 and "going on without _C" in without.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_gpu_makes_the_cpus_keys(dtype):
    values = priorities(dtype)
    ours, truth = _native.race_keys(values.cuda(), 3, 0.7).cpu(), reference.race_keys(values, 3, 0.7)
    finite = truth.isfinite()
    assert torch.equal(ours.isfinite(), finite)
    assert (ours - truth)[finite].abs().max() <= 1e-10 * truth[finite].abs().max()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        drawn = sample_by_priority(values.cuda(), 100, seed=3, backend="cuda").indices
    stream.synchronize()
    assert torch.equal(drawn.cpu(), sample_by_priority(values, 100, seed=3, backend="torch").indices)
