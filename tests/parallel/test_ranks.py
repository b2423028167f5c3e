"""Several ranks train what one does: the same losses, samples and weights, in fp64 up to the order of sums."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

from r1v2_fast.log import read

EXACT = 1e-10  # parity in fp64, by the numerics contract
SINGLE = 1e-6  # rewards and the share of right tokens are means in fp32
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_data"
KNOBS = [
    "run.stages=[align, reward, mpo, grpo]", "reward.steps=4", "reward.sampling.prompts=3", "grpo.mini_batches=2",
    "grpo.updates_per_rollout=2", "grpo.loss.kl_coef=0.05", "grpo.dynamic_sampling.max_rounds=2",
    "grpo.micro_batch_tokens=300", "mpo.micro_batch_tokens=400", "grpo.advantages.scale=batch", "checkpoint.keep=9",
    "grpo.gradient_checkpointing=true", "checkpoint.best=eval/clean/format", "checkpoint.best_is=lowest",
]  # fmt: skip
SHARDS = ["none", "full"]
SHARDS_FULL_SLOW = ["none", pytest.param("full", marks=pytest.mark.slow)]


def close(left, right, tolerance):
    if left is None or right is None or math.isnan(left) or math.isnan(right):
        return left == right
    return abs(left - right) <= tolerance * max(1.0, abs(left))


def same_runs(a, b):
    """Metrics, samples and every stage's weights."""
    left, right = (read(folder / "metrics.jsonl") for folder in (a, b))
    assert [(x["stage"], x["step"], x.keys()) for x in left] == [(y["stage"], y["step"], y.keys()) for y in right]
    for x, y in zip(left, right, strict=True):
        for name in x.keys() - {"stage", "time", "step_time"}:
            if name == "rewards/accuracies" and x["stage"] == "mpo":
                continue  # where nothing has moved (the first step, pairs without a picture) it counts 0 > 0, up to rounding
            tolerance = EXACT if name in ("loss", "grad_norm") or name.startswith("mpo/") else SINGLE
            assert close(x[name], y[name], tolerance), (x["stage"], x["step"], name, x[name], y[name])
    left, right = (read(folder / "samples.jsonl") for folder in (a, b))
    assert [x.get("completion") for x in left] == [y.get("completion") for y in right] and len(left) > 50
    files = sorted(path.relative_to(a) for path in a.glob("**/model.safetensors"))
    assert files == sorted(path.relative_to(b) for path in b.glob("**/model.safetensors")) and len(files) >= 3
    for file in files:
        one, other = load_file(a / file), load_file(b / file)
        assert one.keys() == other.keys()
        for name in one:
            assert (one[name] - other[name]).abs().max() <= EXACT * one[name].abs().max().clamp(min=1), (file, name)


@pytest.mark.parametrize("shard", SHARDS_FULL_SLOW)
def test_two_ranks_equal_one_over_twenty_steps(shard, launch, alone):
    done = launch(f"two-{shard}", 2, f"run.shard={shard}")
    assert done.status == 0, done.said
    same_runs(alone.folder, done.folder)


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
def test_three_ranks_equal_one_with_every_knob(shard, launch):
    """Five prompts on three ranks: unequal shares, mini-batches and micro-batches; the reward model trains too."""
    rewards = "[{name: answer, function: '%s:letters'}, {name: model, function: reward_model}]"
    more = [*KNOBS, f"grpo.rewards={rewards % launch.reward}"]
    first = launch("knobs", 1, *more)
    assert first.status == 0, first.said
    done = launch(f"knobs-{shard}", 3, f"run.shard={shard}", *more)
    assert done.status == 0, done.said
    same_runs(first.folder, done.folder)
    best = [json.loads((run.folder / "best" / "best.json").read_text()) for run in (first, done)]
    assert best[0] == best[1]


@pytest.mark.slow
@pytest.mark.parametrize("shard", SHARDS)
def test_a_rank_without_an_image_joins_every_collective(shard, launch):
    """The last two of eight records have no picture; the tower trains, so that its gradients travel too."""
    own = [
        "data.make=null", f"data.folder={EXAMPLE}", "evaluation.sets={own: records.jsonl}", "align.batch_size=4",
        *(f"{stage}.data=records.jsonl" for stage in ("align", "mpo", "grpo")), "grpo.train=[adapter, vision]",
        "align.steps=12", "grpo.sampling.prompts=3", "mpo.steps=6", "grpo.steps=12", "samples_every=1",
    ]  # fmt: skip
    first, done = launch("mixed", 1, *own), launch(f"mixed-{shard}", 2, f"run.shard={shard}", *own)
    assert first.status == done.status == 0, first.said + done.said
    same_runs(first.folder, done.folder)


@pytest.mark.slow
def test_lora_trains_on_replicas_and_is_refused_where_layers_are_sharded(launch):
    lora = ["mpo.lora={llm: {rank: 4}}", "grpo.train=[]", "grpo.lora={llm: {rank: 4}, vision: {rank: 2}}"]
    first, done = launch("lora-1", 1, *lora), launch("lora-2", 2, *lora)
    assert first.status == done.status == 0, first.said + done.said
    same_runs(first.folder, done.folder)
    refused = launch("lora-full", 2, "run.shard=full", *lora)
    assert refused.status != 0 and "run.shard=none works, or train the part in full" in refused.said


@pytest.mark.slow
def test_a_run_goes_on_with_other_numbers_of_ranks(launch, alone):
    """1 to 3 ranks take turns, sharded and not; each ends with its step checkpointed, whichever rank the signal reaches."""
    turns = [
        (2, "full", ("align", 1, 1)), (1, "none", ("mpo", 6, 0)), (2, "none", ("grpo", 4, 1)), (1, "none", ("grpo", 9, 0)),
        (3, "full", ("grpo", 13, 2)), (2, "none", None),
    ]  # fmt: skip
    for index, (ranks, shard, stop) in enumerate(turns):
        flags = ["--resume"] * (index > 0) + (["--kill", "15", *map(str, stop)] if stop else [])
        done = launch("turns", ranks, f"run.shard={shard}", flags=flags)
        if stop is None:
            break
        assert "exitcode  : 143" in done.said if ranks > 1 else done.status == 143
        assert f"stopped after step {stop[1] + 1} of {stop[0]}, checkpointed" in done.said
        newest = done.folder / "checkpoints" / f"{stop[0]}-{stop[1] + 1:06d}"
        index_file = json.loads((newest / "state.json").read_text())
        assert index_file["ranks"] == ranks and len(list(newest.glob("rank-*.safetensors"))) == ranks
    assert done.status == 0, done.said
    same_runs(alone.folder, done.folder)
