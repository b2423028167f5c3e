"""There and back: every tensor bit for bit, and the config."""

import json
import struct
from itertools import pairwise

import pytest
import torch
from safetensors import safe_open

from r1v2_fast.cli import main
from r1v2_fast.models import load
from r1v2_fast.models.conversion.config import with_defaults


def same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def without_code(config):
    return {n: without_code(v) if isinstance(v, dict) else v for n, v in config.items() if n != "auto_map"}


def there_and_back(source, tmp_path, *options):
    assert main(["convert", str(source.path), str(tmp_path / "dst"), *options]) == 0
    assert main(["convert", str(tmp_path / "dst"), str(tmp_path / "back"), *options]) == 0
    return tmp_path / "back"


def mix(weights):
    """A NaN with a payload, an infinity and both zeros among them, and norms that stayed in fp32."""
    for name in list(weights):
        if "norm" in name or name.startswith("mlp1.0"):
            weights[name] = weights[name].float()
    weights["mlp1.3.bias"].view(torch.int16)[:4] = torch.tensor([0x7FC1, 0x7F80, -0x8000, 0], dtype=torch.int16)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float16", "mixed"])
@pytest.mark.parametrize("shards", [1, 5])
def test_every_tensor_comes_back_bit_for_bit(checkpoint, stored, tmp_path, kind, shards):
    dtype = torch.bfloat16 if kind == "mixed" else getattr(torch, kind)
    source = checkpoint(dtype=dtype, shards=shards, weights=mix if kind == "mixed" else None)
    back = there_and_back(source, tmp_path, "--max-shard-size", "50KB")
    same_bits(stored(back), source.weights)
    q, k, v = (stored(tmp_path / "dst")[f"vision_tower.encoder.layer.1.attention.{p}_proj.weight"] for p in "qkv")
    assert torch.equal(torch.cat([q, k, v]), source.weights["vision_model.encoder.layers.1.attn.qkv.weight"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "skywork_chat", "architectures": ["SkyworkR1VChatModel"], "freeze_llm": False},
        {"tower": {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}, "max_dynamic_patch": 6},
        {"text": {"rope_scaling": {"type": "dynamic", "rope_type": "dynamic", "factor": 2.0}}, "select_layer": -2},
        {"text": {"tie_word_embeddings": True}, "weights": lambda w: w.pop("language_model.lm_head.weight")},
        {"text": {"tie_word_embeddings": True}, "weights": lambda w: w.update(HEAD=0) or tie(w)},
        {"text": {"eos_token_id": [257, 258], "pad_token_id": 256, "sliding_window": 64, "max_window_layers": 70}},
    ],
    ids=["internvl_chat", "skywork_chat", "InternViT-300M", "InternVL3", "tied", "tied with a copy", "ids"],
)
def test_the_config_comes_back_less_its_code(checkpoint, stored, tmp_path, changes):
    source = checkpoint(**changes)
    back = there_and_back(source, tmp_path)
    same_bits(stored(back), source.weights)
    assert json.loads((back / "config.json").read_text()) == without_code(source.config)
    for name in ("preprocessor_config.json", "generation_config.json", "tokenizer_config.json", "vocab.json"):
        assert json.loads((back / name).read_text()) == json.loads((source.path / name).read_text()), name


def tie(weights):
    del weights["HEAD"]
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()


def test_a_folder_that_was_trained_goes_back_too(checkpoint, stored, tmp_path):
    """transformers rewrites every file as it saves; what the way back needs lies in its config.json."""
    source = checkpoint(model_type="skywork_chat")
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 0
    loaded = load.from_folder(tmp_path / "dst")
    with torch.no_grad():
        loaded.model.model.multi_modal_projector.linear_1.bias += 1
    load.save_folder(tmp_path / "trained", loaded)
    assert not (tmp_path / "trained" / "vocab.json").exists()
    assert main(["convert", str(tmp_path / "trained"), str(tmp_path / "back")]) == 0
    same_bits(stored(tmp_path / "back"), source.weights | {"mlp1.1.bias": source.weights["mlp1.1.bias"] + 1})
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == without_code(source.config)
    for name in ("vocab.json", "added_tokens.json", "tokenizer_config.json"):
        expected = json.loads((source.path / name).read_text())
        got = json.loads((tmp_path / "back" / name).read_text())
        assert {t: i for t, i in got.items() if t in expected} == expected, name
    assert (tmp_path / "back" / "merges.txt").read_text() == (source.path / "merges.txt").read_text()


