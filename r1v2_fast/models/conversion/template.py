"""A chat template that takes image parts, made from the checkpoint's own, which may take strings alone."""

from __future__ import annotations

from typing import Any

CONTEXT = "<IMG_CONTEXT>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Original templates add message.content to a string: a question held `<image>\n` as text, and Python code of the
# checkpoint replaced it. Put before such a template, this turns a message of parts into the string it wants, an image
# being one context token and a line break, and leaves everything else of it alone: its turns, its system message, its
# tools, and the `<think>` that it opens for the answer.
FLATTEN = (
    "{%- set flat = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- if message['content'] is string or message['content'] is not iterable -%}"
    "{%- set flat.messages = flat.messages + [message] -%}"
    "{%- else -%}"
    "{%- set text = namespace(value='') -%}"
    "{%- for part in message['content'] -%}"
    "{%- set text.value = text.value + ('" + CONTEXT + "\\n' if part['type'] == 'image' else part['text']) -%}"
    "{%- endfor -%}"
    "{%- set flat.messages = flat.messages + [dict(message, content=text.value)] -%}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- set messages = flat.messages %}"
)

_QUESTION = "what-is-seen"
_PARTS = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": _QUESTION}]}]
_STRING = [{"role": "user", "content": f"{CONTEXT}\n{_QUESTION}"}]


def with_images(tokenizer: Any, template: str | None, *, where: str) -> str:
    """The template as it is where it writes an image part as one context token and a line break, else behind FLATTEN.

    template  None: the checkpoint has none, and ChatML is taken where its tokenizer has the marks
    raises    ValueError where there is none, or the template takes neither parts nor strings
    """
    if template is None:
        absent = [token for token in ("<|im_start|>", "<|im_end|>") if token not in tokenizer.get_vocab()]
        if absent:
            raise ValueError(
                f"{where}: it has no chat template, and its tokenizer no {' and '.join(absent)} for ChatML"
            )
        template = CHATML
    if (wanted := _render(tokenizer, template, _STRING)) is None or wanted.count(_QUESTION) != 1:
        wanted = None
    if takes_parts(tokenizer, template, wanted):
        return template
    flattened = FLATTEN + ("\n" if template.startswith("\n") else "") + template  # the first line break is dropped
    if wanted is None or not takes_parts(tokenizer, flattened, wanted):
        raise ValueError(f"{where}: its chat template takes neither a string nor parts as a message's content")
    return flattened


def takes_parts(tokenizer: Any, template: str, wanted: str | None) -> bool:
    rendered = _render(tokenizer, template, _PARTS)
    if rendered is None:
        return False
    if wanted is not None:
        bare = rendered.replace(f"<img>{CONTEXT}</img>", CONTEXT)  # which the encoder strips, too
        return bare == wanted
    return rendered.count(CONTEXT) == 1 and rendered.count(_QUESTION) == 1


def _render(tokenizer: Any, template: str, messages: list[dict]) -> str | None:
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template raises what it likes
        return None
