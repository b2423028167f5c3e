"""The toy's tokenizer: one token per word, digit and sign, with InternVL's image tokens and ChatML turns."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

IMAGE_TOKENS = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}

# InternVL's template, less the system turn: an image part becomes one context token, expanded when images are known.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for part in m['content'] %}"
    "{% if part['type'] == 'image' %}<IMG_CONTEXT>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build(words: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer over `words` (the questions' vocabulary), the digits, `_` for an empty half, and the tags."""
    special = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", *IMAGE_TOKENS.values()]
    plain = ["<think>", "</think>", "user", "assistant", "\n", " ", "_", "?", ".", *"0123456789", *sorted(set(words))]
    vocabulary = {token: index for index, token in enumerate(special + plain)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"<[^<>]+>|[A-Za-z]+|\d|\s|."), "isolated")
    core.decoder = decoders.Fuse()
    return in_chatml(core, pad_token="<pad>", unk_token="<unk>")


def in_chatml(core: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    """`core`, which has ChatML's and the image tokens, as transformers' tokenizer; `special` names further ones."""
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **special,
        eos_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
        extra_special_tokens=IMAGE_TOKENS,
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
