"""The command line as a user meets it."""

import json
import subprocess
import sys

import pytest

from r1v2_fast.cli import main

TINY = [
    "run.stages=[align]", "align.steps=3", "align.batch_size=8", "evaluation.every=2",
    "data.sizes={align: 32, policy: 8, reward: 8, heldout: 12}",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits", *TINY, f"run.folder={folder}"]) == 0
    return folder


def test_train_leaves_a_model_a_report_and_the_resolved_recipe(folder):
    for path in ("final/model.safetensors", "report.html", "recipe.yaml", "metrics.jsonl", "samples.jsonl"):
        assert (folder / path).is_file(), path
    assert "align" in (folder / "report.html").read_text()


def test_evaluate_reads_what_train_wrote(folder, capsys):
    assert (
        main(["evaluate", str(folder / "final"), str(folder / "data" / "heldout_clean.jsonl"), "--records", "5"]) == 0
    )
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["records"] == 5 and 0 <= metrics["accuracy"] <= 1 and "hallucination" in metrics


def test_report_can_be_written_again(folder, capsys):
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert (folder / "report.html").is_file()


def test_a_second_start_needs_resume(folder, capsys):
    assert main(["train", "digits", *TINY, f"run.folder={folder}"]) == 2
    assert "add --resume" in capsys.readouterr().err
    assert main(["train", "digits", *TINY, f"run.folder={folder}", "--resume"]) == 0


def test_a_run_that_failed_before_it_began_can_be_started_anew(tmp_path, capsys):
    start = ["train", "digits", *TINY, f"run.folder={tmp_path / 'run'}"]
    assert main([*start, "align.data=missing.parquet"]) == 2
    assert "missing.parquet" in capsys.readouterr().err
    assert main(start) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digit"], "did you mean 'digits'"),
        (["train", "digits", "align.step=3"], "unknown key 'align.step'; did you mean 'steps'"),
        (["train", "digits", "align.steps"], "section.key=value, got 'align.steps'"),
        (["evaluate", "nowhere", "x.jsonl"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_sentences_and_not_tracebacks(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_installed_command_starts():
    done = subprocess.run([sys.executable, "-m", "r1v2_fast", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "0.1.0"
    assert subprocess.run([sys.executable, "-m", "r1v2_fast", "doctor"], capture_output=True).returncode == 0
