"""Rules, hallucination, and how reward functions are loaded and called."""

import contextlib
import copy
import math
import re
import signal
import sys
import time

import numpy as np
import pytest
import torch

from r1v2_fast.judge.hallucination import hallucinated, rates, readable
from r1v2_fast.judge.reward import load_reward, score
from r1v2_fast.judge.rules import exact_match, math_answer, soft_overlong, think_format
from r1v2_fast.judge.time_limit import SIGNAL, OutOfTime, time_limit


def test_the_final_answer_stands_behind_the_thought():
    completions = ["<think>3 8</think>11", "<think>3 8</think> 11 ", "11", "<think>11</think>12", "<think>11"]
    assert exact_match([""] * 5, completions, answer=["11"] * 5) == [1, 1, 1, 0, 0]


def test_math_answers_may_be_written_differently():
    completions = ["<think>x</think>$\\frac{1}{2}$", "0.5", "1/3"]
    assert math_answer([""] * 3, completions, answer=["1/2"] * 3) == [1, 1, 0]


@pytest.mark.parametrize("rule", [exact_match, math_answer])
def test_records_without_an_answer_are_unscorable(rule):
    assert rule([""] * 2, ["7", "8"], answer=[None, "8"]) == [None, 1.0]
    assert rule([], [], answer=[]) == []


def test_the_soft_over_length_punishment_falls_over_the_cache():
    assert soft_overlong([0, 80, 81, 90, 100, 101, 999], max_length=100, cache=20) == [0, 0, -0.05, -0.5, -1, -1, -1]
    for cache in (0, 101):
        with pytest.raises(ValueError, match=f"at most at max_length = 100, got {cache}"):
            soft_overlong([1], max_length=100, cache=cache)


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


def test_only_two_halves_are_readable_digits():
    assert all(map(readable, ("3 8", "3 _", "_ 0")))
    assert not any(map(readable, ("38", "3 8 1", "three 8", "3", "", "3 8\n", 38, None, ["3", "8"])))


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


def test_a_reward_file_runs_once_and_may_hold_a_dataclass(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Weight:\n    value: float\n\ndef f(**_): ...\n"
    )
    assert load_reward(f"{path}:f") is load_reward(f"{path}:f")


def test_a_reward_file_may_import_what_lies_beside_it(tmp_path):
    (tmp_path / "helper_beside_reward.py").write_text("def one(c): return 1.0\n")
    path = tmp_path / "mine.py"
    path.write_text(
        "import helper_beside_reward as h\n\ndef f(completions, **_): return [h.one(c) for c in completions]\n"
    )
    before = list(sys.path)
    assert load_reward(f"{path}:f")(completions=["x"]) == [1.0]
    (tmp_path / "bad.py").write_text("import no_such_module")
    with pytest.raises(ValueError, match="bad.py raised"):
        load_reward(f"{tmp_path}/bad.py:f")
    assert sys.path == before


def test_a_reward_file_that_raises_is_named_and_may_be_repaired(tmp_path):
    path = tmp_path / "mine.py"
    for source, message in (
        ("import no_such_module", "mine.py raised ModuleNotFoundError at import: No module named 'no_such_module'"),
        ("def f(:", "mine.py raised SyntaxError at import: .*line 1"),
        ("raise SystemExit(2)", "mine.py raised SystemExit at import: 2"),
    ):
        path.write_text(source)
        with pytest.raises(ValueError, match=message):
            load_reward(f"{path}:f")
    path.write_text("def f(prompts, completions, **columns):\n    return [1.0 for c in completions if c]\n")
    assert load_reward(f"{path}:f")([""], ["x"]) == [1.0]


SAMPLES = ["line 1", "line 2", "line 3"]


def scored(function, completions=("a", "b", "c"), **options) -> list[float]:
    samples = SAMPLES[: len(completions)]
    columns = {"answer": [c.upper() for c in completions]}
    return score("mine", function, [""] * len(completions), list(completions), columns, samples, **options)


