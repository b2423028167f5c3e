"""Who may import whom, how large a file may be, and that a name does not shadow Hugging Face's."""

import ast
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "r1v2_fast"
LAYERS = {
    "reference": set(),
    "testing": {"ops", "reference"},
    "ops": {"reference", "kernels", "_C", "_native"},
    "buffer": {"ops"},
    "models": {"ops", "config", "data"},
    "data": {"ops"},
    "judge": {"ops", "config"},
    "atomic": set(),
    "stop": set(),
    "run_folder": {"atomic", "config", "_version"},
    "config": set(),
    "loggers": set(),
    "rollout": {"config", "data", "models"},
    "parallel": {"ops", "models", "atomic", "config", "stop"},
    "train": {
        "ops",
        "parallel",
        "rollout",
        "atomic",
        "stop",
        "config",
        "run_folder",
        "buffer",
        "models",
        "data",
        "judge",
        "log",
        "loggers",
        "_version",
    },
    "log": {"loggers"},
    "report": {"atomic", "card", "data", "log"},
    "card": {"data", "log", "_version"},
    "commands": {"atomic", "parallel", "config", "models", "data", "judge", "rollout", "train", "log", "card"},
    "plan": {"config", "data", "models"},
    "doctor": {"ops", "models", "_version", "_native"},
    "__main__": {"cli"},
    "cli": {"config", "parallel", "stop", "train", "commands", "plan", "report", "doctor", "_version"},
}


def imports(path: Path) -> set[str]:
    """Parts of r1v2_fast that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "r1v2_fast":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("r1v2_fast.")}
    return found


def modules() -> list[Path]:
    return [p for p in PACKAGE.rglob("*.py") if "kernels" not in p.relative_to(PACKAGE).parts]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_its_own_layer_and_those_below(path):
    layer = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if layer.startswith("_"):
        return
    assert imports(path) - {layer} <= LAYERS[layer]


def test_the_import_scan_sees_every_way_to_import(tmp_path):
    path = tmp_path / "x.py"
    path.write_text(
        "def f():\n    from r1v2_fast.train import run\nimport r1v2_fast.ops.x\nfrom r1v2_fast import data\n"
    )
    assert imports(path) == {"train", "ops", "data"}


def test_kernels_import_only_torch_triton_and_the_standard_library_and_have_no_init():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    assert not (ROOT / "kernels" / "__init__.py").exists()
    for path in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert {a.name.split(".")[0] for a in node.names} <= allowed, path
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                assert node.module.split(".")[0] in allowed, path


def test_files_stay_small():
    lengths = {p: len(p.read_text().splitlines()) for p in ROOT.rglob("*.py") if ".venv" not in str(p)}
    assert max(lengths.values()) <= 600, max(lengths, key=lengths.get)
    assert statistics.median(lengths.values()) <= 200


def test_the_training_loop_stays_lean():
    lengths = [len(path.read_text().splitlines()) for path in (PACKAGE / "train").rglob("*.py")]
    assert sum(lengths) < 2000 and max(lengths) <= 400


def test_importing_the_package_imports_neither_torch_nor_triton():
    import subprocess

    code = "import sys, r1v2_fast; assert r1v2_fast.__version__; assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
