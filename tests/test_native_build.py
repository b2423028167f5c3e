"""How `_C` is built: what it is asked for, what is built again, what its file needs and shows."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from r1v2_fast import _native

ROOT = Path(__file__).resolve().parent.parent
needs_native = pytest.mark.skipif(_native.why_not("cpu") is not None, reason=str(_native.why_not("cpu")))
needs_readelf = pytest.mark.skipif(shutil.which("readelf") is None, reason="readelf (binutils) was not found")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ was not found")

MODULE = """
#include <Python.h>
#include "one.h"
#include "two.h"
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1};
PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "sum", one() + two());
  return module;
}
"""
NVCC = """#!/bin/sh
# stands in for nvcc: answers what setup.py asks, and writes empty files where it is told to compile
case "$1" in
  --version) echo "Cuda compilation tools, release 12.9, V12.9.86"; exit;;
  --list-gpu-arch) printf "compute_%s\\n" 80 90 100 120; exit;;
esac
while [ $# -gt 0 ]; do
  case "$1" in -o|-MF) : > "$2"; shift;; esac
  shift
done
"""


def build(folder, out, **environment):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", out]
    path = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    clean = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CXX") and not k.startswith("R1V2_FAST")}
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env={**clean, **path, **environment})


def compiled(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"compile \S+/(\S+)", done.stdout))


@pytest.fixture
def small(tmp_path):
    """Our setup.py over sources that compile in a moment."""
    folder = tmp_path / "with a space"
    (folder / "csrc").mkdir(parents=True)
    shutil.copy(ROOT / "setup.py", folder)
    shutil.copy(ROOT / "csrc" / "exports.map", folder / "csrc")
    (folder / "csrc" / "module.cpp").write_text(MODULE)
    for name, value in (("one", 1), ("two", 2)):
        (folder / "csrc" / f"{name}.h").write_text(f"int {name}();\n")
        (folder / "csrc" / f"{name}.cpp").write_text(f'#include "{name}.h"\nint {name}() {{ return {value}; }}\n')
    return folder


def fake_nvcc(folder, text=NVCC):
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(folder)


@needs_compiler
def test_only_what_changed_is_compiled_again(small, tmp_path):
    assert compiled(build(small, tmp_path, R1V2_FAST_CUDA="0")) == {"module.cpp", "one.cpp", "two.cpp"}
    again = build(small, tmp_path, R1V2_FAST_CUDA="0")
    assert compiled(again) == set() and "ninja: no work to do." in again.stdout
    (small / "csrc" / "one.cpp").write_text('#include "one.h"\nint one() { return 40; }\n')
    assert compiled(build(small, tmp_path, R1V2_FAST_CUDA="0")) == {"one.cpp"}
    (small / "csrc" / "two.h").touch()
    assert compiled(build(small, tmp_path, R1V2_FAST_CUDA="0")) == {"module.cpp", "two.cpp"}
    code = "import r1v2_fast._C as native; print(native.sum)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "42", done.stderr


@needs_compiler
def test_a_failed_compilation_ends_in_one_sentence(small, tmp_path):
    (small / "csrc" / "one.cpp").write_text("int one() { return; }\n")
    done = build(small, tmp_path, R1V2_FAST_CUDA="0")
    assert done.returncode and "one.cpp" in done.stdout
    assert done.stderr.strip() == "r1v2_fast: _C did not compile; the compiler's message is above"


@needs_compiler
def test_with_cuda_each_file_gets_its_flags_and_new_architectures_touch_no_host_code(small, tmp_path):
    for name in ("priority_sample.cu", "rows.cu"):
        (small / "csrc" / name).touch()
    asked = {"R1V2_FAST_CUDA": "1", "CUDA_HOME": fake_nvcc(tmp_path)}
    assert len(compiled(build(small, tmp_path, **asked))) == 5
    (ninja_file,) = (small / "build" / "native").glob("*.ninja")
    before, rules = set((small / "build" / "native").iterdir()), ninja_file.read_text()
    command = {rule: re.search(rf"rule {rule}\n  command = (.*)", rules)[1] for rule in ("cpp", "cu", "link")}
    flags = dict(re.findall(r"build \S+: \w+ \S+/(\S+)\n  flags = (.*)", rules))
    assert all("-O3" in command[rule] and "-ffp-contract=off" in command[rule] for rule in ("cpp", "cu"))
    wanted = [f"-gencode arch=compute_{name},code=sm_{name}" for name in ("80", "90a", "100", "120")]
    wanted.append("-gencode arch=compute_120,code=compute_120")
    assert re.findall(r"-gencode \S+", command["cu"]) == wanted and "-gencode" not in command["cpp"]
    assert "-lineinfo" in command["cu"] and "-cudart static" in command["link"] and "-pthread" in command["link"]
    assert flags["priority_sample.cu"] == "-fmad=false" and flags["rows.cu"] == ""
    assert """-DR1V2_FAST_NVCC='"12.9.86"'""" in flags["module.cpp"] and "python" not in flags["one.cpp"]
    assert "no work to do" in build(small, tmp_path, **asked).stdout
    fewer = build(small, tmp_path, **asked, R1V2_FAST_ARCHS="80 90a")
    assert compiled(fewer) == {"priority_sample.cu", "rows.cu", "module.cpp"}  # which names them
    assert "arch=compute_90,code=compute_90" in ninja_file.read_text()  # PTX of 90a would run on no later card
    assert set((small / "build" / "native").iterdir()) == before


@pytest.mark.parametrize(
    ("script", "asked", "said"),
    [
        (None, {}, "R1V2_FAST_CUDA=1, but nvcc was not found in CUDA_HOME="),
        ("#!/bin/sh\necho no driver; exit 1\n", {}, "does not run: `nvcc --version` gave 'no driver'"),
        (NVCC.replace("V12.9.86", "V11.8.89"), {}, "nvcc is 11.8.89, older than 12.0"),
        (NVCC.replace(" 100 120", ""), {}, "nvcc 12.9.86 knows ['80', '90a'] of the architectures ['80', '90a', '100'"),
    ],
    ids=["none", "broken", "old", "lacks-architectures"],
)
def test_cuda_that_cannot_be_had_stops_where_it_was_asked_for(script, asked, said, tmp_path, small):
    home = fake_nvcc(tmp_path, script) if script else str(tmp_path)
    insisted = build(small, tmp_path, R1V2_FAST_CUDA="1", CUDA_HOME=home, **asked)
    assert insisted.returncode == 1 and len(insisted.stderr.splitlines()) == 1
    assert insisted.stderr.startswith("R1V2_FAST_CUDA=1, but ") and said in insisted.stderr
    assert "install the CUDA toolkit 12.8 or newer and set CUDA_HOME, or build the CPU half" in insisted.stderr


@needs_compiler
def test_without_being_asked_for_it_is_left_out_and_the_build_says_so(small, tmp_path):
    done = build(small, tmp_path, CUDA_HOME=str(tmp_path))
    assert compiled(done) == {"module.cpp", "one.cpp", "two.cpp"}
    assert f"nvcc was not found in CUDA_HOME={tmp_path}; building the CPU half of _C" in done.stdout
    home = fake_nvcc(tmp_path, NVCC.replace(" 100 120", ""))
    assert "going on with those, and PTX for newer cards" in build(small, tmp_path, CUDA_HOME=home).stdout


def test_a_wish_that_makes_no_sense_is_named(small, tmp_path):
    home = {"R1V2_FAST_CUDA": "auto", "CUDA_HOME": fake_nvcc(tmp_path)}
    for wish in ("hopper", "", "9"):
        said = build(small, tmp_path, **home, R1V2_FAST_ARCHS=wish).stderr
        assert f"R1V2_FAST_ARCHS must list architectures such as '80 90a', got {wish!r}" in said
    unknown = build(small, tmp_path, **home, R1V2_FAST_ARCHS="80,130").stderr
    assert "R1V2_FAST_ARCHS='80,130', but nvcc 12.9.86 knows ['80'] of" in unknown
    assert "must be auto, 1 or 0, got 'yes'" in build(small, tmp_path, R1V2_FAST_CUDA="yes").stderr


@needs_compiler
def test_a_compiler_may_come_with_a_launcher_and_flags(small, tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/seen\nexec "$@"\n')
    launcher.chmod(0o755)
    done = build(small, tmp_path, R1V2_FAST_CUDA="0", CXX=f"{launcher} g++ -DASKED=1")
    assert compiled(done) == {"module.cpp", "one.cpp", "two.cpp"}, done.stdout + done.stderr
    seen = (tmp_path / "seen").read_text().splitlines()
    assert len(seen) == 3 and all("g++" in line and "-DASKED=1" in line for line in seen)


def test_without_a_compiler_the_package_goes_on_without_it_unless_cuda_was_asked_for(small, tmp_path):
    without = build(small, tmp_path, CXX="no-such-compiler")
    assert without.returncode == 0 and "no C++ compiler (no-such-compiler): going on without _C" in without.stdout
    insisted = build(small, tmp_path, CXX="no-such-compiler", R1V2_FAST_CUDA="1", CUDA_HOME=fake_nvcc(tmp_path))
    assert "R1V2_FAST_CUDA=1 needs a C++17 compiler and Python's headers" in insisted.stderr and insisted.returncode


def readelf(*options):
    command = ["readelf", "-W", *options, _native.module().__file__]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_native
@needs_readelf
def test_it_needs_no_library_that_a_bare_machine_lacks():
    needed = set(re.findall(r"\(NEEDED\).*\[(\S+?)\.so", readelf("-d")))
    assert "libc" in needed
    assert needed <= {"libc", "libm", "libpthread", "libdl", "librt", "ld-linux-x86-64", "ld-linux-aarch64"}


@needs_native
@needs_readelf
def test_it_shows_its_init_function_alone_and_takes_nothing_but_python_and_glibc():
    symbols = [line.split() for line in readelf("--dyn-syms").splitlines() if re.match(r"\s*\d+: \w{16}", line)]
    shown = [row[7] for row in symbols if row[6] != "UND"]
    assert shown == ["PyInit__C"]
    taken = [row[7] for row in symbols if row[6] == "UND" and row[4] != "WEAK" and len(row) > 7]
    assert len(taken) > 50  # the table was read
    assert [name for name in taken if "@GLIBC_" not in name and not re.match(r"_?Py", name)] == []  # no torch, no c10


@needs_native
def test_it_holds_code_for_each_of_its_architectures_and_ptx_for_later_cards():
    triton = pytest.importorskip("triton")
    architectures = _native.module().cuda_architectures.split()
    if not architectures:
        pytest.skip("built without CUDA")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

    def dump(*options):
        return subprocess.run(
            [tool, *options, _native.module().__file__], capture_output=True, text=True, check=True
        ).stdout

    files = [source.stem for source in ROOT.glob("csrc/*.cu")]
    assert sorted(re.findall(r": (\S+)\.cubin", dump("-lelf"))) == sorted(
        f"{f}.sm_{a}" for f in files for a in architectures
    )
    last = architectures[-1].rstrip("af")
    assert sorted(re.findall(r": (\S+)\.ptx", dump("-lptx"))) == sorted(f"{file}.sm_{last}" for file in files)
    kernels = re.findall(r"REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", dump("-res-usage"))
    assert kernels and set(kernels) == {("0", "0")}
