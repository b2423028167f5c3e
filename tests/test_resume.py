"""A run that is killed at any moment and resumed equals the one that never stopped, bit for bit."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time

import pytest
import torch

from r1v2_fast import config
from r1v2_fast.atomic import digest
from r1v2_fast.log import Log, read
from r1v2_fast.parallel.stored import INDEX, file_of
from r1v2_fast.stop import Stopped, StopRequest
from r1v2_fast.train import run

TENSORS = file_of(0)

OVERRIDES = [
    "align.steps=6", "reward.steps=4", "mpo.steps=5", "grpo.steps=8", "align.batch_size=8", "run.threads=1",
    "data.sizes={align: 64, policy: 64, reward: 32, heldout: 24}", "checkpoint.every=2", "evaluation.every=3",
    "evaluation.records=8", "checkpoint.best=eval/clean/format", "checkpoint.best_is=lowest", "samples_every=2",
    "reward.sampling.prompts=4", "mpo.sampling.prompts=8", "mpo.min_reward_gap=0.0", "grpo.sampling.prompts=6",
    "grpo.mini_batches=2", "grpo.updates_per_rollout=2", "grpo.dynamic_sampling.max_rounds=2", "grpo.loss.kl_coef=0.05",
    "grpo.micro_batch_tokens=800", "grpo.overlong_cache=2",
]  # fmt: skip
LORA = [
    "mpo.lora={llm: {rank: 4}}", "grpo.train=[]", "grpo.lora={llm: {rank: 4}, adapter: {rank: 4}, vision: {rank: 2}}",
    "reward.train=[adapter]", "reward.lora={llm: {rank: 4}}",
]  # fmt: skip


@pytest.fixture
def recipe(tmp_path):
    """Of a folder and further overrides; the reward also draws random numbers, as users' rewards do."""
    path = tmp_path / "reward.py"
    path.write_text(
        "import random\n\n\ndef letters(prompts, completions, **_):\n"
        "    return [float(len(c) % 3) + random.random() / 8 for c in completions]\n"
    )
    term = f"[{{name: answer, function: '{path}:letters'}}]"
    rewards = [f"{stage}.rewards={term}" for stage in ("reward", "mpo", "grpo")]
    rewards.append(
        f"grpo.rewards=[{{name: answer, function: '{path}:letters'}}, {{name: model, function: reward_model}}]"
    )
    return lambda name, *more: config.load("digits", [*OVERRIDES, *rewards, f"run.folder={tmp_path / name}", *more])


def started(recipe, resume):
    """The run in a process of its own that has all imports behind it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["r1v2_fast.train.run"])
    process = context.Process(target=run.train, args=(recipe,), kwargs={"resume": resume})
    process.start()
    return process


def lines_of(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def same(a, b):
    """Everything but the time: metrics, samples, products, the last checkpoint with its buffer, the best policy."""
    for name in ("metrics.jsonl", "samples.jsonl"):
        left, right = ([{**ln, "time": 0, "step_time": 0} for ln in read(folder / name)] for folder in (a, b))
        assert left == right, name
        assert left
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file() and "data" not in p.parts)
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file() and "data" not in p.parts)
    binary = [file for file in files if file.suffix == ".safetensors"]
    assert {str(file.parent) for file in binary} >= {
        "final",
        "best",
        "stages/align",
        "stages/reward",
        "checkpoints/grpo-000008",
    }
    for file in (*binary, *(f for f in files if f.name in (INDEX, "best.json", "config.json"))):
        assert (a / file).read_bytes() == (b / file).read_bytes(), file
    state = json.loads((a / "checkpoints" / "grpo-000008" / INDEX).read_text())
    assert len(state["meta"][0]["buffer"]["units"]) > 3


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], LORA], ids=["full", "lora"])
def test_twenty_kills_at_random_moments_change_no_bit(more, tmp_path, recipe):
    whole = started(recipe("whole", *more), resume=False)
    whole.join()
    assert whole.exitcode == 0
    total = lines_of(tmp_path / "whole")
    rng = random.Random(int.from_bytes(os.urandom(4), "little"))
    moments = sorted(rng.randrange(total - 1) for _ in range(20))
    killed = []
    for attempt, moment in enumerate(moments):
        process = started(recipe("killed", *more), resume=attempt > 0)
        while process.is_alive() and lines_of(tmp_path / "killed") < moment:
            time.sleep(0.002)
        process.join(rng.random() * 0.3)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        killed.append(process.exitcode == -signal.SIGKILL)
        assert process.exitcode in (0, -signal.SIGKILL)
    last = started(recipe("killed", *more), resume=True)
    last.join()
    assert last.exitcode == 0
    assert sum(killed) >= 18, f"too few kills landed inside the run: {killed} behind lines {moments} of {total}"
    same(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_two_threads_give_the_same_bits_in_every_process(tmp_path, recipe):
    """Without PyTorch's deterministic algorithms such processes part within these 40 steps."""
    more = ["run.stages=[align]", "run.threads=2", "align.steps=40", "align.batch_size=64", "evaluation.every=99"]
    more.append("data.sizes={align: 4000, policy: 8, reward: 8, heldout: 20}")
    found = []
    for name in ("a", "b", "c"):
        process = started(recipe(name, *more), resume=False)
        process.join()
        assert process.exitcode == 0
        found.append([line.get("loss") for line in read(tmp_path / name / "metrics.jsonl")])
    assert found[0] == found[1] == found[2] and len(found[0]) == 41


