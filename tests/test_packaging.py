"""What is shipped: one top level, sources and data inside, and no quarrel with Hugging Face's package `kernels`."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from r1v2_fast import _native

ROOT = Path(__file__).resolve().parent.parent
USES_BOTH = (
    "import kernels; assert kernels.__file__ and 'hub' in kernels.__file__, kernels\n"
    "import r1v2_fast.kernels.group_advantage as ours; assert ours.launch\n"
    "print('both')"
)


def python(code, cwd, *paths, flags=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), "R1V2_FAST_CUDA": "auto"}
    return subprocess.run(
        [sys.executable, *flags, "-c", code], cwd=cwd, capture_output=True, text=True, env=environment
    )


@pytest.fixture
def hub(tmp_path):
    """A stand-in for Hugging Face's package."""
    package = tmp_path / "hub" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("def get_kernel(): ...\n")
    return package.parent


def test_hugging_faces_kernels_is_found_from_the_repository_root(hub):
    done = python(USES_BOTH, ROOT, hub)
    assert done.stdout.strip() == "both", done.stderr


def test_an_init_file_in_our_kernels_would_hide_it(hub, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(ROOT / "kernels", copy / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "kernels" / "__init__.py").touch()
    assert "AssertionError" in python(USES_BOTH, copy, hub).stderr


@pytest.mark.slow
def test_transformers_imports_from_the_root_with_the_real_package_installed(tmp_path):
    install = [sys.executable, "-m", "pip", "install", "-q", "--target", tmp_path, "--no-deps", "kernels"]
    subprocess.run(install, check=True, capture_output=True)
    code = "from transformers import Qwen2ForCausalLM\nimport kernels; print(kernels.__file__)"
    done = python(code, ROOT, tmp_path)
    assert str(tmp_path) in done.stdout, done.stderr


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What a clone holds, and what is about to be committed."""
    folder = tmp_path_factory.mktemp("source") / "repo"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in filter(lambda name: (ROOT / name).exists(), listed):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def environment(**more):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("R1V2_FAST", "PYTHON"))}
    return clean | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"} | more


@pytest.fixture(scope="module")
def released(tree, tmp_path_factory):
    """The wheel and the sdist that it was built from, as `make wheel` makes them, for one card to be quick."""
    out = tmp_path_factory.mktemp("dist")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    command = [sys.executable, "tools/wheels.py", "--python", version, "--out", out]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True, env=environment(R1V2_FAST_ARCHS="90a"))
    assert done.returncode == 0, done.stdout + done.stderr
    wheel, sdist = next(out.glob("*/*.whl")), next(out.glob("*.tar.gz"))
    assert wheel.name in done.stdout and sdist.name in done.stdout
    return wheel, sdist


@pytest.mark.slow
def test_the_wheel_has_one_top_level_and_everything_in_it(released):
    names = zipfile.ZipFile(released[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"r1v2_fast"}
    wanted = ("kernels/group_advantage.py", "recipes/digits.yaml", "py.typed", "ops/linear_logprob.py", "train/loop.py")
    for path in wanted:
        assert f"r1v2_fast/{path}" in names
    assert len([name for name in names if name.startswith("r1v2_fast/_C.")]) == 1
    assert "r1v2_fast/kernels/__init__.py" not in names and not any("/tests/" in name for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_the_wheel_runs_on_ubuntu_22_04_and_newer(released):
    (minor,) = re.findall(r"-manylinux_2_(\d+)_\w+\.whl$", released[0].name)
    assert int(minor) <= 35


@pytest.mark.slow
def test_the_sdist_holds_what_the_build_needs_and_no_half_of_the_tests(released):
    with tarfile.open(released[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert sources | {"kernels/group_advantage.py", "setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not any(name.startswith("tests") for name in names)


PROOF = """
import torch, r1v2_fast
from r1v2_fast import _native, config, ops
import r1v2_fast.kernels.group_advantage
assert config.load('digits', []).run.name == 'digits'
drawn = ops.sample_by_priority(torch.tensor([0.0, 1.0]), 1, seed=0, backend='cuda')
print(drawn.indices.tolist(), _native.module().cuda_architectures or 'no CUDA', r1v2_fast.__file__)
"""


@pytest.fixture(scope="module")
def fresh(tmp_path_factory):
    """Makes a new environment that sees this one's torch, installs into it, and proves the install from elsewhere."""

    def prove(*install, **variables):
        folder = tmp_path_factory.mktemp("fresh")
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        python = folder / "venv" / "bin" / "python"
        pip = [python, "-m", "pip", "install", "-q", "--no-deps", *install]
        done = subprocess.run(pip, capture_output=True, text=True, env=environment(**variables))
        assert done.returncode == 0, done.stdout + done.stderr
        (site,) = (folder / "venv").glob("lib/python*/site-packages")
        (site / "torch_of_ours.pth").write_text(sysconfig.get_path("purelib"))
        said = []
        for command in ([python, "-c", PROOF], [python.parent / "r1v2-fast", "doctor", "--require", "cuda"]):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment())
            assert done.returncode == 0, done.stdout + done.stderr
            said.append(done.stdout)
        assert said[0].startswith("[1] ")
        return folder, *said

    return prove


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(released, fresh):
    folder, proof, doctor = fresh(released[0])
    assert str(folder) in proof
    if released[0].parent.name == "cpu":
        assert "no CUDA" in proof
    else:
        assert "90a" in proof and "_C with CUDA for 90a, and PTX of 90 for later cards" in doctor


@pytest.mark.slow
def test_the_sdist_installs_without_torch_and_without_cuda_where_nvcc_is_hidden(released, fresh, tmp_path):
    folder, proof, doctor = fresh(released[1], CUDA_HOME=str(tmp_path))
    assert str(folder) in proof and "no CUDA" in proof and "_C without CUDA, its C++ twin alone" in doctor


@pytest.mark.slow
def test_an_editable_install_runs_the_sources(tree, fresh):
    if (ROOT / "build" / "native").is_dir():  # what is compiled here is not compiled again there
        shutil.copytree(ROOT / "build" / "native", tree / "build" / "native")
    native = _native.module()
    with_cuda = not isinstance(native, ImportError) and native.cuda_architectures
    _, proof, doctor = fresh("-e", tree, R1V2_FAST_CUDA="auto" if with_cuda else "0")
    assert str(tree) in proof and str(tree) in doctor


@pytest.mark.slow
def test_through_pip_cuda_that_cannot_be_had_is_one_clear_message(tree, tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, tree]
    asked = environment(R1V2_FAST_CUDA="1", CUDA_HOME=str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, env=asked)
    said = done.stdout + done.stderr
    assert done.returncode and said.count("R1V2_FAST_CUDA=1, but nvcc was not found in CUDA_HOME=") == 1
    assert int(re.search(r"\[(\d+) lines of output\]", said)[1]) <= 5
    assert not list(tmp_path.glob("*.whl"))


@pytest.mark.slow
def test_an_interpreter_that_is_not_here_is_named(tree, tmp_path):
    command = [sys.executable, "tools/wheels.py", "--python", "3.99", "--out", tmp_path]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    assert done.returncode == 1 and "no CPython 3.99 on the PATH, under pyenv or in /opt/python" in done.stderr
