"""An architecture with random weights and a made-up tokenizer: a recipe's speed and memory can be tried without a checkpoint.

V vocabulary. The model is made on the meta device and filled where it will run: the CPU never holds a copy.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import InternVLConfig, InternVLForConditionalGeneration, PreTrainedTokenizerFast

from r1v2_fast.models import presets
from r1v2_fast.models.load import Loaded, with_processor
from r1v2_fast.models.toy_tokenizer import IMAGE_TOKENS, in_chatml


def build(
    name: str,
    changes: Mapping[str, Any] | None = None,
    *,
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Loaded:
    """The architecture `name` of `presets`, with `changes` to its config, filled at random on `device`.

    raises  ValueError on an unknown name or key, or a vocabulary without room for the special tokens
    """
    config = presets.architecture(name, changes)
    tokenizer = byte_tokenizer(config)
    config.text_config.dtype = config.vision_config.dtype = dtype  # as a loaded folder's config says it
    config.text_config.pad_token_id = tokenizer.pad_token_id
    model = on_meta(config, dtype)
    model.to_empty(device=device)
    fill(model, seed=seed)
    return with_processor(model, tokenizer, crop_to_patches=True)


def on_meta(config: InternVLConfig, dtype: torch.dtype) -> InternVLForConditionalGeneration:
    """The model without storage, its parameters in `dtype`; rotary frequencies stay fp32, as in a loaded folder."""
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(config)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def fill(model: InternVLForConditionalGeneration, *, seed: int) -> None:
    """Random weights that keep every layer's scale near 1, and so logits near N(0, 1); a pure function of the seed.

    Matrices are normal with variance 1 / fan-in, those that write into the residual stream 1 / (2 fan-in layers).
    """
    device = model.lm_head.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    text, vision = model.config.text_config, model.config.vision_config
    depth = {"language_model": text.num_hidden_layers, "vision_tower": vision.num_hidden_layers}
    writers = ("o_proj.weight", "down_proj.weight", "projection_layer.weight", "fc2.weight")
    for name, parameter in model.named_parameters():
        if name.endswith(("lambda_1", "lambda_2")):
            parameter.fill_(vision.layer_scale_init_value)
        elif "norm" in name.rsplit(".", 2)[-2]:
            parameter.fill_(float(name.endswith("weight")))
        elif parameter.dim() == 1 or "cls_token" in name or "position_embeddings" in name:
            parameter.zero_()
        elif "embed_tokens" in name:
            parameter.normal_(generator=generator)
        else:
            variance = 1 / parameter[0].numel()
            if name.endswith(writers):
                variance /= 2 * next(layers for part, layers in depth.items() if part in name)
            parameter.normal_(std=variance**0.5, generator=generator)
    for module in model.modules():
        if hasattr(module, "original_inv_freq"):  # to_empty left it without values
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers():
                getattr(module, name).copy_(buffer)


def byte_tokenizer(config: InternVLConfig) -> PreTrainedTokenizerFast:
    """One token a byte, InternVL's image tokens at the config's ids, ChatML; made-up words fill the vocabulary up.

    Every id up to V decodes, as a policy with random weights samples all of them. Only the bytes and the special tokens
    are ever read from text.
    raises  ValueError where the ids and the vocabulary leave no room
    """
    size, context, eos = config.text_config.vocab_size, config.image_token_id, config.text_config.eos_token_id
    special = {
        eos - 2: "<|endoftext|>", eos - 1: "<|im_start|>", eos: "<|im_end|>",
        context - 2: IMAGE_TOKENS["start_image_token"],
        context - 1: IMAGE_TOKENS["end_image_token"],
        context: IMAGE_TOKENS["context_image_token"],
    }  # fmt: skip
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if len(special) != 6 or min(special) < len(alphabet) or max(special) >= size:
        raise ValueError(
            f"a byte tokenizer needs its special tokens between {len(alphabet)} and the vocabulary's size {size}, "
            f"got image_token_id {context} and eos_token_id {eos}"
        )
    words = _words()
    tokens = alphabet + [special.get(index) or next(words) for index in range(len(alphabet), size)]
    core = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special.values()])
    return in_chatml(core, pad_token="<|endoftext|>")


def _words() -> Iterator[str]:
    """' aa', ' ab', ...: in the byte-level alphabet the space is Ġ."""
    for length in itertools.count(2):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "Ġ" + "".join(letters)
