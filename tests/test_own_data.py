"""The example on own data: it trains as its README says, and what the README says of its records is so."""

import json
import math
from pathlib import Path

import pytest
import torch

from r1v2_fast import config
from r1v2_fast.data import digits
from r1v2_fast.data.collate import PromptEncoder
from r1v2_fast.data.records import Dataset
from r1v2_fast.judge.reward import load_reward
from r1v2_fast.models import freeze, load
from r1v2_fast.train import run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "own_data"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short run, started from the repository's root as the README has it."""
    few = ["align.steps=15", "grpo.steps=4", "evaluation.every=10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        recipe = config.load(
            "examples/own_data/recipe.yaml", [*few, f"run.folder={tmp_path_factory.mktemp('own')}/run"]
        )
        return run.train(recipe)


def moved(before, after) -> set[str]:
    return {freeze.part_of(name) for name, value in after.items() if not torch.equal(value, before[name])}


def test_the_example_trains_and_every_loss_is_finite(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").open()]
    losses = {
        stage: [line["loss"] for line in lines if line["stage"] == stage and "loss" in line]
        for stage in ("align", "grpo")
    }
    assert len(losses["align"]) == 15 and losses["align"][-1] < losses["align"][0]
    assert losses["grpo"], "no group was informative"
    assert all(map(math.isfinite, losses["align"] + losses["grpo"]))
    assert all(0 <= line["rewards/close/mean"] <= 1 for line in lines if "reward" in line)
    assert [line["eval/own/records"] for line in lines if "eval/own/records" in line][-1] == 8


def test_the_parts_that_train_are_the_parts_that_move(trained):
    fresh = load.from_preset("digits", words=digits.WORDS, seed=0).model.state_dict()
    aligned = load.from_folder(trained / "stages" / "align").model.state_dict()
    final = load.from_folder(trained / "final").model.state_dict()
    assert moved(fresh, aligned) == {"adapter", "llm", "vision"}
    assert moved(aligned, final) == {"adapter", "llm"}


def test_the_toy_knows_every_word_and_the_readme_every_record():
    dataset = Dataset(EXAMPLE / "records.jsonl")
    tokenizer = load.from_preset("digits", words=digits.WORDS, seed=0).tokenizer
    encoder = PromptEncoder(tokenizer, 4)
    readme = (EXAMPLE / "README.md").read_text()
    for record in dataset.records:
        ids = encoder.encode(record, [1] * len(record.images)) + encoder.response(record.columns["response"])
        assert tokenizer.unk_token_id not in ids, record.id
        assert record.columns["response"].endswith(f"</think>{record.answer}")
        assert f"| `{record.id}` |" in readme
        assert all(dataset.image(key).size == (16, 16) for key in dataset.image_keys(record))
    counts = [len(record.images) for record in dataset.records]
    assert len(counts) == 8 and counts.count(2) >= 2 and 0 in counts and 1 in counts


def test_the_reward_tells_right_from_close_from_wrong():
    close = load_reward(f"{EXAMPLE}/reward.py:close")
    completions = ["<think>4 5</think>9", "8", "<think>4 5</think>10", "7", "", "<think>9</think>Add"]
    assert close(["?"] * 6, completions, answer=["9"] * 6, response=[""] * 6) == [1.0, 0.5, 0.5, 0.0, 0.0, 0.0]
