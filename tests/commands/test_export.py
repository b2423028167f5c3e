"""r1v2-fast export: a folder that transformers loads, and its model card."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer, GotOcr2ImageProcessorPil

from r1v2_fast import __version__
from r1v2_fast.card import model_card
from r1v2_fast.cli import main
from r1v2_fast.commands.chat import Pictures
from r1v2_fast.commands.model import open_model


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model"
    (folder / "environment.json").write_text(json.dumps({"version": "9.8.7", "commit": "0123abcd", "torch": "2"}))
    assert main(["export", str(folder), str(out)]) == 0
    assert main(["export", str(folder), str(out)]) == 2
    return out


def test_transformers_answers_as_the_rollout_does(exported, held_out):
    dataset, reader, _, result = held_out
    model = AutoModelForImageTextToText.from_pretrained(exported)
    tokenizer, processor = AutoTokenizer.from_pretrained(exported), GotOcr2ImageProcessorPil.from_pretrained(exported)
    for index, record in enumerate(dataset.records[:12]):
        ids = torch.tensor([reader.prompt(dataset, record).ids])
        pixels = processor([dataset.image(key) for key in dataset.image_keys(record)], return_tensors="pt")
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels["pixel_values"],
            max_new_tokens=12,
            do_sample=False,
        )
        assert tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == result.completions[index]


def test_transformers_never_writes_a_placeholder(exported, folder, held_out):
    """Where a placeholder is the likeliest token, generate takes the next one, as the rollout does."""
    dataset, reader, policy, _ = held_out
    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert set(model.generation_config.suppress_tokens) == set(policy.forbidden.tolist())
    image_token = model.config.image_token_id
    with torch.no_grad():  # an untied head: the placeholder's row outbids every other token
        model.lm_head.weight[image_token] = 0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
        model.lm_head.bias[image_token] = 1e4
    ids = torch.tensor([reader.prompt(dataset, dataset[0]).ids])
    pixels = torch.cat(reader.pixels(dataset.image_keys(dataset[0])))
    output = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False)
    assert image_token not in output[0, ids.shape[1] :]


def test_the_card_says_what_was_trained_and_measured(exported, folder):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for stage in ("align", "grpo"):
        last = [line for line in lines if line["stage"] == stage and "eval/clean/accuracy" in line][-1]
        names = [f"eval/{s}/{m}" for s in ("clean", "low_contrast") for m in ("accuracy", "hallucination")]
        assert f"| {stage} | {' | '.join(f'{last[name]:.1%}' for name in names)} |" in card
    assert "commit: 0123abcd" in card and "r1v2_fast: 9.8.7" in card
    assert (folder / "recipe.yaml").read_text() in card
    assert "| stage grpo | `policy.parquet` | 40 |" in card and "| `heldout_clean.jsonl` | 24 |" in card
    assert "32 prompts of 8 responses a step, rewarded by answer + format + model" in card


def test_the_cards_snippet_runs_and_answers(exported, held_out):
    dataset, *_, result = held_out
    index = next(i for i, record in enumerate(dataset.records) if record.columns["kind"] == "read")
    shutil.copy(str(dataset.root / dataset[index].images[0]), exported / "picture.png")
    snippet = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=exported, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == result.completions[index], done.stderr


def test_an_exported_folder_is_read_by_the_other_commands(exported, folder, held_out, capsys):
    capsys.readouterr()
    data = str(folder / "data" / "heldout_clean.jsonl")
    assert main(["evaluate", str(exported), data]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == held_out[-1].metrics["accuracy"]


def test_export_takes_a_stage_and_a_dtype(folder, tmp_path):
    assert main(["export", str(folder), str(tmp_path / "a"), "--from", "align", "--dtype", "bfloat16"]) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "a", dtype="auto")
    stage = AutoModelForImageTextToText.from_pretrained(folder / "stages" / "align")
    assert model.dtype == torch.bfloat16
    for name, tensor in stage.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(torch.bfloat16)), name
    card = (tmp_path / "a" / "README.md").read_text()
    assert "the policy at the end of stage align" in card and "stage grpo" not in card


def test_export_of_the_best_policy_says_when_it_was(folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "a"), "--from", "best"]) == 2
    assert "--from must be one of ['final', 'align', 'reward', 'grpo']" in capsys.readouterr().err
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    shutil.copytree(run / "stages" / "align", run / "best")
    best = {"metric": "eval/clean/accuracy", "value": 0.875, "stage": "align", "step": 40}
    (run / "best" / "best.json").write_text(json.dumps(best))
    assert main(["export", str(run), str(tmp_path / "a"), "--from", "best"]) == 0
    card = (tmp_path / "a" / "README.md").read_text()
    assert "the policy after step 40 of align: the best `eval/clean/accuracy`, 0.875." in card


def test_export_leaves_alone_what_it_did_not_write(folder, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_run").mkdir()
    stage = folder / "stages" / "align"
    for arguments, message in [
        ([folder, tmp_path], "is not empty; add --overwrite"),
        ([folder, tmp_path, "--overwrite"], "--overwrite replaces an earlier export"),
        ([folder, stage, "--overwrite"], "--overwrite replaces an earlier export"),
        ([folder, tmp_path / "x", "--from", "reward"], "got a reward model"),
        ([folder, tmp_path / "x", "--from", "mpo"], "--from must be one of ['final', "),
        ([tmp_path / "no_run", tmp_path / "x"], "expected the folder of a run with its recipe.yaml"),
    ]:
        assert main(["export", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists() and (stage / "model.safetensors").exists()
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))
    assert main(["export", str(folder), str(tmp_path / "empty")]) == 0
    old = (tmp_path / "empty" / "README.md").stat().st_ino
    assert main(["export", str(folder), str(tmp_path / "empty"), "--overwrite"]) == 0
    assert (tmp_path / "empty" / "README.md").stat().st_ino != old and not list(tmp_path.glob("empty.*"))


def test_export_on_a_full_disk_leaves_the_earlier_export(exported, folder, tmp_path, full_disk, capsys):
    out = shutil.copytree(exported, tmp_path / "out", ignore=shutil.ignore_patterns("picture.png"))
    full_disk(100_000)
    for target in (tmp_path / "new", out):
        assert main(["export", str(folder), str(target), "--overwrite"]) == 2
        error = capsys.readouterr().err
        assert "cannot write" in error and error.count("\n") == 1
    assert (out / "model.safetensors").is_file() and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["thesis.tex", ".git/HEAD", "model-00001-of-00002.safetensors"])
def test_overwrite_takes_nothing_that_an_export_did_not_write(exported, folder, tmp_path, name, capsys):
    out = shutil.copytree(exported, tmp_path / "out", ignore=shutil.ignore_patterns("picture.png"))
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).touch()
    assert main(["export", str(folder), str(out), "--overwrite"]) == 2
    assert f"got {name.split('/')[0]} there too" in capsys.readouterr().err and (out / name).exists()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (out / "model.safetensors").unlink()
    (out / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["export", str(folder), str(out), "--overwrite"]) == (0 if name.startswith("model") else 2)


def test_overwrite_takes_no_model_of_another_hand(exported, folder, tmp_path, capsys):
    out = shutil.copytree(exported, tmp_path / "out", ignore=shutil.ignore_patterns("picture.png"))
    for card in ("a model", "---\ntags: [internvl]\n---\n", "---\n[\n---\n", "---\n- r1v2_fast\n---\n"):
        (out / "README.md").write_text(card)
        assert main(["export", str(folder), str(out), "--overwrite"]) == 2
        assert "got no README.md with the tag r1v2_fast there" in capsys.readouterr().err
    assert (out / "README.md").read_text() == card


@pytest.mark.parametrize("beside", ["old", "partial"])
def test_export_leaves_a_folder_beside_alone(exported, folder, tmp_path, beside, capsys):
    users = tmp_path / f"out.{beside}"
    users.mkdir()
    (users / "thesis.tex").touch()
    assert main(["export", str(folder), str(tmp_path / "out")]) == 2
    assert f"{users} is in the way and holds thesis.tex" in capsys.readouterr().err and (users / "thesis.tex").exists()
    shutil.rmtree(users)
    shutil.copytree(exported, users, ignore=shutil.ignore_patterns("picture.png"))  # a killed export's
    assert main(["export", str(folder), str(tmp_path / "out")]) == 0 and not users.exists()


def test_the_card_of_the_best_policy_ends_where_it_does(folder, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    shutil.copytree(run / "stages" / "align", run / "best")
    (run / "environment.json").write_text(json.dumps({"version": "9.8.7", "commit": "0123abcd", "dirty": True}))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    at = next(
        line for line in lines if "eval/clean/accuracy" in line and (line["stage"], line["step"]) == ("align", 30)
    )
    best = {"metric": "eval/clean/accuracy", "value": at["eval/clean/accuracy"], "stage": "align", "step": 30}
    (run / "best" / "best.json").write_text(json.dumps(best))
    card = model_card(run, "best")
    shown = card.split("<details>")[0]
    assert "- **align**: supervised; 30 of 60 steps" in shown and "grpo" not in shown and "Bradley" not in shown
    assert (
        f"\n| step 30 of align, on 24 records | {at['eval/clean/accuracy']:.1%} |" in card and "\n| align |" not in card
    )
    assert "commit: 0123abcd, with changes that were not committed" in card and "dirty" not in card
    assert "r1v2_fast: 9.8.7" in card and f"this card: r1v2_fast {__version__}" in card


def test_the_card_of_a_stage_shows_no_later_one(folder):
    shown = model_card(folder, "align").split("<details>")[0]
    assert "\n| align |" in shown and "\n| grpo |" not in shown and "**grpo**" not in shown


def test_the_card_says_held_out_only_of_what_is(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    text = (folder / "recipe.yaml").read_text()
    (tmp_path / "run" / "recipe.yaml").write_text(text.replace("clean: heldout_clean.jsonl", "clean: ./policy.parquet"))
    assert "Greedy answers to held-out records (" in model_card(folder, "final")
    assert "Greedy answers to held-out records (" in model_card(tmp_path / "run", "align")  # grpo came later
    card = model_card(tmp_path / "run", "final")
    assert "Greedy answers to records (" in card and "Stage grpo trains on clean: it is not held out." in card


def test_an_export_keeps_the_recipes_max_tiles(folder, tmp_path):
    run = shutil.copytree(folder, tmp_path / "run")
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("max_tiles: 12", "max_tiles: 7"))
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert open_model(tmp_path / "out", Pictures(), "cpu")[1].pixels.max_tiles == 7
