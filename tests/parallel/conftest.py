"""Runs of the digits recipe in fp64, on one rank in its own process or on several under torchrun."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from r1v2_fast.log import read

WORKER = Path(__file__).with_name("worker.py")
SMALL = [
    "run.threads=1", "run.device=cpu", "run.stages=[align, mpo, grpo]", "align.steps=3", "mpo.steps=20", "grpo.steps=20",
    "align.batch_size=7", "data.sizes={align: 64, policy: 64, reward: 32, heldout: 24}", "checkpoint.every=5",
    "evaluation.every=10", "evaluation.records=9", "samples_every=4", "mpo.sampling.prompts=5", "mpo.min_reward_gap=0.0",
    "grpo.sampling.prompts=5", "grpo.sampling.group_size=4",
]  # fmt: skip
REWARD = "def letters(prompts, completions, **_):\n    return [float(len(c) % 3) for c in completions]\n"


def command(ranks):
    if ranks == 1:
        return [sys.executable, str(WORKER)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return [*torchrun, str(WORKER)]


@pytest.fixture(scope="session")
def launch(tmp_path_factory):
    """launch(name, ranks, *overrides, flags=()) runs in the folder `name` of one session and gives what became of it.

    The same run is not run again.
    """
    root = tmp_path_factory.mktemp("runs")
    reward = root / "reward.py"
    reward.write_text(REWARD)
    term = f"[{{name: answer, function: '{reward}:letters'}}]"
    rewards = [f"{stage}.rewards={term}" for stage in ("reward", "mpo", "grpo")]

    done_before = {}

    def run(name, *given, flags=()):
        key = (name, given, tuple(flags))
        if key not in done_before:
            done_before[key] = fresh(name, *given, flags=flags)
        return done_before[key]

    def fresh(name, ranks, *overrides, flags=(), timeout=240):
        folder = root / name
        done = subprocess.run(
            [*command(ranks), *flags, f"run.folder={folder}", *SMALL, *rewards, *overrides],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        return SimpleNamespace(folder=folder, status=done.returncode, said=done.stderr + done.stdout)

    run.reward = reward
    return run


@pytest.fixture(scope="session")
def alone(launch):
    """One rank's run, which those of several are compared with."""
    done = launch("alone", 1)
    assert done.status == 0, done.said
    lines = read(done.folder / "metrics.jsonl")
    grpo = [line for line in lines if line["stage"] == "grpo" and "loss" in line]
    assert sum(line["buffer/replayed_tokens"] > 0 for line in grpo) >= 3, "the buffer must be drawn from"
    return done
