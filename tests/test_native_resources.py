"""What the CUDA kernels take: nothing spills, and the committed table says the rest."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "tests" / "native_checks" / "resources.py"
BUILD = runpy.run_path(str(ROOT / "setup.py"), run_name="build")
RESOURCES = runpy.run_path(str(SCRIPT), run_name="resources")


def found_nvcc():
    try:
        return BUILD["find_nvcc"]()[0]
    except BUILD["Lacking"]:
        return None


NVCC = found_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda")


@pytest.mark.slow
@needs_nvcc
def test_no_kernel_spills_and_each_takes_what_the_table_says():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


SPILLS = """
__global__ void __launch_bounds__(1024, 2) crowded(const double* in, double* out) {
  double held[48];
#pragma unroll
  for (int i = 0; i < 48; ++i) held[i] = in[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 48; ++i) out[i * 1024 + threadIdx.x] = held[i] * held[47 - i];
}
namespace r1v2_fast { template <int N> __global__ void roomy(float* out) {
  __shared__ float row[N];
  row[threadIdx.x] = out[threadIdx.x];
  __syncthreads();
  out[threadIdx.x] = row[N - 1 - threadIdx.x];
} template __global__ void roomy<64>(float*); }
"""


@needs_nvcc
def test_a_planted_spill_is_seen(tmp_path):
    source = tmp_path / "planted.cu"
    source.write_text(SPILLS)
    found = RESOURCES["used"](BUILD, NVCC, source, "90a")
    assert set(found) == {"crowded", "roomy<64>"} and found["crowded"]["spilled"] > 0
    assert (
        found["roomy<64>"]["spilled"] == 0 and found["roomy<64>"]["shared"] == 256 and found["roomy<64>"]["registers"]
    )


def test_a_kernel_that_differs_from_the_table_is_named_with_both_numbers(capsys):
    complaints = RESOURCES["complaints"]
    taken = {"registers": 30, "spilled": 0, "stack": 0, "shared": 0}
    table = {"nvcc": "13.0.88", "rows": {"80": {"kernel": taken}}}
    more = {"rows": {"80": {"kernel": {**taken, "registers": 31}}}}
    assert complaints("13.0.88", {"rows": {"80": {"kernel": taken}}}, table) == []
    assert complaints("13.0.88", more, table) == [
        f"rows sm_80 kernel: expected {taken}, got {more['rows']['80']['kernel']}"
    ]
    assert complaints("12.9.86", more, table) == []
    assert "nvcc 12.9.86 is not the table's 13.0.88: registers" in capsys.readouterr().out
    assert complaints("12.9.86", {"rows": {"90a": {"kernel": taken}}}, table) == [
        "rows sm_80 kernel: in the table, not in csrc",
        f"rows sm_90a kernel: {taken}, not in the table",
    ]
