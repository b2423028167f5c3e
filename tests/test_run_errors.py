"""What goes wrong in a run is one sentence that names file, record and field, and the run resumes once it is mended."""

import json
import os
import shutil
import signal
import struct
import zlib
from pathlib import Path

import pytest
import torch

from r1v2_fast import config
from r1v2_fast.atomic import digest
from r1v2_fast.cli import main
from r1v2_fast.log import Log, read
from r1v2_fast.parallel.stored import INDEX, file_of
from r1v2_fast.stop import Stopped
from r1v2_fast.train import run

TENSORS = file_of(0)

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_data"
REWARD = '''
import math, time
from pathlib import Path

HERE = Path(__file__).parent


def count(prompts, completions, **columns):
    """Trouble comes with a file beside this one, for the answers to one record."""
    rewards = []
    for completion, answer in zip(completions, columns["answer"]):
        if answer == "72" and (HERE / "nan").exists():
            rewards.append(math.nan)
        elif answer == "72" and (HERE / "raise").exists():
            raise KeyError("gold")
        elif answer == "72" and (HERE / "hang").exists():
            time.sleep(3600)
        else:
            rewards.append(float(len(completion) % 3))
    return rewards
'''


@pytest.fixture
def place(tmp_path):
    """A copy of the example's data, with a reward of its own."""
    shutil.copytree(EXAMPLE, tmp_path / "data")
    (tmp_path / "reward.py").write_text(REWARD)
    return tmp_path


def recipe(place, name, *more):
    overrides = [
        f"run.folder={place / name}", f"data.folder={place / 'data'}", "run.stages=[grpo]", "grpo.steps=6",
        f"grpo.rewards=[{{name: count, function: '{place}/reward.py:count', time_limit: 2}}]", "grpo.sampling.prompts=4",
        "grpo.informative_from=count", "checkpoint.every=2", "evaluation.every=3", *more,
    ]  # fmt: skip
    return config.load(str(EXAMPLE / "recipe.yaml"), overrides)


def stopped(place, monkeypatch, *more):
    """A run that left at a signal after step 3 of 6."""
    log_step = Log.step

    def signalled(self, stage, step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return log_step(self, stage, step, metrics)

    with monkeypatch.context() as patch:
        patch.setattr(Log, "step", signalled)
        with pytest.raises(Stopped):
            run.train(recipe(place, "run", *more))


def assert_resumes(place, *more):
    """The mended run ends as one that met no trouble."""
    whole, folder = run.train(recipe(place, "whole", *more)), run.train(recipe(place, "run", *more), resume=True)
    left, right = ([{**ln, "time": 0, "step_time": 0} for ln in read(f / "metrics.jsonl")] for f in (whole, folder))
    assert left == right
    assert (whole / "final/model.safetensors").read_bytes() == (folder / "final/model.safetensors").read_bytes()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


BOMB = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 0, 0, 0, 0)) + chunk(b"IEND", b"")


def edit(place, record, **fields):
    path = place / "data" / "records.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        if row["id"] == record:
            row.update(fields)
    path.write_text("\n".join(map(json.dumps, rows)))


def outside(place):
    (place / "secret.png").write_bytes((EXAMPLE / "images" / "3.png").read_bytes())
    edit(place, "one-image", images=["../secret.png"])


def picture(data):
    def spoil(place):
        path = place / "data" / "images" / "3.png"
        path.unlink() if data is None else path.write_bytes(data)

    return spoil