@pytest.fixture
def short(tmp_path, recipe):
    """GRPO alone."""
    more = ["run.stages=[grpo]", f"grpo.rewards=[{{name: answer, function: '{tmp_path}/reward.py:letters'}}]"]
    return lambda name, *others: recipe(name, *more, *others)


def stopped_at(monkeypatch, step, act):
    """`act` once, in the middle of this step's metrics line."""
    log_step = Log.step

    def step_and_act(self, stage, at, metrics):
        if at == step:
            monkeypatch.setattr(Log, "step", log_step)
            act()
        return log_step(self, stage, at, metrics)

    monkeypatch.setattr(Log, "step", step_and_act)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_checkpoints_the_step_and_leaves(signum, tmp_path, short, monkeypatch):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    whole = run.train(short("whole"))
    stopped_at(monkeypatch, 4, lambda: os.kill(os.getpid(), signum))
    with pytest.raises(Stopped, match="after step 5 of grpo, checkpointed") as stopped:
        run.train(short("b"))
    assert stopped.value.status == 128 + signum
    assert (tmp_path / "b" / "checkpoints" / "grpo-000005").is_dir()
    assert handlers == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    again = run.train(short("b"), resume=True)
    for name in ("metrics.jsonl", "samples.jsonl"):
        left, right = ([{**ln, "time": 0, "step_time": 0} for ln in read(f / name)] for f in (whole, again))
        assert left == right
    assert (whole / "final/model.safetensors").read_bytes() == (again / "final/model.safetensors").read_bytes()


def interrupted_after_every_product(recipe, name, monkeypatch, *more):
    """The run, stopped each time a stage's product stands, and resumed."""
    write, written = run.write_folder, []

    def write_and_stop(path, content):
        write(path, content)
        if path.parent.name == "stages" and path.name not in written:
            written.append(path.name)
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_folder", write_and_stop)
        for attempt in range(6):
            try:
                return run.train(recipe(name, *more), resume=attempt > 0), written
            except KeyboardInterrupt:
                continue
    raise AssertionError(f"never finished, wrote {written}")


@pytest.mark.parametrize(
    "more",
    [
        ["model.dtype=bfloat16"],
        ["reward.train=[adapter, vision]"],
        ["mpo.train=[adapter, vision]", "mpo.steps=2", "grpo.lora={vision: {rank: 2}}"],
        ["run.stages=[reward, mpo, grpo]"],  # a model that needs no warm start
    ],
    ids=["bf16", "reward trains vision", "policy trains vision", "reward first"],
)
def test_a_stop_between_stages_changes_no_bit(more, tmp_path, recipe, monkeypatch):
    few = ["align.steps=3", "reward.steps=2", "grpo.steps=3", "evaluation.every=5", "checkpoint.best=null", *more]
    whole = run.train(recipe("whole", *few))
    again, stops = interrupted_after_every_product(recipe, "stopped", monkeypatch, *few)
    assert stops == [p.name for p in sorted((whole / "stages").iterdir(), key=lambda p: p.stat().st_mtime)]
    for name in ("metrics.jsonl", "samples.jsonl"):
        left, right = ([{**ln, "time": 0, "step_time": 0} for ln in read(f / name)] for f in (whole, again))
        assert left == right
    assert (whole / "final/model.safetensors").read_bytes() == (again / "final/model.safetensors").read_bytes()


def test_an_evaluation_that_draws_random_numbers_resumes_too(tmp_path, short, monkeypatch):
    score = tmp_path / "score.py"
    score.write_text(
        "import random\n\n\ndef s(completions, **_):\n    return [random.random() * 2 for _ in completions]\n"
    )
    more = [f"evaluation.score={score}:s", "grpo.steps=3"]
    whole = run.train(short("whole", *more))
    again, _ = interrupted_after_every_product(short, "stopped", monkeypatch, *more)
    assert [ln.get("eval/clean/accuracy") for ln in read(whole / "metrics.jsonl")] == [
        ln.get("eval/clean/accuracy") for ln in read(again / "metrics.jsonl")
    ]


