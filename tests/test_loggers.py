"""External loggers: what each backend is told, what a resume goes on with, and that none of them ends a run."""

import math
import sys
from types import SimpleNamespace

import pytest

from r1v2_fast.loggers import open_loggers


class Recorder(SimpleNamespace):
    """Stands in for the modules wandb and trackio: keeps every call as (name, arguments, keywords)."""

    def __init__(self):
        super().__init__(calls=[], id="run7")

    def __getattr__(self, name):
        def call(*arguments, **keywords):
            self.calls.append((name, arguments, keywords))
            return self

        return call

    def called(self, name):
        return [(arguments, keywords) for called, arguments, keywords in self.calls if called == name]


@pytest.fixture
def fake(monkeypatch):
    def install(name):
        monkeypatch.setitem(sys.modules, name, module := Recorder())
        return module

    return install


@pytest.fixture
def opened(tmp_path):
    """Opens one logger in the same folder each time; its warnings are in `said`."""
    said = []

    def open_one(name, *, resume=False):
        options = {"project": "p", "run": "r", "folder": tmp_path / "run", "config": {"seed": 1}}
        return open_loggers([name], **options, resume=resume, warn=said.append)[0]

    open_one.said = said
    return open_one


def test_wandb_counts_our_steps_and_goes_on_with_the_run_it_had(fake, opened, tmp_path):
    wandb = fake("wandb")
    logger = opened("wandb")
    logger.log({"loss": 0.5, "reward": math.nan, "score": None}, 3)
    logger.close()
    assert [name for name, *_ in wandb.calls] == ["init", "define_metric", "log", "finish"]
    options = {"project": "p", "name": "r", "config": {"seed": 1}, "dir": str(tmp_path / "run"), "resume": "allow"}
    assert wandb.called("init") == [((), options | {"id": None})]
    assert wandb.called("define_metric") == [(("*",), {"step_metric": "step"})]
    assert wandb.called("log") == [(({"loss": 0.5, "step": 3},), {})]

    opened("wandb", resume=True)
    assert wandb.called("init")[-1] == ((), options | {"id": "run7"})
    opened("wandb", resume=False)
    assert wandb.called("init")[-1] == ((), options | {"id": None})


def test_trackio_goes_on_with_the_run_of_that_name(fake, opened):
    trackio = fake("trackio")
    logger = opened("trackio")
    logger.log({"loss": 0.5}, 3)
    logger.log({"loss": None}, 4)
    logger.close()
    opened("trackio", resume=True)
    options = {"project": "p", "name": "r", "config": {"seed": 1}}
    assert trackio.calls == [
        ("init", (), options | {"resume": "never"}),
        ("log", ({"loss": 0.5},), {"step": 3}),
        ("finish", (), {}),
        ("init", (), options | {"resume": "allow"}),
    ]


def test_tensorboard_hides_what_a_run_wrote_after_the_checkpoint_it_resumes_from(opened, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for resume, steps in ((False, range(5)), (True, range(3, 6))):
        logger = opened("tensorboard", resume=resume)
        for step in steps:
            logger.log({"rewards/mine/mean": step + 10.0 * resume, "left": math.nan}, step)
        logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["rewards/mine/mean"]
    values = [(event.step, event.value) for event in events.Scalars("rewards/mine/mean")]
    assert values == [(0, 0), (1, 1), (2, 2), (3, 13), (4, 14), (5, 15)]
    assert b'"seed": 1' in events.Tensors("config/text_summary")[0].tensor_proto.string_val[0]


def test_a_logger_that_raises_is_dropped_with_one_sentence(fake, opened, monkeypatch):
    trackio = fake("trackio")
    logger = opened("trackio")

    def fail(*_, **__):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(trackio, "log", fail)
    for step in (5, 6):
        logger.log({"loss": 1.0}, step)
    logger.close()
    assert opened.said == [
        "logger 'trackio' failed at step 5 and gets no more metrics: ConnectionError: no route to host"
    ]
    assert not trackio.called("finish")

    logger = opened("trackio")
    monkeypatch.setattr(trackio, "finish", fail)
    logger.close()
    logger.close()
    assert opened.said[1:] == ["logger 'trackio' could not be closed: ConnectionError: no route to host"]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_package_says_what_to_install(name, opened, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf"logger '{name}' needs {name}: pip install 'r1v2-fast\[{name}\]'"):
        opened(name)


def test_an_unknown_logger_is_refused(opened):
    with pytest.raises(ValueError, match=r"must be one of \['tensorboard', 'wandb', 'trackio'\], got 'mlflow'"):
        opened("mlflow")