AT = r"records.jsonl line \d \(id '%s'\), field '%s': "
TROUBLES = {
    "missing image": (picture(None), AT % ("one-image", "images") + ".*'images/3.png'.*no such file"),
    "truncated image": (picture((EXAMPLE / "images" / "3.png").read_bytes()[:100]), AT % ("one-image", "images")),
    "decompression bomb": (picture(BOMB), AT % ("one-image", "images") + ".*900000000"),
    "outside the root": (outside, AT % ("one-image", "images") + ".*leaves the data root"),
    "no image for its mark": (
        lambda place: edit(place, "one-image", images=[]),
        AT % ("one-image", "images") + "the prompt has 1 <image> marks, got 0",
    ),
    "image tokens in the text": (
        lambda place: edit(place, "text", prompt="Add <IMG_CONTEXT> the digits 3 4."),
        r"records.jsonl line \d \(id 'text'\).*the templated prompt holds 1 image placeholders, the record has 0",
    ),
    "empty dataset": (
        lambda place: (place / "data" / "records.jsonl").write_text(""),
        "records.jsonl holds no records",
    ),
    "NaN reward": (
        lambda place: (place / "nan").touch(),
        r"reward 'count'.*records.jsonl line \d \(id 'messages'\).*nan.*skip",
    ),
    "reward that raises": (
        lambda place: (place / "raise").touch(),
        r"reward 'count' raised KeyError.*records.jsonl line \d \(id 'messages'\)",
    ),
    "reward that hangs": (
        lambda place: (place / "hang").touch(),
        r"reward 'count'.* 2.*records.jsonl line \d \(id 'messages'\)",
    ),
}


@pytest.mark.parametrize("name", TROUBLES)
def test_trouble_is_one_sentence_and_the_mended_run_resumes(name, place, monkeypatch):
    spoil, message = TROUBLES[name]
    stopped(place, monkeypatch, "grpo.sampling.prompts=8")
    kept = shutil.copytree(place / "data", place / "kept")
    spoil(place)
    with pytest.raises((ValueError, RuntimeError), match=message) as raised:
        run.train(recipe(place, "run", "grpo.sampling.prompts=8"), resume=True)
    assert "\n" not in str(raised.value)
    for flag in ("nan", "raise", "hang"):
        (place / flag).unlink(missing_ok=True)
    shutil.rmtree(place / "data")
    shutil.copytree(kept, place / "data")
    assert_resumes(place, "grpo.sampling.prompts=8")


def test_a_nan_reward_may_be_skipped_instead(place):
    (place / "nan").touch()
    more = [
        "grpo.sampling.prompts=8",
        f"grpo.rewards=[{{name: count, function: '{place}/reward.py:count', on_nan: skip}}]",
    ]
    folder = run.train(recipe(place, "run", *more))
    lines = [line for line in read(folder / "metrics.jsonl") if "step_time" in line]
    assert {line["rewards/count/unscored"] for line in lines} == {1 / 8}
    assert all(line.get("loss") is None or abs(line["loss"]) < 1e3 for line in lines)


def test_an_image_processor_that_disagrees_with_the_model_names_the_record(place, monkeypatch):
    from r1v2_fast.data.collate import PromptEncoder

    encode = PromptEncoder.encode
    monkeypatch.setattr(PromptEncoder, "encode", lambda self, record, tiles: [*encode(self, record, tiles)[:-4], 6])
    with pytest.raises(ValueError, match=r"field 'prompt': its text makes \d+ image tokens, its images need \d+"):
        run.train(recipe(place, "run"))


def test_a_text_that_no_tokenizer_takes_is_named(place):
    edit(place, "two-images", response="\ud800")
    with pytest.raises(
        ValueError, match=r"records.jsonl line \d \(id 'two-images'\), field 'response': the tokenizer does not"
    ):
        run.train(recipe(place, "run", "run.stages=[align]"))


