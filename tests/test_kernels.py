"""Every Triton kernel: its arithmetic under the interpreter, and that it builds for each architecture and fits."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1v2_fast.ops.group_advantage import group_advantages

triton = pytest.importorskip("triton")

HERE = Path(__file__).parent
ARCHITECTURES = (80, 90, 100, 120)
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}  # bytes a block, CUDA C guide table 30

FLAGS = ("HAS_DECIDING", "LEAVE_ONE_OUT", "DIVIDE", "CLAMP", "RAW_SINGLETON", "ZERO_UNINFORMATIVE")
POINTERS = ("rewards", "weights", "deciding", "advantages", "means", "stds")


def group_advantage_cases():
    from r1v2_fast.kernels import group_advantage as kernel

    types = dict.fromkeys(POINTERS, "*fp32")
    types |= {"offsets": "*i64", "informative": "*i1", "groups": "i32", "eps": "fp32", "tol": "fp32"}
    for components, average, on in itertools.product((1, 3), (3, 8, 4096), (True, False)):
        P, M = kernel.tile(average * 1000, 1000)
        yield (
            kernel.group_advantage_kernel,
            types,
            {"R": components, "CORRECTION": 1, "P": P, "M": M, **dict.fromkeys(FLAGS, on)},
        )


TABLE = {"group_advantage": group_advantage_cases}


def resources(cubin: bytes, path: Path) -> dict[str, int]:
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stem", TABLE)
def test_it_compiles_ahead_of_time_without_spills(stem, architecture, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    cases = list(TABLE[stem]())
    assert cases
    for function, types, constants in cases:
        signature = {**types, **dict.fromkeys(constants, "constexpr")}
        assert set(signature) == set(function.arg_names)
        source = ASTSource(function, {name: signature[name] for name in function.arg_names}, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        used = resources(compiled.asm["cubin"], tmp_path / "kernel.cubin")
        assert used["STACK"] == used["LOCAL"] == 0, f"{constants} spills: {used}"
        assert compiled.metadata.shared <= SHARED_LIMIT[architecture]


def test_every_kernel_file_is_in_the_table():
    assert set(TABLE) == {path.stem for path in (HERE.parent / "kernels").glob("*.py")}


def check(stem, device, **environment):
    script = HERE / "kernel_checks" / f"{stem}.py"
    environment = {**os.environ, "PYTHONWARNINGS": "ignore", **environment}
    done = subprocess.run([sys.executable, script, device], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "as accurate as" in done.stdout


@pytest.mark.parametrize("stem", TABLE)
def test_the_interpreter_agrees_with_the_reference(stem):
    check(stem, "cpu", TRITON_INTERPRET="1")


@pytest.mark.gpu
@pytest.mark.parametrize("stem", TABLE)
def test_the_gpu_agrees_with_the_reference(stem):
    check(stem, "cuda")


def test_asking_for_triton_where_it_cannot_run_says_why():
    with pytest.raises(RuntimeError, match="need a CUDA tensor, got one on cpu"):
        group_advantages(torch.zeros(4), 2, backend="triton")


@pytest.mark.parametrize(
    ("rewards", "options", "reason"),
    [
        (torch.zeros(4), {"aggregate": "gdpo"}, "whole batch"),
        (torch.zeros(4), {"scale": "batch"}, "whole batch"),
        (torch.zeros(4, dtype=torch.float64), {}, "rewards are fp64"),
    ],
)
def test_what_triton_lacks_is_a_reason_and_not_a_silent_detour(rewards, options, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # so that the device is no objection
    with pytest.raises(RuntimeError, match=f"{reason}.*use backend='torch'"):
        group_advantages(rewards, 2, backend="triton", **options)
    group_advantages(rewards, 2, **options)
