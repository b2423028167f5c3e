"""Recipes tried without weights: every shipped one trains for real on a small architecture, and says what is made up."""

import pytest
import torch

from r1v2_fast import config
from r1v2_fast.cli import main
from r1v2_fast.log import read
from r1v2_fast.models import dummy, presets

RECIPES = ("internvl3-1b", "r1v2-38b-one-gpu", "r1v2-38b-8gpu")
SHORT = [
    "model.dtype=float32", "data.sizes={policy: 8, heldout: 2}", "data.max_tiles=2", "run.device=cpu",
    "evaluation.max_new_tokens=3",
    *(f"{stage}.{key}" for stage in ("mpo", "grpo") for key in (
        "steps=1", "sampling.prompts=2", "sampling.group_size=4", "sampling.max_new_tokens=6", "micro_batch_tokens=200",
    )), "grpo.overlong_cache=null",
]  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_shipped_recipe_trains_both_stages_with_made_up_weights(small_architecture, recipe, tmp_path, capsys):
    folder = tmp_path / "run"
    assert (
        main(
            [
                "train",
                recipe,
                "--dummy-weights",
                small_architecture,
                *SHORT,
                f"run.folder={folder}",
                f"data.folder={tmp_path}",
            ]
        )
        == 0
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "every rule reward is a coin flip" in said and "made-up ones stand in" in said
    lines = {line["stage"]: line for line in read(folder / "metrics.jsonl") if "grad_norm" in line}
    assert set(lines) == {"mpo", "grpo"} and all(line["grad_norm"] > 0 for line in lines.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_without_weights_says_how_to_get_some(recipe, tmp_path, capsys):
    assert main(["train", recipe, f"run.folder={tmp_path}"]) == 2
    said = capsys.readouterr().err
    assert "architecture without weights" in said and "--dummy-weights" in said and "model.path=FOLDER" in said


def test_dummy_weights_change_nothing_of_a_recipe_with_weights():
    with pytest.raises(ValueError, match="model.dummy_weights fills an architecture's preset, got preset 'digits'"):
        config.load("digits", ["model.dummy_weights=true"])


@pytest.mark.parametrize(("name", "billions"), [("r1v2-38b", 38.4), ("internvl3-1b", 0.94)])
def test_an_architecture_stands_on_the_meta_device_in_full(name, billions):
    model = dummy.on_meta(presets.architecture(name, None), torch.bfloat16)
    assert all(p.device.type == "meta" and p.dtype == torch.bfloat16 for p in model.parameters())
    assert round(sum(p.numel() for p in model.parameters()) / 1e9, 2) == pytest.approx(billions, rel=0.02)


def test_random_weights_keep_logits_sane_and_follow_the_seed(small_architecture):
    changes = config.load("internvl3-1b", [small_architecture, "model.dummy_weights=true"]).model.architecture
    build = {"seed": 0, "dtype": torch.float32, "device": "cpu"}
    loaded = dummy.build("internvl3-1b", changes, **build)
    ids = torch.randint(256, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = loaded.model(input_ids=ids).logits
        again = dummy.build("internvl3-1b", changes, **build).model(input_ids=ids).logits
    assert 0.3 < logits.std() < 3 and torch.equal(logits, again)
    other = dummy.build("internvl3-1b", changes, **{**build, "seed": 1})
    assert not torch.equal(other.model.lm_head.weight, loaded.model.lm_head.weight)


def test_every_id_of_the_made_up_tokenizer_decodes_and_text_comes_back():
    tokenizer = dummy.byte_tokenizer(presets.architecture("r1v2-38b", None))
    text = "Größe: 3/4 π\n<think>ok</think>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert len(tokenizer) == 152_064 and all(tokenizer.convert_ids_to_tokens(list(range(152_064))))


def test_an_unknown_key_of_the_architecture_is_named(tmp_path, capsys):
    wrong = "model.architecture={text_config: {number_of_layers: 2}}"
    assert main(["train", "internvl3-1b", "--dummy-weights", wrong, f"run.folder={tmp_path}"]) == 2
    assert "number_of_layers" in capsys.readouterr().err