def test_another_dtype_is_said_in_the_config(checkpoint, tmp_path):
    source = checkpoint()
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 0
    loaded = load.from_folder(tmp_path / "dst", dtype=torch.bfloat16)
    load.save_folder(tmp_path / "half", loaded)
    assert main(["convert", str(tmp_path / "half"), str(tmp_path / "back")]) == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert [c["torch_dtype"] for c in (config, config["llm_config"], config["vision_config"])] == ["bfloat16"] * 3


def test_tiles_that_training_changed_are_said_in_the_config(checkpoint, tmp_path):
    source = checkpoint()
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 0
    loaded = load.from_folder(tmp_path / "dst")
    loaded.image_processor.max_patches = 7
    load.save_folder(tmp_path / "trained", loaded)
    assert main(["convert", str(tmp_path / "trained"), str(tmp_path / "back")]) == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == without_code(source.config) | {"max_dynamic_patch": 7}


@pytest.mark.parametrize("top", [True, False])
def test_the_top_level_says_whether_the_head_is_tied_where_llm_config_is_silent(checkpoint, stored, tmp_path, top):
    source = checkpoint(
        tie_word_embeddings=top, weights=(lambda w: w.pop("language_model.lm_head.weight")) if top else None
    )
    del source.config["llm_config"]["tie_word_embeddings"]
    (source.path / "config.json").write_text(json.dumps(source.config))
    back = there_and_back(source, tmp_path)
    same_bits(stored(back), source.weights)
    assert json.loads((back / "config.json").read_text()) == without_code(source.config)
    model = load.from_folder(tmp_path / "dst").model
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is top


def test_a_model_that_was_never_original_becomes_one_and_returns(stored, tmp_path):
    load.save_folder(tmp_path / "toy", load.from_preset("digits", words=["a"], seed=0))
    assert main(["convert", str(tmp_path / "toy"), str(tmp_path / "original"), "--to", "original"]) == 0
    config = json.loads((tmp_path / "original" / "config.json").read_text())
    assert config["model_type"] == "internvl_chat" and config["ps_version"] == "v2" and "auto_map" not in config
    assert config["vision_config"]["qkv_bias"] is False and config["vision_config"]["norm_type"] == "layer_norm"
    assert main(["convert", str(tmp_path / "original"), str(tmp_path / "back"), "--to", "transformers"]) == 0
    same_bits(stored(tmp_path / "back"), stored(tmp_path / "toy"))
    was, now = load.from_folder(tmp_path / "toy"), load.from_folder(tmp_path / "back")
    assert now.image_processor.to_dict() == was.image_processor.to_dict()
    assert now.tokenizer.get_vocab() == was.tokenizer.get_vocab()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tower": {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}, "max_dynamic_patch": 6},
        {"text": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "select_layer": -2},
        {"text": {"tie_word_embeddings": True}, "weights": lambda w: w.pop("language_model.lm_head.weight")},
    ],
)
def test_without_what_was_kept_the_config_says_the_same(checkpoint, stored, tmp_path, changes):
    source = checkpoint(**changes)
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 0
    path = tmp_path / "dst" / "config.json"
    path.write_text(json.dumps({n: v for n, v in json.loads(path.read_text()).items() if n != "original_files"}))
    assert main(["convert", str(tmp_path / "dst"), str(tmp_path / "back")]) == 0
    same_bits(stored(tmp_path / "back"), source.weights)
    built, full = json.loads((tmp_path / "back" / "config.json").read_text()), with_defaults(source.config)
    assert built.pop("hidden_size") == 48
    tied = built.pop("tie_word_embeddings")
    assert tied == built["llm_config"]["tie_word_embeddings"] == full["llm_config"]["tie_word_embeddings"]
    for part, silent in (("vision_config", set()), ("llm_config", {"rope_scaling", "head_dim", "pad_token_id"})):
        was, now = full.pop(part), built.pop(part)
        absent = {"attention_dropout", "initializer_range", "use_sliding_window"} | silent
        assert all(was[n] == v for n, v in now.items() if n in was or n not in absent), part
    assert all(full[name] == value for name, value in built.items())


