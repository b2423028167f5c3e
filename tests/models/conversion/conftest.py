"""A tiny checkpoint in the original layout, with every part of a real one, and variations of it."""

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

D, LAYERS, HEADS, MLP, PATCH, SIDE = 32, 2, 4, 64, 14, 56  # the tower: 16 patches, 4 image tokens
H, KV, FFN = 48, 2, 80  # the language model, 4 heads
PLAIN = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|video_pad|>"]
IMAGE = ["<img>", "</img>", "<IMG_CONTEXT>", "<quad>", "</quad>"]
# QwQ's template in short: strings alone, a system message, an opened <think>
TEMPLATE = (
    "{%- if messages[0]['role'] == 'system' %}\n"
    "    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}\n"
    "{%- else %}\n    {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}\n{%- endif %}\n"
    "{%- for message in messages %}\n"
    "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n"
    "    {%- elif message.role == 'assistant' %}\n"
    "        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}\n"
    "        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
    "    {%- endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n<think>\\n' }}\n{%- endif %}\n"
)
CONFIG = {
    "_commit_hash": None,
    "architectures": ["InternVLChatModel"],
    "auto_map": {"AutoModel": "modeling_internvl_chat.InternVLChatModel"},
    "downsample_ratio": 0.5,
    "dynamic_image_size": True,
    "force_image_size": SIDE,
    "llm_config": {
        "_name_or_path": "./pretrained/QwQ-32B",
        "architectures": ["Qwen2ForCausalLM"],
        "attn_implementation": "flash_attention_2",
        "bos_token_id": 256,
        "eos_token_id": 258,
        "hidden_act": "silu",
        "hidden_size": H,
        "intermediate_size": FFN,
        "max_position_embeddings": 512,
        "max_window_layers": 2,
        "model_type": "qwen2",
        "num_attention_heads": 4,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": KV,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "use_bfloat16": True,
        "use_cache": False,
    },
    "max_dynamic_patch": 12,
    "min_dynamic_patch": 1,
    "model_type": "internvl_chat",
    "pad2square": False,
    "ps_version": "v2",
    "select_layer": -1,
    "template": "internvl2_5",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
    "use_thumbnail": True,
    "vision_config": {  # qk_normalization, norm_type, layer_norm_eps, qkv_bias: the original class's defaults
        "architectures": ["InternVisionModel"],
        "auto_map": {"AutoModel": "modeling_intern_vit.InternVisionModel"},
        "drop_path_rate": 0.0,
        "hidden_size": D,
        "image_size": SIDE,
        "intermediate_size": MLP,
        "model_type": "intern_vit_6b",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "patch_size": PATCH,
        "torch_dtype": "float32",
        "use_flash_attn": True,
    },
}
SMALL_TOWER = {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}  # InternViT-300M
PREPROCESSOR = {
    "crop_size": SIDE, "do_center_crop": True, "do_normalize": True, "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225], "resample": 3, "size": SIDE,
}  # fmt: skip


