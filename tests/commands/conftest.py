"""A policy that is sometimes right, for the commands that a user meets."""

import resource
import shutil

import pytest

from r1v2_fast.cli import main
from r1v2_fast.commands.model import open_model
from r1v2_fast.config import Evaluation
from r1v2_fast.rollout.generation import LocalEngine
from r1v2_fast.train.context import Corpus
from r1v2_fast.train.evaluate import evaluate

RUN = [
    "run.stages=[align,reward,grpo]", "align.steps=60", "align.batch_size=32", "align.optimizer.warmup_steps=5",
    "align.optimizer.lr=2.0e-3", "reward.steps=1", "reward.sampling.prompts=4", "grpo.steps=1", "evaluation.every=30",
    "data.sizes={align: 256, policy: 40, reward: 8, heldout: 24}", "data.max_tiles=7",
]  # fmt: skip


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "run"
    assert main(["train", "digits", *RUN, f"run.folder={folder}"]) == 0
    return folder


@pytest.fixture(scope="session")
def held_out(folder):
    """(dataset, reader, policy, greedy completions) of the clean held-out records."""
    corpus = Corpus(folder / "data")
    dataset = corpus.dataset("heldout_clean.jsonl")
    policy, reader = open_model(folder / "final", corpus, "cpu")
    config = Evaluation(sets={"clean": "heldout_clean.jsonl"}, max_new_tokens=12)
    return dataset, reader, policy, evaluate(LocalEngine(policy), reader, dataset, config)


@pytest.fixture
def pool(folder, tmp_path):
    """A folder of records of its own, for what lies beside them."""
    for name in ("heldout_clean.jsonl", "policy.parquet"):
        shutil.copy(folder / "data" / name, tmp_path)
    shutil.copytree(folder / "data" / "images", tmp_path / "images")
    return tmp_path


@pytest.fixture
def full_disk():
    """A limit on the size of files, which the system reports as it does a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