def say_so_and_sleep(connection):
    connection.send("here")
    time.sleep(30)


def test_children_that_a_reward_forks_end_at_sigterm():
    with StopRequest() as stop:
        fork = multiprocessing.get_context("fork")
        ours, theirs = fork.Pipe()
        child = fork.Process(target=say_so_and_sleep, args=(theirs,))
        child.start()
        assert ours.recv() == "here"  # CPython drops a signal that comes in the first microseconds of a forked child
        child.terminate()
        child.join(10)
        assert child.exitcode == -signal.SIGTERM and stop.signum == 0


def test_a_start_evaluation_and_its_stage_survive_a_resume(tmp_path, short, monkeypatch):
    stopped_at(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        run.train(short("b"))
    folder = run.train(short("b"), resume=True)
    lines = read(folder / "metrics.jsonl")
    assert [line["stage"] for line in lines].count("start") == 1
    assert [line["step"] for line in lines if line["stage"] == "grpo" and "step_time" in line] == list(range(8))


def checkpointed(short, monkeypatch, name="b", *more):
    """A run that left after step 5, with checkpoints of steps 4 and 5."""
    stopped_at(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        run.train(short(name, *more))


@pytest.mark.parametrize("harm", ["cut short", "changed", "no meta", "no tensors"])
def test_a_checkpoint_that_is_not_whole_is_passed_over_and_named(harm, tmp_path, short, monkeypatch, capsys):
    whole = run.train(short("whole"))
    checkpointed(short, monkeypatch)
    newest = tmp_path / "b" / "checkpoints" / "grpo-000005"
    data = bytearray((newest / TENSORS).read_bytes())
    if harm == "cut short":
        (newest / TENSORS).write_bytes(data[: len(data) // 2])
    elif harm == "changed":
        data[-5] ^= 1
        (newest / TENSORS).write_bytes(data)
    else:
        (newest / (INDEX if harm == "no meta" else TENSORS)).unlink()
    capsys.readouterr()
    again = run.train(short("b"), resume=True)
    said = "".join(capsys.readouterr().out.split())  # the terminal breaks lines anywhere
    assert "grpo-000005isnotwhole" in said and "goingbackto" in said and "grpo-000004" in said
    assert (whole / "final/model.safetensors").read_bytes() == (again / "final/model.safetensors").read_bytes()


def test_a_partial_folder_is_never_chosen(tmp_path, short, monkeypatch):
    checkpointed(short, monkeypatch)
    folder = tmp_path / "b" / "checkpoints"
    shutil.copytree(folder / "grpo-000005", folder / "grpo-000007.partial")
    run.train(short("b"), resume=True)
    assert sorted(p.name for p in folder.iterdir()) == ["grpo-000006", "grpo-000007.partial", "grpo-000008"]


def test_a_broken_checkpoint_ahead_does_not_outlive_a_new_one(tmp_path, short, monkeypatch):
    more = ["checkpoint.keep=1"]
    checkpointed(short, monkeypatch, "b", *more)
    folder = tmp_path / "b" / "checkpoints"
    (folder / "grpo-000005" / TENSORS).write_bytes(b"x")
    (folder / ".nfs0001").touch()  # not ours
    stopped_at(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="after step 3"):
        run.train(short("b", *more), resume=True)
    assert sorted(p.name for p in folder.iterdir()) == [".nfs0001", "grpo-000003", "grpo-000005.broken"]


@pytest.mark.parametrize("place", ["best", "stages", "final"])
def test_a_full_disk_under_a_product_is_a_sentence_too(place, tmp_path, short, monkeypatch):
    from r1v2_fast.models.policy import Policy

    save = Policy.save

    def full(self, path, state):
        if f"/{place}" in str(path):
            raise OSError(28, "No space left on device")
        save(self, path, state)

    more = ["grpo.steps=2", "evaluation.every=1"]
    with monkeypatch.context() as patch:
        patch.setattr(Policy, "save", full)
        with pytest.raises(
            RuntimeError, match=rf"cannot write .*{place}.*No space left on device; make room and resume"
        ):
            run.train(short("b", *more))
    run.train(short("b", *more), resume=True)


def test_a_checkpoint_of_another_architecture_names_the_parameter(tmp_path, short, monkeypatch):
    run.train(short("model", "grpo.steps=1"))
    source = ["model.preset=null", f"model.path={tmp_path / 'model' / 'final'}"]
    checkpointed(short, monkeypatch, "b", *source)
    path = tmp_path / "b" / "checkpoints" / "grpo-000005"
    from safetensors.torch import load_file, save_file

    tensors = load_file(path / TENSORS)
    name = next(n for n in tensors if n.startswith("parameter/"))
    wider = {n: torch.cat([t, t]) if n == name else t for n, t in tensors.items()}
    save_file(wider, path / TENSORS)
    state = json.loads((path / INDEX).read_text())
    shape = state["tensors"][name]["shape"]
    state["tensors"][name]["shape"] = [2 * shape[0], *shape[1:]]
    state["files"] = {TENSORS: {"bytes": (path / TENSORS).stat().st_size, "blake2b": digest(path / TENSORS)}}
    (path / INDEX).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"grpo-000005 is a checkpoint of another architecture: parameter '.*' is \("):
        run.train(short("b", *source), resume=True)
    save_file(tensors, path / TENSORS)
    state["tensors"][name]["shape"] = shape
    state["files"] = {TENSORS: {"bytes": (path / TENSORS).stat().st_size, "blake2b": digest(path / TENSORS)}}
    (path / INDEX).write_text(json.dumps(state))
    run.train(short("b", *source), resume=True)


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_intact(tmp_path, short, monkeypatch):
    whole = run.train(short("whole"))
    from r1v2_fast.parallel import stored

    save_file, calls = stored.save_file, []

    def full(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            with open(path, "wb") as stream:
                stream.write(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(stored, "save_file", full)
    with pytest.raises(RuntimeError, match=r"cannot write .*grpo-000004.*No space left.*grpo-000002 is intact"):
        run.train(short("b"))
    assert [p.name for p in (tmp_path / "b" / "checkpoints").iterdir()] == ["grpo-000002"]
    again = run.train(short("b"), resume=True)
    assert (whole / "final/model.safetensors").read_bytes() == (again / "final/model.safetensors").read_bytes()


def test_the_newest_checkpoints_and_the_best_policy_are_kept(tmp_path, short):
    folder = run.train(
        short("a", "checkpoint.keep=3", "checkpoint.every=1", "checkpoint.best=eval/clean/hallucination")
    )
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == [f"grpo-00000{n}" for n in (6, 7, 8)]
    best = json.loads((folder / "best" / "best.json").read_text())
    name = "eval/clean/hallucination"
    seen = [ln[name] for ln in read(folder / "metrics.jsonl") if ln["stage"] == "grpo" and name in ln]
    assert best["value"] == min(seen) and best["metric"] == name
    steps = [ln["step"] for ln in read(folder / "metrics.jsonl") if ln["stage"] == "grpo" and ln.get(name) == min(seen)]
    assert best["step"] == steps[0], "ties keep the earlier one"


def test_what_may_change_at_a_resume_may_and_the_rest_is_named(tmp_path, short, monkeypatch):
    checkpointed(short, monkeypatch)
    with pytest.raises(ValueError, match=r"grpo.optimizer.lr \(0.001 in the run, 0.5 now\)"):
        run.train(short("b", "grpo.optimizer.lr=0.5"), resume=True)
    run.train(short("b", "checkpoint.every=3", "grpo.micro_batch_tokens=500", "samples_every=3"), resume=True)
    with pytest.raises(ValueError, match="holds a run; add --resume"):
        run.train(short("b"))


def test_a_moved_run_resumes_and_a_stage_that_has_not_begun_may_be_mended(tmp_path, recipe, monkeypatch):
    stopped_at(monkeypatch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped):
        run.train(recipe("a"))  # in align
    shutil.move(tmp_path / "a", tmp_path / "moved")
    with pytest.raises(ValueError, match="it differs in align.batch_size"):
        run.train(recipe("moved", "align.batch_size=4"), resume=True)
    folder = run.train(recipe("moved", "grpo.sampling.prompts=4", "mpo.steps=2"), resume=True)
    assert sum("pairs" in line for line in read(folder / "metrics.jsonl") if line["stage"] == "mpo") == 2


def test_a_typo_in_a_later_stage_is_found_before_the_first_step(tmp_path, recipe):
    for more, message in (
        ([f"mpo.rewards=[{{name: answer, function: '{tmp_path}/reward.py:lettres'}}]"], "has no function 'lettres'"),
        (["grpo.data=polici.parquet"], "no such data file: .*polici.parquet"),
        (["grpo.lora={llm: {targets: [qproj]}}"], "lora.llm.targets must be among"),
        (["evaluation.score=exact"], "got 'exact'"),
    ):
        with pytest.raises(ValueError, match=message):
            run.train(recipe("a", *more))
        assert not (tmp_path / "a" / "metrics.jsonl").exists()


def test_a_resume_on_changed_data_says_so(tmp_path, short, monkeypatch, capsys):
    checkpointed(short, monkeypatch)
    capsys.readouterr()
    with (tmp_path / "reward.py").open("a") as reward:
        reward.write("\n# another comment\n")
    run.train(short("b"), resume=True)
    assert "reward.pyhaschangedsincetherunbegan" in "".join(capsys.readouterr().out.split())
