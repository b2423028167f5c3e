"""The suite itself: it measures what is right, refuses what is wrong, and its lines can be read again."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def run(*arguments):
    environment = {**os.environ, "COLUMNS": "160"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_a_run_writes_lines_that_compare_reads(tmp_path):
    file = tmp_path / "cpu.jsonl"
    done = run(
        "-m", "bench", "--device", "cpu", "--rounds", "1", "--output", file, "run", "mpo_loss", "group_advantage"
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["stem"], line["provider"]) for line in lines] == [
        ("group_advantage", "ours"), ("group_advantage", "pytorch"), ("mpo_loss", "ours"), ("mpo_loss", "pytorch"),
    ]  # fmt: skip
    assert all(line["seconds"] > 0 and line["environment"]["torch"] and line["environment"]["commit"] for line in lines)
    for line in lines:
        line["seconds"] *= 2
    slower = tmp_path / "slower.jsonl"
    slower.write_text("\n".join(map(json.dumps, lines)))
    table = run("-m", "bench", "compare", file, slower)
    assert table.returncode == 0 and table.stdout.count("2.00") == 4


def test_an_unknown_op_is_named():
    done = run("-m", "bench", "run", "group_advantages")
    assert done.returncode and "no case of ['group_advantages']" in done.stderr and "'group_advantage'" in done.stderr


def test_a_wrong_result_is_never_timed():
    code = (
        "import dataclasses, torch\n"
        "from rich.console import Console\n"
        "from bench.case import Provider\n"
        "from bench.cases import group_advantage as cases\n"
        "from bench.run import run\n"
        "case = cases.CASES[0]\n"
        "wrong = Provider(lambda rewards: (cases.ours(rewards)[0] * (1 + 1e-5),))\n"
        "case = dataclasses.replace(case, providers={**case.providers, 'ours': wrong})\n"
        "run(case, torch.device('cpu'), rounds=1, console=Console())"
    )
    done = run("-c", code)
    assert "ours errs by 1.0" in done.stderr and "median" not in done.stdout


def test_a_peer_that_is_not_installed_is_named_and_not_forgotten():
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "import importlib.util; find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *a: None if name == 'trl' else find(name, *a)\n"
        "import torch\n"
        "from rich.console import Console\n"
        "from bench.cases import linear_logprob as cases\n"
        "from bench.run import run\n"
        "case = cases.case('small', 64, 32, 512, torch.float32, ('cpu',))\n"
        "run(case, torch.device('cpu'), rounds=1, console=Console())"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    assert "trl is out: trl is not installed; pip install trl==1.16.0" in done.stdout
