"""The command line as a user meets it."""

import json
import subprocess
import sys

import pytest
import yaml
from jinja2 import TemplateError
from safetensors import SafetensorError

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
        (["evaluate", "nowhere", "x.jsonl"], "no such data file: x.jsonl"),
        (["chat", "nowhere", "Read."], "a model must be a local Hugging Face folder with config.json, got 'nowhere'"),
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


@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left", "x"), SafetensorError("x\ny"), yaml.YAMLError("x\n\ny"), TemplateError("x\ny")],
)
def test_whatever_files_raise_is_one_sentence(error, capsys, monkeypatch):
    def write(folder):
        raise error

    monkeypatch.setattr("r1v2_fast.report.write", write)
    assert main(["report", "x"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("r1v2-fast: ") and "x" in said and said.count("\n") == 1


def test_an_interrupted_command_is_one_line(capsys, monkeypatch):
    def write(folder):
        raise KeyboardInterrupt

    monkeypatch.setattr("r1v2_fast.report.write", write)
    assert main(["report", "x"]) == 130
    assert capsys.readouterr().err == "r1v2-fast: interrupted\n"


def test_a_report_that_fails_fails_no_training(tmp_path, capsys, monkeypatch):
    def write(folder):
        raise KeyError("x")

    monkeypatch.setattr("r1v2_fast.train.run.train", lambda *_, **__: tmp_path)
    monkeypatch.setattr("r1v2_fast.report.write", write)
    assert main(["train", "digits"]) == 0
    out, error = capsys.readouterr()
    assert out == f"model   {tmp_path / 'final'}\n"
    assert error == f"r1v2-fast: no report: 'x'; r1v2-fast report {tmp_path} tries again\n"


@pytest.mark.parametrize(
    ("command", "texts"),
    [
        ("filter", ["(default: 256)", "(default: 0)", "(default: 1.0)", "(default: 120.0)", "reward is at least 1"]),
        ("evaluate", ["(default: 256)", "(default: exact_match)", "(default: auto)", "reward is at least 1"]),
        ("chat", ["(default: 512)", "(default: 0.0)"]),
        ("export", ["(default: final)"]),
    ],
)
def test_help_shows_the_defaults(command, texts, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(text in shown for text in texts) and "(default: None)" not in shown and "(default: False)" not in shown


@pytest.mark.parametrize("option", ["--records", "--batch-size", "--max-new-tokens", "--max-tiles"])
def test_evaluate_checks_its_numbers(folder, option, capsys):
    assert main(["evaluate", str(folder / "final"), str(folder / "data" / "heldout_clean.jsonl"), option, "0"]) == 2
    assert capsys.readouterr().err == f"r1v2-fast: {option} must be at least 1, got 0\n"


def test_evaluate_writes_json_and_nothing_else(folder, tmp_path, capsys):
    (tmp_path / "loud.py").write_text(
        "print('imported')\n"
        "def loud(completions, **rest):\n    print('called')\n    return [None for _ in completions]\n"
    )
    arguments = ["evaluate", str(folder / "final"), str(folder / "data" / "heldout_clean.jsonl"), "--records", "3"]
    assert main([*arguments, "--score", f"{tmp_path / 'loud.py'}:loud"]) == 0
    out, error = capsys.readouterr()
    metrics = json.loads(out, parse_constant=pytest.fail)
    assert metrics["accuracy"] is None and metrics["unscored"] == 1 and "clipped_ratio" in metrics
    assert "imported" in error and "called" in error
