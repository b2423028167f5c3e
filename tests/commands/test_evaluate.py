"""r1v2-fast evaluate and what all commands share: model folders, roots, limits, signals."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from r1v2_fast.cli import main
from r1v2_fast.commands import filter as filtering
from r1v2_fast.commands.chat import Pictures
from r1v2_fast.commands.model import open_model
from r1v2_fast.stop import Stopped


def test_a_training_that_is_stopped_leaves_with_the_signals_status(tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise Stopped("stopped after step 3 of align, checkpointed", 15)

    monkeypatch.setattr("r1v2_fast.train.run.train", stopped)
    assert main(["train", "digits", f"run.folder={tmp_path}"]) == 143
    assert "stopped after step 3 of align, checkpointed; go on with --resume" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["filter", "evaluate"])
def test_root_and_allow_outside_say_where_pictures_lie(folder, pool, tmp_path_factory, command, capsys):
    data = tmp_path_factory.mktemp("elsewhere") / "data.jsonl"
    shutil.copy(pool / "heldout_clean.jsonl", data)

    def run(*options):
        out = [str(data.with_name("out.parquet")), "--overwrite", "--keep-all"] if command == "filter" else []
        arguments = [command, str(folder / "final"), str(data), *out, "--records", "2", "--max-new-tokens", "2"]
        return main([*arguments, *options])

    assert run() == 2 and "no such file below" in capsys.readouterr().err
    assert run("--root", str(pool)) == 0
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    rows = [{**row, "images": [str(pool / image) for image in row["images"]]} for row in rows]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run() == 2 and "it leaves the data root" in capsys.readouterr().err
    assert run("--allow-outside") == 0


def test_a_models_own_max_tiles_are_kept_and_can_be_told(folder, tmp_path, monkeypatch):
    model = shutil.copytree(folder / "final", tmp_path / "model")
    settings = json.loads((model / "preprocessor_config.json").read_text())
    side = settings["size"]["width"]
    (model / "preprocessor_config.json").write_text(json.dumps({**settings, "crop_to_patches": True, "max_patches": 3}))
    Image.new("RGB", (side * 8, side)).save(tmp_path / "wide.png")
    tiles = [
        open_model(model, Pictures(), "cpu", max_tiles=n)[1].pixels.tiles([str(tmp_path / "wide.png")])[0]
        for n in (None, 5)
    ]
    assert tiles == [4, 6]  # with a thumbnail
    asked = []
    monkeypatch.setattr(filtering, "open_model", lambda *_, max_tiles: asked.append(max_tiles) or 1 / 0)
    monkeypatch.setattr("r1v2_fast.commands.evaluate.open_model", filtering.open_model)
    data = str(folder / "data" / "heldout_clean.jsonl")
    for arguments in (["filter", str(model), data, str(tmp_path / "o.parquet")], ["evaluate", str(model), data]):
        with pytest.raises(ZeroDivisionError):
            main([*arguments, "--max-tiles", "5"])
    assert asked == [5, 5]


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def edit_weights(path, change):
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def gate(tensors):
    return next(name for name in sorted(tensors) if name.endswith("0.mlp.gate_proj.weight"))


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


BROKEN = {
    "another": (lambda m: edit(m / "config.json", model_type="llava"), "model_type 'internvl', got 'llava'"),
    "original": (lambda m: edit(m / "config.json", model_type="internvl_chat"), "r1v2-fast convert"),
    "json": (lambda m: (m / "config.json").write_text("{"), "cannot read its config.json"),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "cannot read its weights: Error no file named"),
    "no tokenizer": (
        lambda m: [p.unlink() for p in m.glob("tokenizer*")],
        "holds no tokenizer: expected tokenizer.json",
    ),
    "no processor": (lambda m: (m / "preprocessor_config.json").unlink(), "holds no image processor"),
    "cut weights": (lambda m: cut(m / "model.safetensors"), "cannot read its weights: Error while deserializing"),
    "cut tokenizer": (lambda m: cut(m / "tokenizer.json"), "cannot read its tokenizer"),
    "missing": (
        lambda m: edit_weights(m / "model.safetensors", lambda t: [t.pop(n) for n in sorted(t)[:4]]),
        "missing: lm_head.weight, model.language_model.embed_tokens.weight,",
    ),
    "unexpected": (
        lambda m: edit_weights(m / "model.safetensors", lambda t: t.update(more=torch.zeros(1))),
        "its weights do not fit its config.json, unexpected: more\n",
    ),
    "mismatched": (  # a file's names are older than the model's
        lambda m: edit_weights(m / "model.safetensors", lambda t: t.update({gate(t): torch.zeros(2, 2)})),
        "mismatched: model.language_model.layers.0.mlp.gate_proj.weight\n",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_folder_is_one_sentence(folder, tmp_path, name, capsys):
    change, message = BROKEN[name]
    model = shutil.copytree(folder / "final", tmp_path / "model")
    change(model)
    assert main(["chat", str(model), "Read."]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and str(model) in error and not out


def test_every_policy_of_a_run_is_saved_with_the_tiles_it_was_trained_on(folder):
    """So that chat, filter and evaluate on final/ see what training saw."""
    for place in ("final", "stages/align", "stages/grpo"):
        assert json.loads((folder / place / "preprocessor_config.json").read_text())["max_patches"] == 7
