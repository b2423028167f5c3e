"""What doctor says of every kind of `_C`, driver and card, and when it exits with 1. Stand-ins play the absent hardware."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from r1v2_fast import _native
from r1v2_fast.cli import main
from r1v2_fast.models import fused
from r1v2_fast.ops import _backend


def extension(architectures="80 90a 100 120", runtime=13000, driver=13010, **more):
    described = {"nvcc_version": "13.0.88", "compiler": "g++ 12.2.0", "__file__": "/somewhere/_C.so"} | more
    if not architectures:
        runtime, described["nvcc_version"] = 0, ""
    return SimpleNamespace(cuda_architectures=architectures, cuda_versions=lambda: (runtime, driver), **described)


@pytest.fixture
def machine(monkeypatch, capsys):
    """doctor on a machine with this `_C` and, with a capability, that card; returns its status and its text."""

    monkeypatch.setattr(fused, "version", lambda: None)  # it would be imported for a card that is not there

    def run(native, *arguments, capability=None):
        monkeypatch.setattr(_native, "module", lambda: native)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Made Up")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        return main(["doctor", *arguments]), capsys.readouterr().out

    return run


def section(text, device):
    return text.partition(f"\non {device}\n")[2].partition("\n\n")[0]


def test_a_working_gpu_is_named_with_all_that_the_extension_was_built_with(machine):
    status, text = machine(extension(), "--require", "cuda", "--require", "triton", capability=(9, 0))
    assert status == 0
    assert "GPU NVIDIA Made Up, sm_90" in text
    assert "_C with CUDA for 80 90a 100 120, and PTX of 120 for later cards" in text
    assert "built by nvcc 13.0.88, g++ 12.2.0; cudart 13.0\n" in text and "the driver serves CUDA 13.1" in text
    assert "/somewhere/_C.so" in text
    assert "cuda is out" not in section(text, "cuda") and section(text, "cpu")


@pytest.mark.parametrize(
    ("native", "capability", "said"),
    [
        (ModuleNotFoundError("r1v2_fast._C"), (9, 0), "r1v2_fast._C is not built; reinstall where a C++17 compiler"),
        (ImportError("undefined symbol: x"), (9, 0), "r1v2_fast._C does not load (undefined symbol: x); reinstall it"),
        (extension(""), (9, 0), "r1v2_fast._C was built without CUDA; reinstall with nvcc and R1V2_FAST_CUDA=1"),
        (extension(driver=12080), (9, 0), "which needs driver 580 or newer; the driver here serves CUDA 12.8"),
        (extension(), (7, 5), "and this GPU is sm_75; reinstall with R1V2_FAST_ARCHS=75"),
    ],
    ids=["absent", "does-not-load", "no-cuda", "old-driver", "other-card"],
)
def test_a_gpu_that_the_extension_cannot_use_fails_who_requires_it_with_the_reason(machine, native, capability, said):
    assert machine(native, capability=capability)[0] == 0  # nothing was asked for
    status, text = machine(native, "--require", "cuda", capability=capability)
    assert status == 1
    assert any("cuda is out: " in line and said in line for line in section(text, "cuda").splitlines())
    assert "required backend 'cuda' cannot run any op here, on cuda" in text


def test_on_a_machine_without_a_gpu_the_twin_counts_unless_the_gpu_was_asked_for(machine):
    status, text = machine(extension(driver=0), "--require", "cuda")
    assert status == 0 and "(its C++ twin)" in section(text, "cpu") and "no driver was found" in text
    status, text = machine(extension(driver=0), "--require", "cuda", "--device", "cuda")
    assert status == 1 and text.endswith("\nasked for cuda, which is not here\n")
    assert machine(extension(driver=0), "--device", "cpu")[0] == 0


def test_a_cpu_build_says_so_and_an_absent_one_is_out(machine):
    assert "_C without CUDA, its C++ twin alone; built by g++ 12.2.0" in machine(extension(""))[1]
    status, text = machine(ModuleNotFoundError("r1v2_fast._C"), "--require", "cuda")
    assert status == 1 and "_C is out: r1v2_fast._C is not built" in text


def test_one_that_does_not_know_its_compilers_is_no_error(machine):
    native = extension()
    del native.nvcc_version, native.compiler
    assert "built by nvcc unknown, unknown compiler; cudart 13.0" in machine(native)[1]


@pytest.mark.parametrize(
    ("version", "said"), [(None, "this torch is built without CUDA"), ("13.0", "is built with CUDA 13.0 and sees none")]
)
def test_no_device_is_torchs_or_the_machines_doing(machine, monkeypatch, version, said):
    monkeypatch.setattr(torch.version, "cuda", version)
    assert f"no CUDA device: {'this torch ' if version else ''}{said}" in machine(extension())[1]


def test_every_backend_is_a_choice_or_has_its_reason(machine):
    _, text = machine(extension(""), capability=(9, 0))
    for device in ("cpu", "cuda"):
        for op in _backend.ops():
            for verdict in _backend.verdicts(op, device):
                if verdict.why_not is not None:
                    assert f"    {verdict.backend} is out: {verdict.why_not}" in section(text, device)
            assert f"\n  {op:<18} {_backend.auto(op, device)}" in "\n" + section(text, device)


def test_each_fused_layer_runs_or_has_its_reason(machine, monkeypatch):
    out = {"RoPE": "liger-kernel 0.9.1's LigerRopeFunction takes (q), known is (q, k, cos, sin)"}
    monkeypatch.setattr(fused, "version", lambda: "0.9.1")
    monkeypatch.setattr(
        fused, "why_not", lambda device, layer: out.get(layer) if device == "cuda" else "no CUDA device"
    )
    _, text = machine(extension(), capability=(9, 0))
    assert "  fused RMSNorm      liger-kernel 0.9.1" in section(text, "cuda").splitlines()
    assert f"  fused RoPE         off: {out['RoPE']}" in section(text, "cuda").splitlines()
    assert section(text, "cpu").count("off: no CUDA device") == 3


def test_a_backend_that_nobody_has_is_told_from_those_that_are():
    done = subprocess.run(
        [sys.executable, "-m", "r1v2_fast", "doctor", "--require", "abacus"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "required backend 'abacus' cannot run any op here, on " in done.stdout
    assert done.stdout.strip().endswith("known are cuda, torch, triton")