def test_rope_is_also_said_as_older_servers_read_it(checkpoint, tmp_path):
    source = checkpoint(text={"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    for options in ([], ["--language-model-only"]):
        out = tmp_path / f"out{len(options)}"
        assert main(["convert", str(source.path), str(out), *options]) == 0
        config = json.loads((out / "config.json").read_text())
        text = config.get("text_config", config)
        assert text["rope_parameters"] == {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e6}
        assert text["rope_theta"] == 1e6 and text["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.0}


def test_every_tensor_lies_where_its_dtype_is_aligned(checkpoint, tmp_path):
    """As safetensors' readers want it: an odd number of bf16 values may not push an fp32 tensor off."""
    source = checkpoint(dtype=torch.bfloat16, weights=lambda w: w.update({"mlp1.3.bias": w["mlp1.3.bias"].float()}))
    for name in ("dst", "back"):
        assert main(["convert", str(source.path if name == "dst" else tmp_path / "dst"), str(tmp_path / name)]) == 0
        raw = (tmp_path / name / "model.safetensors").read_bytes()
        length = struct.unpack("<Q", raw[:8])[0]
        entries = [v for n, v in json.loads(raw[8 : 8 + length]).items() if n != "__metadata__"]
        assert length % 8 == 0
        sizes = [{"F32": 4, "BF16": 2}[v["dtype"]] for v in entries]
        assert sizes == sorted(sizes, reverse=True) and set(sizes) == {4, 2}
        assert all(v["data_offsets"][0] % size == 0 for v, size in zip(entries, sizes, strict=True))


def test_names_that_transformers_modules_have_are_read_too(checkpoint, deal, stored, tmp_path):
    source = checkpoint()
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 0
    deal(tmp_path / "dst", dict(load.from_folder(tmp_path / "dst").model.state_dict()), shards=2)
    (tmp_path / "dst" / "conversion.json").unlink()
    assert main(["convert", str(tmp_path / "dst"), str(tmp_path / "back")]) == 0
    same_bits(stored(tmp_path / "back"), source.weights)


def test_shards_hold_the_models_order_and_at_most_their_size(checkpoint, tmp_path):
    source = checkpoint(dtype=torch.bfloat16, weights=mix)
    assert main(["convert", str(source.path), str(tmp_path / "dst"), "--max-shard-size", "24KiB"]) == 0
    index = json.loads((tmp_path / "dst" / "model.safetensors.index.json").read_text())
    files = sorted((tmp_path / "dst").glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    held, total = [], 0
    for file in files:
        with safe_open(file, "pt") as opened:
            sizes = {name: opened.get_tensor(name).nbytes for name in opened.keys()}  # noqa: SIM118
            assert opened.metadata() == {"format": "pt"}
        assert sum(sizes.values()) <= 24 * 1024 or len(sizes) == 1
        assert {index["weight_map"][name] for name in sizes} == {file.name}
        held.append(set(sizes))
        total += sum(sizes.values())
    assert index["metadata"]["total_size"] == total and sum(map(len, held)) == len(index["weight_map"])
    order = [next(i for i, h in enumerate(held) if any(n.startswith(p) for n in h)) for p in (
        "vision_tower", "multi_modal_projector", "language_model.model", "language_model.lm_head")]  # fmt: skip
    assert all(a <= b for a, b in pairwise(order)) and order[0] == 0


def test_conversions_are_the_same_bytes_every_time(checkpoint, tmp_path):
    source = checkpoint()
    for name in "ab":
        assert main(["convert", str(source.path), str(tmp_path / name), "--max-shard-size", "50KB"]) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / n).read_bytes() == (tmp_path / "b" / n).read_bytes() for n in names)


def test_pickled_shards_give_the_same_once_they_are_allowed(checkpoint, stored, tmp_path, capsys):
    source = checkpoint(dtype=torch.bfloat16)
    for file in source.path.glob("model*"):
        file.unlink()
    base = source.weights["mlp1.1.weight"]
    held = source.weights | {"mlp1.1.weight": base.t().contiguous().t()}  # strides of its own
    first, second = (dict(list(held.items())[i::2]) for i in range(2))
    torch.save(first, source.path / "pytorch_model-00001-of-00002.bin")
    torch.save(second, source.path / "pytorch_model-00002-of-00002.bin", _use_new_zipfile_serialization=False)
    weight_map = {n: f"pytorch_model-{i:05d}-of-00002.bin" for i, part in enumerate((first, second), 1) for n in part}
    (source.path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 2
    assert "expected safetensors, got the pickle pytorch_model.bin.index.json" in capsys.readouterr().err
    back = there_and_back(source, tmp_path, "--allow-pickle")
    same_bits(stored(back), source.weights)
