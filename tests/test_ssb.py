"""The SSB study: its buffer does what the simulation does, its figures follow from its lines, and what it found stands."""

import pytest

from bench import record, ssb, ssb_report
from bench.ssb_simulation import Simulation
from r1v2_fast.train.stages import grpo

RESULTS = record.RESULTS / "ssb.jsonl"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Overrides of a study of seconds, with a reward that an unlearnt model differs in."""
    monkeypatch.setattr(grpo, "SelectiveSampleBuffer", grpo.SelectiveSampleBuffer)  # put back what a run records with
    path = tmp_path / "reward.py"
    path.write_text("def zeros(prompts, completions, **_):\n    return [float(c[:1] == '0') for c in completions]\n")
    return [
        "align.steps=2", "align.batch_size=8", "grpo.steps=8", "evaluation.every=4", "evaluation.records=8",
        "data.sizes={align: 16, policy: 64, reward: 8, heldout: 16}", "grpo.buffer.capacity=9",
        f"grpo.rewards=[{{name: answer, function: '{path}:zeros'}}]",
    ]  # fmt: skip


@pytest.mark.parametrize("arm", ["buffer", "samples", "fresher", "signal", "to 60 %"])
def test_every_step_logs_what_the_simulation_says(arm, tmp_path, small):
    ssb._align(tmp_path, 0, small)
    line = ssb._run((tmp_path, {"arm": arm, "prompts": 8, "seed": 0}, small))
    found = line["mechanism"]
    assert found["steps"] == 8 and found["differing"] == 0
    assert found["replayed_tokens"] > 0 and found["share"] > found["share_without"] > 0 and found["staleness"] >= 1
    assert [step for step, _, _ in line["curve"]] == [0, 4, 8]


def test_a_buffer_that_does_something_else_is_seen(tmp_path, small, monkeypatch):
    monkeypatch.setattr(Simulation, "fill", lambda self, target, fresh, step: self.held[: target - fresh])
    ssb._align(tmp_path, 0, small)
    assert ssb._run((tmp_path, {"arm": "buffer", "prompts": 8, "seed": 0}, small))["mechanism"]["differing"] > 0


def line(arm, seed, curve, updates):
    return {
        "arm": arm,
        "prompts": 4,
        "seed": seed,
        "curve": curve,
        "final": curve[-1][2],
        "updates": updates,
        "mechanism": None,
    }


def test_differences_are_paired_at_equal_rollouts_and_at_equal_updates():
    lines = [
        line("plain", 0, [[0, 0, 0.2], [10, 5, 0.4], [20, 10, 0.6]], 10),
        line("buffer", 0, [[0, 0, 0.2], [10, 10, 0.6], [20, 20, 0.7]], 20),
        line("plain", 1, [[0, 0, 0.2], [10, 5, 0.4], [20, 10, 0.5]], 10),
        line("buffer", 1, [[0, 0, 0.2], [10, 10, 0.4], [20, 20, 0.5]], 20),
        line("buffer", 2, [[0, 0, 0.2]], 20),
    ]
    found = ssb_report.compared({(ln["arm"], 4, ln["seed"]): ln for ln in lines}, "buffer", 4)
    assert found["rollouts"] == pytest.approx([0.1, 0.0]) and found["updates"] == pytest.approx([0.0, -0.1])
    assert found["plain_to"] == [20 * 4 * 8] * 2 and found["arm_to"] == [10 * 4 * 8, 20 * 4 * 8]
    assert ssb_report.mean_and_error([0.1, 0.0]) == pytest.approx((0.05, 0.05))
    assert ssb_report.at_updates([[0, 0, 0.0], [10, 4, 0.4]], 1) == pytest.approx(0.1)
    assert ssb_report.worse(lines) == []
    bad = [{**ln, "final": ln["final"] - (0.3 + ln["seed"] / 100) * (ln["arm"] == "buffer")} for ln in lines]
    assert ssb_report.worse(bad) == [4]


def test_what_the_study_found_stands():
    """5 paired seeds at 8, 16 and 32 prompts; the mechanism in every step; the shipped default not worse by 2 errors."""
    lines = record.read(RESULTS)
    for arm in ssb.MAIN:
        for prompts in ssb.PROMPTS:
            assert len({ln["seed"] for ln in lines if (ln["arm"], ln["prompts"]) == (arm, prompts)}) >= 5
    assert all(ln["mechanism"]["differing"] == 0 for ln in lines if ln["mechanism"])
    assert sum(ln["mechanism"]["steps"] for ln in lines if ln["arm"] == "buffer") == 15 * 300
    assert ssb_report.worse(lines) == []
