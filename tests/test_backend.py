"""Choosing a backend: what `auto` takes, what an explicit choice that cannot run says, and what doctor prints."""

import pytest
import torch

from r1v2_fast import doctor
from r1v2_fast.ops import _backend

FAST = ("warp", lambda device: None if device == "cuda" else "it needs a GPU; use backend='torch'")


@pytest.fixture
def op():
    _backend.register("made_up", FAST)
    yield "made_up"
    _backend._CANDIDATES.pop("made_up")


def test_auto_takes_the_first_that_runs(op):
    assert _backend.auto(op, "cpu") == "torch"
    assert _backend.auto(op, "cuda") == "warp"
    assert _backend.pick(op, "auto", torch.zeros(1)) == "torch"


def test_an_explicit_choice_that_cannot_run_is_an_error_with_the_way_out(op):
    with pytest.raises(
        RuntimeError, match="made_up cannot run with backend='warp': it needs a GPU; use backend='torch'"
    ):
        _backend.pick(op, "warp", torch.zeros(1))
    with pytest.raises(ValueError, match=r"must be one of \['auto', 'warp', 'torch'\], got 'wrap'"):
        _backend.pick(op, "wrap", torch.zeros(1))


def test_auto_never_takes_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert _backend.auto("group_advantage", "cpu") == "torch"
    assert _backend.pick("group_advantage", "triton", torch.zeros(1)) == "triton"


def test_a_machine_without_triton_says_so(monkeypatch):
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    assert "triton is not installed" in _backend.triton_why_not("cuda")


def test_doctor_names_every_op_its_choice_and_the_reasons(op, capsys):
    assert doctor.run([]) == 0
    text = capsys.readouterr().out
    for name in ("group_advantage", "linear_logprob", "mpo_loss", "policy_loss", "priority_sample", "made_up"):
        assert f"\n  {name}" in text
    assert "warp is out: it needs a GPU" in text and f"torch {torch.__version__}" in text


def test_doctor_fails_where_a_required_backend_runs_nowhere(capsys):
    assert doctor.run(["torch"]) == 0
    assert doctor.run(["abacus"]) == 1
    assert "required backend 'abacus' cannot run any op here" in capsys.readouterr().out
