"""The command: what it prints, exits with and refuses; and that what it says would fit does."""

import itertools

import pytest

from r1v2_fast import cli, config
from r1v2_fast.models import presets
from r1v2_fast.plan import stages, time
from r1v2_fast.plan.run import model_config


def printed(capsys, *words: str) -> tuple[int, str]:
    status = cli.main(["plan", *words])
    return status, capsys.readouterr().out


def test_a_plan_that_fits_exits_0_and_says_so_in_a_hundred_columns(capsys):
    status, out = printed(capsys, "r1v2-38b-one-gpu", "--gpus", "1", "--gpu", "h200")
    assert status == 0 and out.count("It fits.") == 2
    assert "computed, not measured" in out
    assert max(map(len, out.splitlines())) <= 100
    for part in ("vision tower, frozen", "keys and values", "decode", "recompute", "MFU of training", "assumed"):
        assert part in out


def test_a_plan_that_does_not_fit_exits_1_and_says_why_and_what_would(capsys):
    status, out = printed(capsys, "r1v2-38b-8gpu", "rollout.max_rows=64", "--gpus", "8", "--gpu", "h100")
    assert status == 1
    assert "The rollout does not fit" in out and "its largest part is keys and values" in out
    assert "It fits with rollout.max_rows=" in out


def test_the_toy_has_a_plan_too(capsys):
    assert printed(capsys, "digits", "--gpu", "a100")[0] == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (["digits", "--gpu", "h800"], "expected --gpu among a100, h100, h200, b200, got 'h800'"),
        (["digits", "--gpus", "0"], "expected --gpus from 1 to 64, got 0"),
        (["digits", "--gpus", "65"], "expected --gpus from 1 to 64, got 65"),
        (["digits", "--bandwidth", "0"], "expected --bandwidth above 0 GB/s, got 0.0"),
        (["digits", "--response-tokens", "0"], "--response-tokens of 1 or more, got 204 and 0"),
        (["digits", "run.stages=[align]"], "expected a recipe with a stage among ('mpo', 'grpo')"),
        (["digits", "mpo.train=[vision]"], "expected mpo.train among adapter and llm, in full, got vision"),
        (["digits", "model.preset=null", "model.path=/nowhere"], "expected config.json in model.path, got '/nowhere'"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_was_expected(words, said, capsys):
    assert cli.main(["plan", *words]) == 2
    assert said in capsys.readouterr().err


def test_a_folder_gives_the_same_plan_as_its_preset(made, tmp_path):
    presets.architecture("r1v2-38b").save_pretrained(tmp_path)
    folder = made(overrides=["model.preset=null", f"model.path={tmp_path}"])["grpo"]
    preset = made()["grpo"]
    assert folder.shapes == preset.shapes and folder.memory == preset.memory
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="expected model_type 'internvl', got 'llama'"):
        model_config(config.Model(path=str(tmp_path)))


def test_lengths_are_the_recipes_unless_given(made):
    stage = made()["grpo"]
    assert (stage.prompt, stage.response) == (7 * 256 + 200, 2048)  # six tiles and the thumbnail
    given = made(prompt_tokens=300, response_tokens=50)["grpo"]
    assert (given.prompt, given.response) == (300, 50)


def test_the_model_is_sharded_where_it_does_not_fit_whole(made):
    assert made()["mpo"].shard == "none"
    assert made("r1v2-38b-8gpu", count=8, gpu="a100")["mpo"].shard == "full"
    assert made("r1v2-38b-8gpu", count=8, gpu="a100", shard="none")["mpo"].shard == "none"


def test_sharding_divides_weights_and_state_by_the_gpus(made):
    whole = made("r1v2-38b-8gpu", count=8, shard="none")["mpo"].memory["held"]
    parts = made("r1v2-38b-8gpu", count=8, shard="full")["mpo"].memory["held"]
    divided = [name for name in parts if parts[name] != whole.get(name)]
    assert divided == [*[name for name in whole if name != "vision feature cache"], "gathered layers"]
    assert all(parts[name] == whole[name] / 8 for name in divided[:-1])


def test_keys_and_values_are_rows_times_tokens_times_layers(made):
    stage = made(overrides=["rollout.max_rows=5"])["grpo"]
    assert stage.memory["rollout"]["keys and values"] == 5 * (1992 + 2048) * 64 * 2 * 8 * 128 * 2


TIGHT = {
    "keys and values": ("r1v2-38b-one-gpu", ["grpo.sampling.prompts=64"], 1, "h200"),
    "activations": ("r1v2-38b-one-gpu", ["mpo.gradient_checkpointing=false", "mpo.micro_batch_tokens=null"], 1, "h200"),
    "weights": ("r1v2-38b-8gpu", [], 1, "h100"),
}


@pytest.mark.parametrize("recipe, overrides, count, gpu", TIGHT.values(), ids=TIGHT)
def test_what_is_said_to_fit_does_when_the_recipe_is_changed_so(made, recipe, overrides, count, gpu):
    tight = [stage for stage in made(recipe, overrides, count, gpu).values() if stage.over]
    assert tight
    for stage in tight:
        found = stages.remedies(stage)
        assert found
        for remedy in found:
            words = " ".join(remedy.changes).split()
            options = dict(itertools.pairwise(words))
            changed = made(
                recipe, [*overrides, *(word for word in words if "=" in word)], int(options.get("--gpus", count)),
                options.get("--gpu", gpu), shard=options.get("--shard", stage.shard),
            )[stage.name]  # fmt: skip
            assert not changed.over
            assert time.sum_of(changed.time) == pytest.approx(time.sum_of(remedy.stage.time))


def test_the_rows_that_are_named_are_the_most_that_fit(made):
    stage = made("r1v2-38b-8gpu", ["rollout.max_rows=64"], 8, "h100")["grpo"]
    (change,) = stages.remedies(stage)[0].changes
    most = int(change.removeprefix("rollout.max_rows="))
    assert not stage.set("rollout", max_rows=most).over
    assert stage.set("rollout", max_rows=most + 1).over == ["rollout"]


def test_a_vllm_servers_rollout_costs_the_training_gpu_nothing(made):
    stage = made(overrides=["rollout.engine=vllm"])["grpo"]
    assert stage.memory["rollout"] == {} and "decode" not in stage.time and not stage.over
