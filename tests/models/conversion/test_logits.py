"""A converted model's logits against a forward written here from the original layout's definition.

B tiles, P patches, D tower width, L tokens, H language width. Nothing of transformers' InternVL or Qwen2 is used.
"""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from r1v2_fast.cli import main
from r1v2_fast.models import load
from r1v2_fast.testing.accuracy import assert_as_accurate


def rms(x, weight, eps):
    return weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps))


def norm(x, w, name, tower):
    if tower["norm_type"] == "layer_norm":
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], tower["layer_norm_eps"])
    return rms(x, w[f"{name}.weight"], tower["layer_norm_eps"])


def vit(w, tower, pixels, layer):
    """InternVisionModel: hidden states are the embeddings and what each layer leaves; `layer` counts among them."""
    side = tower["image_size"] // tower["patch_size"]
    x = F.conv2d(
        pixels,
        w["embeddings.patch_embedding.weight"],
        w["embeddings.patch_embedding.bias"],
        stride=tower["patch_size"],
    )
    rows, columns = x.shape[-2:]
    x = x.flatten(2).transpose(1, 2)
    position = w["embeddings.position_embedding"]
    grid = position[:, 1:].reshape(1, side, side, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)
    x = torch.cat([w["embeddings.class_embedding"].expand(len(x), 1, -1), x], 1)
    x = x + torch.cat([position[:, :1], grid], 1)
    states = [x]
    b, n, d = x.shape
    heads = tower["num_attention_heads"]
    for i in range(tower["num_hidden_layers"]):
        at = f"encoder.layers.{i}"
        y = norm(x, w, f"{at}.norm1", tower)
        q, k, v = F.linear(y, w[f"{at}.attn.qkv.weight"], w.get(f"{at}.attn.qkv.bias")).chunk(3, -1)
        if tower["qk_normalization"]:  # over all heads at once
            q = rms(q, w[f"{at}.attn.q_norm.weight"], tower["layer_norm_eps"])
            k = rms(k, w[f"{at}.attn.k_norm.weight"], tower["layer_norm_eps"])
        q, k, v = (t.reshape(b, n, heads, d // heads).transpose(1, 2) for t in (q, k, v))
        y = ((q @ k.transpose(-1, -2)) * (d // heads) ** -0.5).softmax(-1) @ v
        y = F.linear(y.transpose(1, 2).reshape(b, n, d), w[f"{at}.attn.proj.weight"], w[f"{at}.attn.proj.bias"])
        x = x + y * w[f"{at}.ls1"]
        y = F.linear(norm(x, w, f"{at}.norm2", tower), w[f"{at}.mlp.fc1.weight"], w[f"{at}.mlp.fc1.bias"])
        y = F.linear(F.gelu(y), w[f"{at}.mlp.fc2.weight"], w[f"{at}.mlp.fc2.bias"])
        x = x + y * w[f"{at}.ls2"]
        states.append(x)
    return states[layer]


def pixel_shuffle_v2(x, scale=0.5):
    n, rows, columns, c = x.shape
    x = x.view(n, rows, int(columns * scale), int(c / scale)).permute(0, 2, 1, 3).contiguous()
    x = x.view(n, int(columns * scale), int(rows * scale), int(c / scale**2))
    return x.permute(0, 2, 1, 3).contiguous()


def qwen2(w, text, x):
    heads, kv, length = text["num_attention_heads"], text["num_key_value_heads"], x.shape[1]
    size = text["hidden_size"] // heads
    base, scaling = text["rope_theta"], text.get("rope_scaling")
    if scaling and length > text["max_position_embeddings"]:  # dynamic NTK
        stretch = scaling["factor"] * length / text["max_position_embeddings"] - (scaling["factor"] - 1)
        base = base * stretch ** (size / (size - 2))
    frequencies = 1.0 / (base ** (torch.arange(0, size, 2, dtype=torch.float64) / size))
    angles = torch.outer(torch.arange(length, dtype=torch.float64), frequencies).repeat(1, 2)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    turn = lambda t: t * cos + torch.cat([-t[..., size // 2 :], t[..., : size // 2]], -1) * sin  # noqa: E731
    mask = torch.full((length, length), -math.inf, dtype=x.dtype).triu(1)
    for i in range(text["num_hidden_layers"]):
        at = f"model.layers.{i}"
        y = rms(x, w[f"{at}.input_layernorm.weight"], text["rms_norm_eps"])
        q, k, v = (
            F.linear(y, w[f"{at}.self_attn.{p}_proj.weight"], w[f"{at}.self_attn.{p}_proj.bias"])
            .unflatten(-1, (-1, size))
            .transpose(1, 2)
            for p in "qkv"
        )
        k, v = (t.repeat_interleave(heads // kv, 1) for t in (turn(k), v))
        y = (turn(q) @ k.transpose(-1, -2) * size**-0.5 + mask).softmax(-1) @ v
        x = x + F.linear(y.transpose(1, 2).flatten(2), w[f"{at}.self_attn.o_proj.weight"])
        y = rms(x, w[f"{at}.post_attention_layernorm.weight"], text["rms_norm_eps"])
        y = F.silu(F.linear(y, w[f"{at}.mlp.gate_proj.weight"])) * F.linear(y, w[f"{at}.mlp.up_proj.weight"])
        x = x + F.linear(y, w[f"{at}.mlp.down_proj.weight"])
    x = rms(x, w["model.norm.weight"], text["rms_norm_eps"])
    return F.linear(x, w.get("lm_head.weight", w["model.embed_tokens.weight"]))


def embeddings(weights, config, ids, pixels, context, dtype):
    w = {name: tensor.to(dtype) for name, tensor in weights.items()}
    tower = {"qk_normalization": True, "norm_type": "rms_norm", "layer_norm_eps": 1e-6, **config["vision_config"]}
    of = lambda part: {n.removeprefix(part): t for n, t in w.items() if n.startswith(part)}  # noqa: E731
    x = vit(of("vision_model."), tower, pixels.to(dtype), config["select_layer"])[:, 1:]
    side = math.isqrt(x.shape[1])
    x = pixel_shuffle_v2(x.reshape(len(x), side, side, -1)).flatten(1, 2)
    x = F.layer_norm(x, x.shape[-1:], w["mlp1.0.weight"], w["mlp1.0.bias"])
    x = F.linear(F.gelu(F.linear(x, w["mlp1.1.weight"], w["mlp1.1.bias"])), w["mlp1.3.weight"], w["mlp1.3.bias"])
    embedded = w["language_model.model.embed_tokens.weight"][ids].clone()
    embedded[ids == context] = x.flatten(0, 1)
    return embedded, of("language_model.")


def original_logits(*arguments):
    embedded, language = embeddings(*arguments)
    return qwen2(language, arguments[1]["llm_config"], embedded)


def drop_head(weights):
    weights.pop("language_model.lm_head.weight")


VARIANTS = {
    "InternViT-6B": {},
    "InternViT-300M": {"tower": {"qkv_bias": True, "qk_normalization": False, "norm_type": "layer_norm"}},
    "an inner layer": {"select_layer": -2},
    "tied": {"text": {"tie_word_embeddings": True}, "weights": drop_head},
    "dynamic rope": {"text": {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 16}},
    "larger tiles": {"force_image_size": 84},  # than the position embeddings: they are interpolated
}


@pytest.fixture(params=VARIANTS)
def converted(request, checkpoint, tmp_path):
    source = checkpoint(**VARIANTS[request.param])
    assert main(["convert", str(source.path), str(tmp_path / "dst")]) == 0
    return source, tmp_path / "dst"


def inputs(config, context=262):
    generator = torch.Generator().manual_seed(1)
    side = config["force_image_size"]
    tokens = (side // 14) ** 2 // 4
    pixels = torch.randn(2, 3, side, side, generator=generator)
    words = torch.randint(0, 256, (12,), generator=generator).tolist()
    ids = torch.tensor([[*words[:3], *[context] * tokens, *words[3:7], *[context] * tokens, *words[7:]]])
    return ids, pixels, context


@torch.no_grad()
def test_logits_are_those_of_the_original_layouts_definition(converted):
    source, folder = converted
    ids, pixels, context = inputs(source.config)
    loaded = load.from_folder(folder)
    assert loaded.model.config.image_token_id == context
    got = loaded.model(input_ids=ids, pixel_values=pixels).logits
    reference, truth = (
        original_logits(source.weights, source.config, ids, pixels, context, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    assert truth.std() > 0.1
    assert_as_accurate(got, reference, truth)


@torch.no_grad()
def test_the_language_model_alone_gives_the_same_logits_from_prompt_embeddings(converted, tmp_path):
    source, folder = converted
    assert main(["convert", str(source.path), str(tmp_path / "a"), "--language-model-only"]) == 0
    assert main(["convert", str(folder), str(tmp_path / "b"), "--language-model-only"]) == 0
    ids, pixels, context = inputs(source.config)
    embedded, _ = embeddings(source.weights, source.config, ids, pixels, context, torch.float32)
    reference, truth = (
        original_logits(source.weights, source.config, ids, pixels, context, dtype)
        for dtype in (torch.float32, torch.float64)
    )
    for name in "ab":
        model, keys = AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert type(model).__name__ == "Qwen2ForCausalLM" and not any(
            keys[f"{k}_keys"] for k in ("missing", "unexpected")
        )
        assert_as_accurate(model(inputs_embeds=embedded).logits, reference, truth)