@pytest.mark.parametrize(
    "values",
    [
        [1, 0.5, False],
        (1.0, 0.5, 0.0),
        [np.float32(1), np.float16(0.5), np.bool_(False)],
        [torch.tensor(1), torch.tensor(0.5, dtype=torch.bfloat16), np.array(0)],
        np.array([1, 0.5, 0]),
        torch.tensor([1, 0.5, 0], requires_grad=True),
    ],
    ids=["python", "tuple", "numpy scalars", "0-d tensors", "numpy", "torch"],
)
def test_numbers_come_in_many_types(values):
    found = scored(lambda **_: values)
    assert found == [1.0, 0.5, 0.0]
    assert {type(value) for value in found} == {float}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "'mine' must return a list of 3 numbers, got 1"),
        (torch.zeros(2), "'mine' must return a list of 3 numbers, got 2"),
        (torch.zeros(3, 1), r"list of 3 numbers, got tensor\(\["),
        (None, "list of 3 numbers, got None"),
        ("abc", "list of 3 numbers, got 'abc'"),
        ([1.0, "x", 1.0], "'mine' of sample line 2: expected a number, got 'x'"),
        ([1.0, 1.0, torch.zeros(2)], "of sample line 3: expected a number, got tensor"),
        ([1.0, np.zeros((2, 2)), 1.0], "of sample line 2: expected a number, got array"),
    ],
)
def test_what_is_not_a_number_a_completion_is_named(values, message):
    with pytest.raises(ValueError, match=message) as error:
        scored(lambda **_: values)
    assert "\n" not in str(error.value)


def test_none_is_unscorable():
    assert np.isnan(scored(lambda **_: [None] * 3)).all()


@pytest.mark.parametrize("bad", [math.nan, -math.inf, np.float32("inf"), torch.tensor(math.nan)])
def test_a_reward_that_is_not_finite_stops_the_run_or_leaves_its_sample_out(bad):
    def function(**_):
        return [1.0, bad, None]

    long = "b" * 1000 + "the end"
    with pytest.raises(
        ValueError, match=r"'mine' of sample line 2: .* got -?(nan|inf) for .*the end'; on_nan skip"
    ) as e:
        scored(function, ("a", long, "c"))
    assert len(str(e.value)) < 300
    assert np.array_equal(scored(function, on_nan="skip"), [1.0, math.nan, math.nan], equal_nan=True)


@pytest.mark.parametrize("bad", [10**400, -(10**5000), 1e39], ids=["large", "larger", "float"])
def test_what_no_float32_holds_is_not_finite(bad):
    with pytest.raises(ValueError, match="'mine' of sample line 2: expected a finite number or None, got (an int|1e)"):
        scored(lambda **_: [1.0, bad, 0])
    assert np.array_equal(scored(lambda **_: [1, bad, 0], on_nan="skip"), [1, math.nan, 0], equal_nan=True)


def test_a_reward_cannot_change_the_records():
    prompts, columns = [[{"role": "user", "content": "x"}]], {"answer": ["1"], "boxes": [[1, {"a": 2}]]}
    before = copy.deepcopy((prompts, columns))

    def spoils(prompts, completions, answer, boxes):
        prompts[0][0]["content"] = "spoilt"
        prompts[0].append({})
        boxes[0][1].clear()
        return [1.0]

    assert score("mine", spoils, prompts, ["c"], columns, SAMPLES[:1]) == [1.0]
    assert (prompts, columns) == before


def test_a_message_of_many_lines_comes_out_as_one(tmp_path):
    def fails(**_):
        raise ValueError("first\n  second\n")

    with pytest.raises(RuntimeError, match="raised ValueError on sample line 1: first second$"):
        scored(fails)
    (tmp_path / "mine.py").write_text("raise ValueError('first\\nsecond')")
    with pytest.raises(ValueError, match="at import: first second$"):
        load_reward(f"{tmp_path}/mine.py:f")


def test_a_reward_that_raises_is_named_with_the_one_sample():
    def fails(prompts, completions, answer):
        return [{"A": 1.0, "C": 1.0}[a] for _, _, a in zip(prompts, completions, answer, strict=True)]

    with pytest.raises(RuntimeError, match="'mine' raised KeyError on sample line 2: 'B'") as error:
        scored(fails)
    assert isinstance(error.value.__cause__, KeyError)
    assert scored(fails, ("a", "c")) == [1.0, 1.0]


def test_samples_that_fail_only_together_are_named_as_a_range():
    def fails(completions, **_):
        if len(completions) > 1:
            raise KeyError("gold")
        raise ZeroDivisionError("the spread of one sample")

    with pytest.raises(RuntimeError, match="'mine' raised KeyError on samples line 1 to line 3: 'gold'"):
        scored(fails)


