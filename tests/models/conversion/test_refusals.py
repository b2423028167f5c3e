"""What is not converted, and what the message names."""

import json
import os
import pickle
import shutil
import struct

import pytest
import torch

from r1v2_fast.cli import main
from r1v2_fast.models import load


@pytest.fixture
def refused(tmp_path, capsys):
    """refused(folder, *options): the message, once nothing was written."""

    def refuse(folder, *options):
        before = sorted(path.name for path in tmp_path.iterdir())
        assert main(["convert", str(folder), str(tmp_path / "dst"), *options]) == 2
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        message = capsys.readouterr().err
        assert message.count("\n") == 1
        return message

    return refuse


CONFIGS = {
    "internlm2": ({"text": {"architectures": ["InternLM2ForCausalLM"]}}, "must be Qwen2ForCausalLM, got InternLM2For"),
    "llama": ({"text": {"architectures": ["LlamaForCausalLM"]}}, "must be Qwen2ForCausalLM, got LlamaForCausalLM"),
    "qwen3": ({"text": {"architectures": None, "model_type": "qwen3"}}, "must be Qwen2ForCausalLM, got qwen3"),
    "v1": ({"ps_version": "v1"}, "ps_version must be 'v2', got 'v1': v1 orders the image tokens by columns"),
    "awq": ({"quantization_config": {"quant_method": "awq"}}, "got quantization_config 'awq'"),
    "thumbnail": ({"use_thumbnail": False}, "use_thumbnail must be True under dynamic_image_size, got False"),
    "lora": ({"use_llm_lora": 16}, "use_llm_lora must be 0, got 16: merge the adapters first"),
    "eps": ({"tower": {"layer_norm_eps": 1e-5}}, "layer_norm_eps must be 1e-6 under qk_normalization, got 1e-05"),
    "vocabulary": ({"text": {"vocab_size": 152064}}, "vocab_size is 152064, the stored embedding has 265 rows"),
    "type": ({"text": {"rms_norm_eps": "small"}}, "config.json: "),
    "heads": ({"tower": {"num_attention_heads": 5}}, "config.json describes no model: "),
    "rope": ({"text": {"rope_scaling": [2.0]}}, "config.json: "),
    "tile": ({"force_image_size": 70}, "a tile of 70 pixels is not cut evenly into patches of 14 and groups of them"),
    "tiles": ({"max_dynamic_patch": 0}, "expected 1 <= min_dynamic_patch <= max_dynamic_patch, got 1 and 0"),
    "part": ({"llm_config": 3}, "llm_config must be an object, got 3"),
    "kind": ({"model_type": "llava"}, "model_type must be internvl or internvl_chat or skywork_chat, got 'llava'"),
    "layers": ({"tower": {"num_hidden_layers": 3}}, "13 missing: vision_model.encoder.layers.2."),
    "width": ({"text": {"intermediate_size": 64}}, "layers.0.mlp.gate_proj.weight: expected [64, 48], got [80, 48]"),
    "bias": ({"tower": {"qkv_bias": True}}, "2 missing: vision_model.encoder.layers.0.attn.qkv.bias, "),
    "no qk norm": ({"tower": {"qk_normalization": False}}, "4 left over: vision_model.encoder.layers.0.attn.k_norm"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_config_that_is_not_supported_or_not_the_weights(checkpoint, refused, kind):
    changes, message = CONFIGS[kind]
    source = checkpoint()
    for name, value in changes.items():
        part = {"tower": "vision_config", "text": "llm_config"}.get(name)
        source.config |= {part: source.config[part] | value} if part else {name: value}
    (source.path / "config.json").write_text(json.dumps(source.config))
    assert message in refused(source.path)


def test_statistics_that_are_none_are_refused(checkpoint, refused):
    source = checkpoint()
    (source.path / "preprocessor_config.json").write_text(json.dumps({"image_mean": 0.5}))
    assert "preprocessor_config.json: image_mean must be three numbers, got 0.5" in refused(source.path)


def test_a_silent_ps_version_means_v1_as_in_the_original_class(checkpoint, refused):
    source = checkpoint()
    del source.config["ps_version"]
    (source.path / "config.json").write_text(json.dumps(source.config))
    assert "ps_version must be 'v2', got nothing, which means 'v1'" in refused(source.path)


def without(*names):
    return lambda w: [w.pop(name) for name in names]


TENSORS = {
    "missing": (without("mlp1.0.weight", "mlp1.3.bias"), "2 missing: mlp1.0.weight, mlp1.3.bias"),
    "no embedding": (without("language_model.model.embed_tokens.weight"), "1 missing: language_model.model.embed_tok"),
    "no head": (without("language_model.lm_head.weight"), "1 missing: language_model.lm_head.weight"),
    "left over": (lambda w: w.update(ema=torch.zeros(1)), "1 left over: ema"),
    "prefix": (lambda w: w.update({"embeddings.class_embedding": torch.zeros(1)}), "1 left over: embeddings.class_emb"),
    "shape": (lambda w: w.update({"mlp1.1.bias": torch.zeros(2)}), "mlp1.1.bias: expected [48], got [2]"),
    "scalar": (lambda w: w.update({"mlp1.1.bias": torch.tensor(1.0)}), "mlp1.1.bias: expected [48], got []"),
    "many": (lambda w: w.update({f"x{i}": torch.zeros(1) for i in range(10)}), "10 left over: x0, x1, x2, x3, x4, x5, x6, x7"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_not_the_configs_are_listed(checkpoint, refused, kind):
    change, message = TENSORS[kind]
    assert message in refused(checkpoint(weights=change).path)


def test_a_tied_head_of_other_values_is_refused(checkpoint, refused):
    source = checkpoint(text={"tie_word_embeddings": True})
    assert "tie_word_embeddings is true, expected no language_model.lm_head.weight or one equal" in refused(source.path)


def shard(source, number=2):
    return source.path / f"model-{number:05d}-of-00003.safetensors"


def edit_index(source, change):
    path = source.path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def edit_header(path, change):
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


def longer(header):
    last = max((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][1])
    header[last]["data_offsets"][1] += 4


HELD = "vision_model.embeddings.patch_embedding.weight"  # by the second shard
SHARDS = {
    "missing": (lambda s: shard(s).unlink(), "names 1 of 3 files that are not there: ['model-00002-of-00003.safetens"),
    "cut": (lambda s: shard(s).write_bytes(shard(s).read_bytes()[:-7]), "model-00002-of-00003.safetensors: expected "),
    "cut header": (lambda s: shard(s).write_bytes(shard(s).read_bytes()[:100]), "expected a safetensors file, got one cut"),
    "empty": (lambda s: shard(s).write_bytes(b""), "model-00002-of-00003.safetensors: expected a safetensors file"),
    "grown": (lambda s: shard(s).write_bytes(shard(s).read_bytes() + b"\0"), "bytes as its header says, got "),
    "offsets": (lambda s: edit_header(shard(s), longer), "bytes of F32 "),
    "dtype": (lambda s: edit_header(shard(s), lambda h: h[HELD].update(dtype="F4")), "got 'F4'"),
    "header": (lambda s: edit_header(shard(s), lambda h: h[HELD].pop("shape")), "cannot read its safetensors"),
    "lies": (
        lambda s: edit_index(s, lambda m: m.update({HELD: "model-00001-of-00003.safetensors"})),
        "model-00001-of-00003.safetensors: it does not hold what model.safetensors.index.json says; 1 tensors not there "
        f"['{HELD}']",
    ),
    "unlisted": (lambda s: edit_index(s, lambda m: m.pop(HELD)), f"1 not in the index ['{HELD}']"),
    "no map": (lambda s: edit_index(s, lambda m: m.clear()), "expected a weight_map of tensor names to files, got {}"),
    "no index": (lambda s: (s.path / "model.safetensors.index.json").unlink(), "holds no weights: expected model.safet"),
    "json": (lambda s: (s.path / "model.safetensors.index.json").write_text("{"), "cannot read it as JSON"),
    "list": (lambda s: (s.path / "config.json").write_text("[]"), "config.json: expected a JSON object, got list"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SHARDS)
def test_a_shard_that_is_missing_cut_or_lies_is_named(checkpoint, refused, kind):
    change, message = SHARDS[kind]
    source = checkpoint()
    change(source)
    assert message in refused(source.path)


@pytest.mark.parametrize(
    "name", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 3, "a\\b"]
)
def test_an_index_leads_nowhere_but_into_its_folder(checkpoint, refused, name):
    source = checkpoint()
    edit_index(source, lambda m: m.update({"mlp1.0.weight": name}))
    assert f"mlp1.0.weight: expected the name of a file in the folder, got {name!r}" in refused(source.path)


def test_a_folder_of_links_is_read_as_a_hubs_cache_is(checkpoint, tmp_path):
    source = checkpoint()
    (tmp_path / "snapshot").mkdir()
    for file in source.path.iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(f"../src/{file.name}")
    assert main(["convert", str(tmp_path / "snapshot"), str(tmp_path / "dst")]) == 0
    assert not any(file.is_symlink() for file in (tmp_path / "dst").iterdir())


class Attack:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("protocol", [0, 2, "zip"])
def test_a_pickles_code_never_runs(checkpoint, refused, tmp_path, monkeypatch, protocol):
    source = checkpoint(shards=1)
    (source.path / "model.safetensors").unlink()
    file = source.path / "pytorch_model.bin"
    torch.save({"a": Attack()}, file) if protocol == "zip" else file.write_bytes(pickle.dumps(Attack(), protocol))
    monkeypatch.chdir(source.path)
    assert "expected safetensors, got the pickle pytorch_model.bin" in refused(source.path)
    assert "pytorch_model.bin: cannot read it with weights_only" in refused(source.path, "--allow-pickle")
    assert not (source.path / "owned").exists()


@pytest.mark.parametrize("value", [[torch.zeros(1)], {"a": 3}, {"a": torch.zeros(1, dtype=torch.complex64)}])
def test_a_pickle_of_anything_but_tensors_is_refused(checkpoint, refused, value):
    source = checkpoint(shards=1)
    (source.path / "model.safetensors").unlink()
    torch.save(value, source.path / "pytorch_model.bin")
    assert "pytorch_model.bin: " in (message := refused(source.path, "--allow-pickle")) and "expected " in message


@pytest.fixture
def converted(checkpoint, tmp_path):
    assert main(["convert", str(checkpoint().path), str(tmp_path / "there")]) == 0
    return tmp_path / "there"


BACK = {
    "kept": ({"original_files": {"config.json": 3}}, "original_files must hold text by name, got {"),
    "another model": ({"text_config": {"rms_norm_eps": 1e-6}}, "is no longer what its original_files describes: text"),
    "another head": ({"tie_word_embeddings": True}, "tie_word_embeddings is true"),
    "strategy": ({"vision_feature_select_strategy": "full"}, "expected vision_feature_select_strategy 'default'"),
    "mask": ({"vision_config": {"use_mask_token": True}}, "no place for vision_tower.embeddings.mask_token"),
    "language": ({"text_config": {"model_type": "llama"}}, "the language model must be qwen2, got 'llama'"),
    "layer types": ({"text_config": {"num_hidden_layers": 3}}, "cannot read its config.json: "),
    "layers": ({"text_config": {"num_hidden_layers": 3, "layer_types": None}}, "12 missing: language_model.model.lay"),
}


@pytest.mark.parametrize("kind", BACK)
def test_what_cannot_go_back_is_refused(converted, refused, kind):
    changes, message = BACK[kind]
    path = converted / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))
    assert message in refused(converted)


def test_a_reward_model_does_not_go_back(converted, refused):
    (converted / "reward_head.safetensors").touch()
    from r1v2_fast.models.reward_model import HEAD_FILE

    (converted / HEAD_FILE).touch()
    assert "expected a policy, got a reward model" in refused(converted)


def test_parts_of_one_qkv_in_two_dtypes_do_not_go_back(checkpoint, converted, refused, deal, stored):
    weights = stored(converted)
    name = "vision_tower.encoder.layer.0.attention.k_proj.weight"
    deal(converted, weights | {name: weights[name].half()})
    assert "layers.0.attn.qkv.weight: expected q, k and v of one dtype, got ['F16', 'F32']" in refused(converted)


def test_one_tensor_under_two_names_is_refused(converted, refused, deal, stored):
    weights = stored(converted)
    deal(converted, weights | {"lm_head.weight": weights["language_model.lm_head.weight"]})
    assert "expected language_model.lm_head.weight once, got it as " in refused(converted)


def test_the_loader_names_the_command(checkpoint, tmp_path):
    for kind in ("internvl_chat", "skywork_chat"):
        source = checkpoint(kind, model_type=kind)
        with pytest.raises(ValueError, match=f"got '{kind}'; r1v2-fast convert {source.path} DST"):
            load.from_folder(source.path)
        shutil.rmtree(source.path)
