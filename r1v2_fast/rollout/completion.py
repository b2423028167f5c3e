"""vLLM's /v1/completions: what is asked for one prompt's responses, and what its reply must hold.

P prompt tokens, H hidden size, G responses.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import torch

from r1v2_fast.rollout.engine import Response

# The strongest logit_bias that vLLM takes: a forbidden token keeps exp(-100 / T) of its probability, 1e-11 at T = 4.
# allowed_token_ids would be exact, but is checked against the tokenizer, and a head may have more rows than that.
BIAS = -100.0
HOTTEST = 4.0
MINUS_INFINITY = -9999.0  # what vLLM writes for a log-prob of -inf


@dataclass(frozen=True)
class Ask:
    """What all prompts of one rollout share."""

    model: str
    group_size: int
    max_new_tokens: int
    temperature: float
    end: list[int]
    forbidden: list[int]
    vocabulary: int
    """Rows of the head."""


def request(ask: Ask, embeddings_PH: torch.Tensor, seed: int | None) -> dict[str, Any]:
    """The JSON body for one prompt: its embeddings, n = G responses, and no other change of the distribution.

    Every knob is sent: vLLM would take what is left out from the model's generation_config.json.
    """
    buffer = io.BytesIO()
    torch.save(embeddings_PH.cpu(), buffer)
    return {
        "model": ask.model,
        "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
        "n": ask.group_size,
        "max_tokens": ask.max_new_tokens,
        "temperature": ask.temperature,
        "seed": seed,  # to which vLLM adds a response's index
        "top_p": 1.0,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "logit_bias": {str(token): BIAS for token in ask.forbidden},
        "ignore_eos": True,  # the server's own; ours are:
        "stop_token_ids": ask.end,
        "include_stop_str_in_output": True,
        "logprobs": 0,  # of the sampled tokens alone
        "return_token_ids": True,
    }


def read(ask: Ask, prompt: str, reply: Any) -> list[Response]:
    """The G responses of a reply, in the order of their indices.

    raises  RuntimeError naming the prompt and the field, with what was expected and what came
    """
    model, choices = (_field(prompt, reply, name) for name in ("model", "choices"))
    if model != ask.model:
        raise _wrong(prompt, "model", ask.model, model)
    if not isinstance(choices, list) or len(choices) != ask.group_size:
        raise _wrong(prompt, "choices", f"{ask.group_size} of them", _counted(choices))
    indices = sorted(_field(prompt, choice, "index") for choice in choices)
    if indices != list(range(ask.group_size)):
        raise _wrong(prompt, "index", f"0 to {ask.group_size - 1}", indices)
    return [_response(ask, prompt, choice) for choice in sorted(choices, key=lambda choice: choice["index"])]


def _response(ask: Ask, prompt: str, choice: dict[str, Any]) -> Response:
    where = f"{prompt}, response {choice['index']}"
    ids, reason = _field(where, choice, "token_ids"), _field(where, choice, "finish_reason")
    if not isinstance(ids, list) or not 0 < len(ids) <= ask.max_new_tokens:
        raise _wrong(where, "token_ids", f"1 to {ask.max_new_tokens} of them", _counted(ids))
    if unknown := [i for i in ids if not isinstance(i, int) or not 0 <= i < ask.vocabulary or i in ask.forbidden]:
        raise _wrong(where, "token_ids", f"ids below {ask.vocabulary}, without {ask.forbidden}", unknown[0])
    if reason not in ("stop", "length"):
        raise _wrong(where, "finish_reason", "'stop' or 'length'", repr(reason))
    ends = [place for place, token in enumerate(ids) if token in ask.end]
    if reason == "stop" and ends != [len(ids) - 1]:
        raise _wrong(where, "token_ids", f"one of {ask.end}, the last, as it stopped", f"those at {ends} of {len(ids)}")
    if reason == "length" and len(ids) != ask.max_new_tokens:
        raise _wrong(
            where,
            "token_ids",
            f"{ask.max_new_tokens}, as its length ran out",
            f"{len(ids)}: is --max-model-len too small?",
        )
    logprobs = _field(where, _field(where, choice, "logprobs"), "token_logprobs")
    if not isinstance(logprobs, list) or len(logprobs) != len(ids):
        raise _wrong(where, "token_logprobs", f"{len(ids)}, one a token", _counted(logprobs))
    if unfit := [x for x in logprobs if not isinstance(x, (int, float)) or not MINUS_INFINITY < x <= 0]:
        raise _wrong(where, "token_logprobs", "finite log-probs, 0 at most", unfit[0])
    return Response(ids, torch.tensor(logprobs, dtype=torch.float32), bool(ends))


def _field(where: str, value: Any, name: str) -> Any:
    if not isinstance(value, dict) or value.get(name) is None:
        raise _wrong(where, name, "a value", "none")
    return value[name]


def _counted(value: Any) -> str:
    return str(len(value)) if isinstance(value, list) else repr(value)


def _wrong(where: str, field: str, expected: Any, got: Any) -> RuntimeError:
    return RuntimeError(
        f"the rollout server's reply to prompt {where}, field {field!r}: expected {expected}, got {got}"
    )