def test_ctrl_c_passes_through():
    def leaves(**_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scored(leaves, time_limit=5)


@pytest.mark.parametrize("limit", [None, 5])
def test_a_reward_that_exits_is_named_with_the_one_sample(limit):
    def exits(completions, **_):
        return [sys.exit() if c == "b" else 1.0 for c in completions]

    with pytest.raises(RuntimeError, match="'mine' raised SystemExit on sample line 2"):
        scored(exits, time_limit=limit)


def loop() -> None:
    while True:
        pass


def stubborn() -> None:
    while True:
        try:
            loop()
        except Exception:
            return


def swallow() -> None:
    for _ in range(3):
        with contextlib.suppress(BaseException):
            loop()


HANGS = {
    "loop": loop,
    "sleep": lambda: time.sleep(60),
    "except Exception": stubborn,
    "bare except": swallow,
    "regular expression": lambda: re.match(r"(a+)+$", "a" * 50 + "b"),
    "huge integer": lambda: 7 ** (7**12),
}


@pytest.mark.parametrize("hang", HANGS.values(), ids=HANGS)
def test_a_reward_that_hangs_is_stopped_and_named_with_the_one_sample(hang):
    def hangs(completions, **_):
        return [hang() or 0.0 if c == "b" else 1.0 for c in completions]

    start = time.monotonic()
    with pytest.raises(RuntimeError, match="'mine' gave no answer within 0.2 s on sample line 2") as error:
        scored(hangs, time_limit=0.2)
    assert time.monotonic() - start < 5
    assert isinstance(error.value.__cause__, OutOfTime)
    assert scored(hangs, ("a", "c"), time_limit=5) == [1.0, 1.0]


def test_a_batch_that_is_slow_without_one_slow_sample_is_named_as_a_range():
    def slow(completions, **_):
        time.sleep(0.15 * len(completions))

    with pytest.raises(RuntimeError, match="within 0.4 s on samples line 1 to line 3"):
        scored(slow, time_limit=0.4)


def test_finding_the_sample_takes_no_longer_than_the_limit_again():
    def slow(completions, **_):
        time.sleep(0.1)
        if len(completions) > 1:
            raise KeyError("gold")

    start = time.monotonic()
    with pytest.raises(RuntimeError, match="on samples 0 to 99"):
        score("mine", slow, [""] * 100, [""] * 100, {}, [str(i) for i in range(100)], time_limit=0.5)
    assert time.monotonic() - start < 3


def test_a_reward_in_time_meets_no_signal_later():
    before = signal.getsignal(SIGNAL)
    assert scored(lambda **_: [1.0] * 3, time_limit=0.05) == [1.0] * 3
    assert signal.getsignal(SIGNAL) is before
    assert signal.getitimer(signal.ITIMER_VIRTUAL) == (0.0, 0.0)
    time.sleep(0.15)
    with pytest.raises(KeyError), time_limit(5):
        raise KeyError
    assert signal.getsignal(SIGNAL) is before


def test_a_block_that_ends_as_its_time_does_is_in_time_or_out_of_it_and_nothing_else():
    before = signal.getsignal(SIGNAL)
    for microseconds in range(1500, 2500, 4):
        end = time.monotonic() + microseconds * 1e-6
        try:
            with time_limit(0.002):
                while time.monotonic() < end:
                    pass
        except OutOfTime:
            pass
        assert signal.getsignal(SIGNAL) is before


def test_time_limits_do_not_nest_and_are_above_zero():
    with pytest.raises(RuntimeError, match="do not nest"), time_limit(5), time_limit(1):
        pass
    with time_limit(5), time_limit(None):
        pass
    with pytest.raises(ValueError, match="above 0 seconds, got 0"):
        time_limit(0)


def test_another_thread_has_no_limit():
    from concurrent.futures import ThreadPoolExecutor

    def slow(completions, **_):
        time.sleep(0.1)
        return [1.0] * len(completions)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(scored, slow, time_limit=0.01).result() == [1.0] * 3


def test_math_answer_keeps_its_own_alarm_within_a_limit():
    completions = ["$\\frac{1}{2}$", "0.5", "1/3"]
    columns = {"answer": ["1/2"] * 3}
    assert score("math", math_answer, [""] * 3, completions, columns, SAMPLES, time_limit=60) == [1, 1, 0]

    def then_hangs(prompts, completions, **columns):
        math_answer(prompts, completions, **columns)
        loop()

    with pytest.raises(RuntimeError, match="within 0.5 s on sample line 1"):
        score("math", then_hangs, [""], completions[:1], {"answer": ["1/2"]}, SAMPLES[:1], time_limit=0.5)