def byte_level():
    """The 256 letters of byte-level BPE, in GPT-2's order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]


def write_tokenizer(path, *, image_tokens=IMAGE, template=TEMPLATE, eos="<|im_end|>"):
    vocabulary = {letter: i for i, letter in enumerate(byte_level())}
    added = {token: 256 + i for i, token in enumerate([*PLAIN, *image_tokens])}
    (path / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (path / "merges.txt").write_text("#version: 0.2\n")
    (path / "added_tokens.json").write_text(json.dumps(added))
    marks = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config = {
        "added_tokens_decoder": {str(i): {"content": token, **marks} for token, i in added.items()},
        "additional_special_tokens": list(added)[1:],
        "clean_up_tokenization_spaces": False,
        "eos_token": eos,
        "model_max_length": 512,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        **({"chat_template": template} if template else {}),
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "special_tokens_map.json").write_text(json.dumps({"eos_token": eos, "pad_token": "<|endoftext|>"}))
    return 256 + len(added)


def tensors(config, vocab, dtype=torch.float32, seed=0):
    """Every tensor by its original name, written out from the layout's definition."""
    tower = {"qkv_bias": False, "qk_normalization": True, "norm_type": "rms_norm", **config["vision_config"]}
    text = config["llm_config"]
    d, m, p = tower["hidden_size"], tower["intermediate_size"], tower["patch_size"]
    h, f = text["hidden_size"], text["intermediate_size"]
    kv = text["num_key_value_heads"] * (h // text["num_attention_heads"])
    side = int(1 / config["downsample_ratio"])
    shapes = {
        "vision_model.embeddings.class_embedding": (1, 1, d),
        "vision_model.embeddings.patch_embedding.weight": (d, 3, p, p),
        "vision_model.embeddings.patch_embedding.bias": (d,),
        "vision_model.embeddings.position_embedding": (1, (tower["image_size"] // p) ** 2 + 1, d),
    }
    for i in range(tower["num_hidden_layers"]):
        at = f"vision_model.encoder.layers.{i}"
        shapes |= {f"{at}.ls1": (d,), f"{at}.ls2": (d,), f"{at}.attn.qkv.weight": (3 * d, d)}
        shapes |= {f"{at}.attn.qkv.bias": (3 * d,)} if tower["qkv_bias"] else {}
        if tower["qk_normalization"]:
            shapes |= {f"{at}.attn.q_norm.weight": (d,), f"{at}.attn.k_norm.weight": (d,)}
        shapes |= {f"{at}.attn.proj.weight": (d, d), f"{at}.attn.proj.bias": (d,)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{at}.{norm}.weight": (d,)}
            shapes |= {f"{at}.{norm}.bias": (d,)} if tower["norm_type"] == "layer_norm" else {}
        shapes |= {f"{at}.mlp.fc1.weight": (m, d), f"{at}.mlp.fc1.bias": (m,)}
        shapes |= {f"{at}.mlp.fc2.weight": (d, m), f"{at}.mlp.fc2.bias": (d,)}
    shapes |= {"language_model.model.embed_tokens.weight": (vocab, h)}
    for i in range(text["num_hidden_layers"]):
        at = f"language_model.model.layers.{i}"
        for part, rows in (("q", h), ("k", kv), ("v", kv)):
            shapes |= {f"{at}.self_attn.{part}_proj.weight": (rows, h), f"{at}.self_attn.{part}_proj.bias": (rows,)}
        shapes |= {f"{at}.self_attn.o_proj.weight": (h, h)}
        shapes |= {f"{at}.mlp.gate_proj.weight": (f, h), f"{at}.mlp.up_proj.weight": (f, h)}
        shapes |= {f"{at}.mlp.down_proj.weight": (h, f)}
        shapes |= {f"{at}.input_layernorm.weight": (h,), f"{at}.post_attention_layernorm.weight": (h,)}
    shapes |= {"language_model.model.norm.weight": (h,), "language_model.lm_head.weight": (vocab, h)}
    c = d * side**2
    shapes |= {"mlp1.0.weight": (c,), "mlp1.0.bias": (c,), "mlp1.1.weight": (h, c), "mlp1.1.bias": (h,)}
    shapes |= {"mlp1.3.weight": (h, h), "mlp1.3.bias": (h,)}
    if dtype == "meta":
        return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(seed)
    return {name: (torch.randn(shape, generator=generator) * 0.3).to(dtype) for name, shape in shapes.items()}


def write_shards(path, weights, shards=3):
    """Names dealt out in turn, so that no shard is a part of the model."""
    for stale in (*path.glob("model*.safetensors*"),):
        stale.unlink()
    if shards == 1:
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        name = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        held = {n: t for j, (n, t) in enumerate(weights.items()) if j % shards == i}
        save_file(held, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture
def checkpoint(tmp_path):
    """checkpoint(name="src", tower={}, text={}, tokenizer={}, dtype, shards, **top): its folder, config and tensors."""

    def make(name="src", *, tower=(), text=(), tokenizer=(), dtype=torch.float32, shards=3, weights=None, **top):
        path = tmp_path / name
        path.mkdir()
        vocab = write_tokenizer(path, **dict(tokenizer))
        config = json.loads(json.dumps(CONFIG))
        config |= top
        config["vision_config"] |= dict(tower)
        config["llm_config"] |= {"vocab_size": vocab, **dict(text)}
        held = tensors(config, vocab, dtype)
        if weights:
            weights(held)
        write_shards(path, held, shards)
        (path / "config.json").write_text(json.dumps(config))
        (path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
        (path / "generation_config.json").write_text(
            json.dumps({"eos_token_id": [257, 258], "_from_model_config": True})
        )
        return SimpleNamespace(path=path, config=config, weights=held)

    return make


@pytest.fixture
def stored():
    """stored(folder): every tensor by name, as safetensors' own reader sees them, file by file."""
    from safetensors.torch import load_file

    def read(folder):
        return {n: t for file in sorted(folder.glob("*.safetensors")) for n, t in load_file(file).items()}

    return read


@pytest.fixture
def small_tower():
    return SMALL_TOWER


@pytest.fixture
def meta_tensors():
    return lambda config, vocab: tensors(config, vocab, "meta")


@pytest.fixture
def deal():
    return write_shards
