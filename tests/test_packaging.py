"""What is shipped: one top level, sources and data inside, and no quarrel with Hugging Face's package `kernels`."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

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
def built(tmp_path_factory):
    """A wheel built from the sdist, as a release is."""
    source, out = tmp_path_factory.mktemp("source") / "repo", tmp_path_factory.mktemp("dist")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    for name in filter(None, tracked):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", out]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


@pytest.mark.slow
def test_the_wheel_has_one_top_level_and_everything_in_it(built):
    names = zipfile.ZipFile(built[0]).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"r1v2_fast"}
    wanted = ("kernels/group_advantage.py", "recipes/digits.yaml", "py.typed", "ops/linear_logprob.py", "train/loop.py")
    for path in wanted:
        assert f"r1v2_fast/{path}" in names
    assert any(name.startswith("r1v2_fast/_C.") for name in names)
    assert "r1v2_fast/kernels/__init__.py" not in names and not any("/tests/" in name for name in names)


@pytest.mark.slow
def test_the_sdist_can_be_built(built):
    with tarfile.open(built[1]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"csrc/module.cpp", "csrc/priority_sample.h", "kernels/group_advantage.py", "setup.py", "LICENSE"} <= names


@pytest.mark.slow
def test_an_installed_wheel_imports_away_from_the_repository(built, tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, built[0]]
    subprocess.run(command, check=True, capture_output=True)
    code = (
        "import torch, r1v2_fast\n"
        "from r1v2_fast import _native, ops\n"
        "from r1v2_fast import config\n"
        "import r1v2_fast.kernels.group_advantage\n"
        "assert _native.why_not('cpu') is None\n"
        "assert config.load('digits', []).run.name == 'digits'\n"
        "print(ops.group_advantages(torch.tensor([1.0, 0.0]), 2).informative.tolist(), r1v2_fast.__file__)"
    )
    done = python(code, tmp_path, site, flags=("-P",) if sys.version_info >= (3, 11) else ())
    assert done.stdout.startswith("[True]") and str(site) in done.stdout, done.stderr
