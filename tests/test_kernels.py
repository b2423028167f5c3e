"""Every Triton kernel: its arithmetic under the interpreter, and that it builds for each architecture and fits."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1v2_fast.ops import linear_logprobs
from r1v2_fast.ops.group_advantage import group_advantages

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
ARCHITECTURES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a block, CUDA C guide table 30
STEMS = sorted(path.stem for path in (HERE.parent / "kernels").glob("*.py") if not path.stem.startswith("_"))
RESOURCES = json.loads((HERE / "kernel_resources.json").read_text())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", STEMS)
def test_it_compiles_ahead_of_time_without_spills_and_takes_what_the_table_says(stem, architecture):
    script = HERE / "kernel_checks" / "resources.py"
    done = subprocess.run([sys.executable, script, stem, str(architecture)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found
    for case, used in found.items():
        assert used["spilled"] == 0, f"{case} spills: {used}"
        assert used["shared"] <= SHARED_LIMIT[architecture]
    if triton.__version__ == RESOURCES["triton"]:  # another compiler allocates otherwise
        hint = "`python tests/kernel_checks/resources.py --write` renews the table"
        assert found == RESOURCES[stem][str(architecture)], hint


def test_the_row_kernel_loads_and_stores_wide_for_any_vocabulary_rounds_to_bf16_and_orders_its_last_store():
    code = (
        "import resources\n"
        "name, *case = list(resources.linear_logprob())[2]\n"
        "assert name == 'bf16 grad=True everything=False'\n"
        "print(resources.build(*case, 90).asm['ptx'])"
    )
    folder = HERE / "kernel_checks"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kinds = re.findall(
        r"(cp\.async\.cg|ld\.global\.v4|st\.global\.v4|st\.global\.b16|st\.global\.v2|bar\.sync)", done.stdout
    )
    assert kinds.count("cp.async.cg") and kinds.count("st.global.v4") == 2 * 1 and "st.global.v2" not in kinds
    assert "cvt.rn.bf16x2.f32" in done.stdout or "cvt.rn.bf16.f32" in done.stdout
    wide = len(kinds) - 1 - kinds[::-1].index("st.global.v4")
    own = kinds.index("st.global.b16")
    assert kinds.count("st.global.b16") == 1 and "bar.sync" in kinds[wide:own]  # the target's entry, after its 0


def check(stem, device, **environment):
    script = HERE / "kernel_checks" / f"{stem}.py"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run([sys.executable, script, device], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "as accurate as" in done.stdout


@pytest.mark.parametrize("stem", STEMS)
def test_the_interpreter_agrees_with_the_reference(stem):
    check(stem, "cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("stem", STEMS)
def test_the_gpu_agrees_with_the_reference(stem):
    check(stem, "cuda")


def test_asking_for_triton_where_it_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="need a CUDA tensor, got one on cpu"):
        group_advantages(torch.zeros(4), 2, backend="triton")


@pytest.mark.parametrize(
    ("rewards", "options", "reason"),
    [
        (torch.zeros(4), {"aggregate": "gdpo", "scale": "batch"}, "the batch's std of every component"),
        (torch.zeros(4, dtype=torch.float64), {}, "rewards are fp64"),
    ],
)
def test_what_triton_lacks_is_a_reason_and_not_a_silent_detour(rewards, options, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the device is no objection
    with pytest.raises(RuntimeError, match=f"{reason}.*use backend='torch'"):
        group_advantages(rewards, 2, backend="triton", **options)
    group_advantages(rewards, 2, **options)


def test_linear_logprobs_in_fp64_has_no_triton_backend(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    arguments = torch.zeros(2, 4, dtype=torch.float64), torch.zeros(5, 4, dtype=torch.float64), torch.tensor([0, 1])
    with pytest.raises(RuntimeError, match="statistics are fp32, the inputs fp64; use backend='torch'"):
        linear_logprobs(*arguments, backend="triton")
    assert linear_logprobs(*arguments).logprobs.dtype == torch.float64