def test_a_buffer_without_priorities_names_the_checkpoint_and_the_unit(place, monkeypatch):
    from safetensors.torch import load_file, save_file

    stopped(place, monkeypatch)
    path = place / "run" / "checkpoints" / "grpo-000003"
    kept = shutil.copytree(path, place / "kept")
    tensors = load_file(path / TENSORS)
    names = [name for name in tensors if name.startswith("stage/buffer/") and name.endswith("/advantages")]
    assert names
    save_file({n: torch.zeros_like(t) if n in names else t for n, t in tensors.items()}, path / TENSORS)
    state = json.loads((path / INDEX).read_text())
    state["files"] = {TENSORS: {"bytes": (path / TENSORS).stat().st_size, "blake2b": digest(path / TENSORS)}}
    (path / INDEX).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"grpo-000003.*unit 0 of the buffer's state.*one of them not 0, got \[0.0"):
        run.train(recipe(place, "run"), resume=True)
    shutil.rmtree(path)
    shutil.copytree(kept, path)
    assert_resumes(place)


@pytest.mark.parametrize("more", [["grpo.rewards=[{name: count, function: exact_match}]"], []])
def test_a_misspelt_answer_column_is_named(more, place):
    path = place / "data" / "records.jsonl"
    path.write_text(path.read_text().replace('"answer"', '"anwser"'))
    with pytest.raises(
        ValueError, match=r"records.jsonl, field 'answer': exact_match compares with it, and no record has"
    ):
        run.train(recipe(place, "run", *more))
    assert not (place / "run" / "metrics.jsonl").exists()


def test_an_evaluation_is_over_what_could_be_scored_and_says_how_much_could_not(place):
    for record in ("one-image", "two-images"):
        edit(place, record, answer=None)
    folder = run.train(recipe(place, "run", "grpo.steps=1"))
    line = next(line for line in read(folder / "metrics.jsonl") if "eval/own/accuracy" in line)
    assert line["eval/own/unscored"] == 2 / 8
    (place / "one.py").write_text(
        "def nan(completions, **_):\n    return [1.0] + [float('nan')] * (len(completions) - 1)\n"
    )
    score = f"evaluation.score={place}/one.py:nan"
    with pytest.raises(ValueError, match=r"reward '.*nan' of sample .*records.jsonl line 2 .*finite"):
        run.train(recipe(place, "b", score))
    folder = run.train(recipe(place, "c", score, "evaluation.on_nan=skip", "grpo.steps=1"))
    line = next(line for line in read(folder / "metrics.jsonl") if "eval/own/accuracy" in line)
    assert (line["eval/own/unscored"], line["eval/own/accuracy"]) == (7 / 8, 1.0)


def test_a_full_disk_under_the_metrics_is_a_sentence(place, monkeypatch):
    with pytest.raises(RuntimeError, match=r"cannot write /dev/full: .*No space left on device; make room and resume"):
        log = Log(place)
        log.metrics_path = Path("/dev/full")
        log.evaluation("grpo", 0, {"eval/own/accuracy": 1.0})


def test_an_unknown_key_leaves_the_run_as_it_is(place, monkeypatch, capsys):
    stopped(place, monkeypatch)
    before = sorted((p, p.stat().st_mtime_ns) for p in (place / "run").rglob("*"))
    command = ["train", str(place / "run" / "recipe.yaml"), "grpo.sampling.promts=3", "--resume"]
    assert main(command) == 2
    assert "unknown key 'grpo.sampling.promts'; did you mean 'prompts'" in capsys.readouterr().err
    assert sorted((p, p.stat().st_mtime_ns) for p in (place / "run").rglob("*")) == before
    assert_resumes(place)


def test_the_command_line_leaves_with_the_signals_status(place, monkeypatch, capsys):
    log_step = Log.step

    def signalled(self, stage, step, metrics):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return log_step(self, stage, step, metrics)

    path = place / "recipe.yaml"
    import yaml

    path.write_text(yaml.safe_dump(recipe(place, "run").model_dump(mode="json")))
    monkeypatch.setattr(Log, "step", signalled)
    assert main(["train", str(path)]) == 128 + signal.SIGTERM
    assert "--resume" in capsys.readouterr().err
    monkeypatch.setattr(Log, "step", log_step)
    assert main(["train", str(path), "--resume"]) == 0
