"""Rules, hallucination, and how reward functions are loaded and called."""

import math

import pytest

from r1v2_fast.judge.hallucination import hallucinated, rates
from r1v2_fast.judge.reward import load_reward, score
from r1v2_fast.judge.rules import exact_match, math_answer, think_format


def test_the_final_answer_stands_behind_the_thought():
    completions = ["<think>3 8</think>11", "<think>3 8</think> 11 ", "11", "<think>11</think>12", "<think>11"]
    assert exact_match([""] * 5, completions, answer=["11"] * 5) == [1, 1, 1, 0, 0]


def test_math_answers_may_be_written_differently():
    completions = ["<think>x</think>$\\frac{1}{2}$", "0.5", "1/3"]
    assert math_answer([""] * 3, completions, answer=["1/2"] * 3) == [1, 1, 0]


@pytest.mark.parametrize(
    ("completion", "formed"),
    [
        ("<think>3 8</think>11", 1),
        ("<think></think>11", 0),
        ("<think>3</think>", 0),
        ("11", 0),
        ("<think>3</think>4</think>5", 0),
        ("a<think>3</think>4", 0),
        ("<think>3<think>4</think>5", 0),
    ],
)
def test_the_format_is_one_thought_and_an_answer(completion, formed):
    assert think_format([""], [completion]) == [formed]


@pytest.mark.parametrize(
    ("thought", "digits", "expected"),
    [
        ("3 8", "3 8", False),
        ("8 3", "3 8", False),  # misplaced, but both are there
        ("3 3", "3 8", True),
        ("3 8 1", "3 8", True),
        ("3 _", "3 _", False),
        ("3 3", "3 _", True),
        ("_ 3", "3 _", True),  # a digit where the half is empty
        ("_ _", "3 8", False),
    ],
)
def test_hallucination_is_a_digit_that_is_not_there(thought, digits, expected):
    assert hallucinated(f"<think>{thought}</think>1", digits) is expected


def test_rates_split_by_right_and_wrong_answers():
    found = rates(["<think>1 2</think>3", "<think>1 9</think>3"], ["1 2", "1 2"], [True, False])
    assert found == {"hallucination": 0.5, "hallucination/right": 0.0, "hallucination/wrong": 1.0}
    assert math.isnan(rates(["x"], ["1 2"], [True])["hallucination/wrong"])


def test_a_reward_loads_from_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "def short(prompts, completions, **columns):\n    return [float(len(c) < 3) for c in completions]\n"
    )
    assert load_reward(f"{path}:short")(prompts=["", ""], completions=["ab", "abc"]) == [1.0, 0.0]
    for spec, message in (
        (f"{path}:long", "no function 'long'"),
        ("none.py:f", "no such file"),
        ("exact", "must be one of"),
    ):
        with pytest.raises(ValueError, match=message):
            load_reward(spec)


def test_a_failing_reward_is_named_with_the_samples():
    def fails(**_):
        raise KeyError("gold")

    with pytest.raises(RuntimeError, match="'mine' raised KeyError on samples a to b"):
        score("mine", fails, ["", ""], ["", ""], {}, ["a", "b"])
    with pytest.raises(ValueError, match="list of 2 numbers, got 1"):
        score("mine", lambda **_: [1.0], ["", ""], ["", ""], {}, ["a", "b"])
    with pytest.raises(ValueError, match="of sample b: expected a number, got 'x'"):
        score("mine", lambda **_: [1.0, "x"], ["", ""], ["", ""], {}, ["a", "b"])
    assert math.isnan(score("mine", lambda **_: [None], [""], [""], {}, ["a"])[0])
