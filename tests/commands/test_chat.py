"""r1v2-fast chat, and what it says in one sentence."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from r1v2_fast.cli import main
from r1v2_fast.rollout.generation import LocalEngine


def picture_of(dataset, index):
    return str(dataset.root / dataset[index].images[0])


def test_chat_gives_the_greedy_answer_and_nothing_else(folder, held_out, capsys):
    dataset, *_, result = held_out
    answers = []
    for index in range(4):
        question = dataset[index].prompt.removeprefix("<image>\n")
        before_question = ["chat", str(folder / "final"), "--image", picture_of(dataset, index), question]
        marked = ["chat", str(folder / "final"), f"<image>\n{question}", "--image", picture_of(dataset, index)]
        for arguments in (before_question, marked):
            assert main([*arguments, "--max-new-tokens", "12"]) == 0
            answers.append(capsys.readouterr().out)
            assert answers[-1] == result.completions[index] + "\n"
    assert len(set(answers)) > 1


def test_chat_goes_on_over_several_questions(folder, held_out, tmp_path):
    dataset, reader, policy, _ = held_out
    said = "Read the digits.\nAdd the digits.\n\nHow many digits?\n"
    command = [sys.executable, "-m", "r1v2_fast", "chat", str(folder / "final"), "--max-new-tokens", "12"]
    done = subprocess.run(
        [*command, "--image", picture_of(dataset, 0)], input=said, capture_output=True, text=True, check=True
    )
    record, history, answers = dataset[0], [], []
    for text in ("<image>\nRead the digits.", "Add the digits."):
        history.append({"role": "user", "content": text})
        asked = type(record)(record.id, list(history), record.images, None, None, None)
        prompt = reader.prompt(dataset, asked)
        (response,) = LocalEngine(policy).generate([prompt], group_size=1, max_new_tokens=12, temperature=0.0)
        answers.append(reader.encoder.decode(response.ids))
        history.append({"role": "assistant", "content": answers[-1]})
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)  # the empty line ended it
    assert "> " not in done.stderr  # a prompt is for a terminal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "nowhere.png", "Read."], "nowhere.png"),
        (["--image", "broken.png", "Read."], "broken.png"),
        (["Read <image>."], "expected 0 <image> marks in the question, one a picture, got 1"),
        (["--image", "good.png", "<image> and <image>."], "expected 1 <image> marks in the question"),
        (["Read.", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["Read.", "--temperature", "inf"], "--temperature must be at least 0 and finite, got inf"),
        (["Read.", "--temperature", "nan"], "--temperature must be at least 0, got nan"),
        (["Read.", "--device", "gpu"], "--device must be auto, cpu, cuda or cuda:1, got 'gpu'"),
        (["Read.", "--device", "cuda:99"], "--device cuda:99 needs a CUDA device"),
        (["Read.", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
    ],
)
def test_chat_says_in_one_sentence_what_is_wrong(folder, tmp_path, options, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("good.png")
    Path("broken.png").write_bytes(Path("good.png").read_bytes()[:40])
    assert main(["chat", str(folder / "final"), *options]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


def test_chat_refuses_a_reward_model(folder, capsys):
    assert main(["chat", str(folder / "stages" / "reward"), "Read."]) == 2
    assert "expected a policy's folder, got a reward model" in capsys.readouterr().err


def test_an_answer_with_a_mark_brings_no_picture_to_the_next_question(folder, held_out, monkeypatch, capsys):
    monkeypatch.setattr("r1v2_fast.data.collate.PromptEncoder.decode", lambda *_: "an <image>")
    monkeypatch.setattr("sys.stdin", io.StringIO("Read the digits.\nAdd the digits.\n"))
    arguments = ["chat", str(folder / "final"), "--image", picture_of(held_out[0], 0), "--max-new-tokens", "2"]
    assert main(arguments) == 0
    assert capsys.readouterr().out == "an <image>\n" * 2
