"""The vLLM engine against a real HTTP server over our model: what is sent, the probe, and that nothing wrong passes."""

import base64
import io

import pytest
import torch

from r1v2_fast.data.collate import Sequence, collate
from r1v2_fast.rollout.generation import LocalEngine
from r1v2_fast.rollout.http import Client
from r1v2_fast.rollout.vllm import VLLMEngine

SETTINGS = {"group_size": 3, "max_new_tokens": 10, "temperature": 0.8}


def engine(context, server, **options):
    return VLLMEngine(context.policy, Client(server.url, timeout=30, retries=0), **options)


def generate(context, server, prompts, **options):
    return engine(context, server, **options).generate(prompts, **SETTINGS, seeds=list(range(len(prompts))))


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("concurrency", [1, 3, 64])
def test_it_gives_the_responses_of_the_server_in_the_prompts_order(temperature, concurrency, context, prompts, serve):
    server = serve()
    settings = {**SETTINGS, "temperature": temperature, "seeds": list(range(len(prompts)))}
    got = engine(context, server, concurrency=concurrency).generate(prompts, **settings)
    expected = LocalEngine(context.policy).generate(prompts, **settings)
    assert [r.ids for r in got] == [r.ids for r in expected]
    assert [r.finished for r in got] == [r.finished for r in expected] and {r.finished for r in got} == {True, False}
    for one, other in zip(got, expected, strict=True):
        assert one.logprobs.dtype == torch.float32 and (one.logprobs - other.logprobs).abs().max() <= 1e-5
    assert len(server.asked) == len(prompts), "one request a prompt"


def test_what_is_sent_leaves_the_distribution_to_the_policy(context, prompts, serve):
    server = serve()
    engine(context, server).generate(prompts[:1], **SETTINGS, seeds=[7])
    (body,) = server.asked
    embeddings = torch.load(io.BytesIO(base64.b64decode(body.pop("prompt_embeds"))), weights_only=True)
    with torch.no_grad():
        expected = context.policy.embed(torch.tensor([prompts[0].ids]), [prompts[0].image_keys])[0]
    assert torch.equal(embeddings, expected) and embeddings.dtype == context.policy.dtype
    assert "prompt" not in body
    forbidden = context.policy.forbidden.tolist()
    assert body == {
        "model": "toy", "n": 3, "max_tokens": 10, "temperature": 0.8, "seed": 7,
        "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
        "logit_bias": {str(token): -100.0 for token in forbidden}, "ignore_eos": True,
        "stop_token_ids": [context.policy.tokenizer.eos_token_id], "include_stop_str_in_output": True,
        "logprobs": 0, "return_token_ids": True,
    }  # fmt: skip


def test_log_probs_of_a_server_that_forbids_by_bias_are_the_training_forwards(context, prompts, serve):
    sampled = generate(context, serve(), prompts)
    sequences = [Sequence(prompts[i // 3].ids, r.ids, prompts[i // 3].image_keys) for i, r in enumerate(sampled)]
    ours = context.policy.response_logprobs(collate(sequences, 0), temperature=0.8).logprobs.detach()
    assert (ours - torch.cat([r.logprobs for r in sampled])).abs().max() <= 1e-5


def test_the_probe_passes_on_the_policys_own_log_probs(context, prompts, serve):
    server = serve()
    engine(context, server).probe(prompts[0])
    assert server.asked[0]["temperature"] != 1 and server.asked[0]["prompt_embeds"]


def test_the_probe_refuses_raw_log_probs_and_names_the_option(context, prompts, serve):
    message = r"nearer to those at temperature 1. Start the server with --logprobs-mode processed_logprobs$"
    with pytest.raises(RuntimeError, match=message):
        engine(context, serve(mode="raw_logprobs")).probe(prompts[0])


def test_the_probe_refuses_other_weights(context, prompts, serve):
    server = serve()
    with torch.no_grad():
        server.language_model.layers[0].mlp.down_proj.weight.mul_(1.05)
    with pytest.raises(RuntimeError, match="its weights, dtype or quantization are not the policy's language model's"):
        engine(context, server).probe(prompts[0])
    engine(context, server, tolerance=100.0).probe(prompts[0])


@pytest.mark.parametrize("version", ["0.12.9", "0.9.2rc1", "0.1.dev0", "dev", None])
def test_a_server_below_the_floor_is_refused(version, context, prompts, serve):
    server = serve(version=version)
    with pytest.raises(RuntimeError, match=rf"expected vLLM 0.13.0 or newer, got {version}: .*CVE-2025-62164"):
        generate(context, server, prompts)
    assert server.asked == []


@pytest.mark.parametrize("version", ["0.13.0", "0.32.1.dev7+g1234", "1.0.0"])
def test_newer_servers_are_taken(version, context, prompts, serve):
    assert len(generate(context, serve(version=version), prompts[:1])) == 3


def test_the_model_must_be_served_under_the_name(context, prompts, serve):
    with pytest.raises(RuntimeError, match=r"expected the model 'other', got \['toy'\]; set rollout.model"):
        generate(context, serve(), prompts, model="other")
    with pytest.raises(RuntimeError, match=r"expected the model None, got \['a', 'b'\]; set rollout.model"):
        generate(context, serve(names=("a", "b")), prompts)
    server = serve(names=("a", "b"))
    generate(context, server, prompts[:1], model="b")
    assert server.asked[0]["model"] == "b"


def choice(reply, **fields):
    reply["choices"][1] |= fields


WRONG = {
    "another model": (lambda r: r.update(model="tiny"), "field 'model': expected toy, got tiny"),
    "no choices": (lambda r: r.pop("choices"), "field 'choices': expected a value, got none"),
    "few choices": (lambda r: r["choices"].pop(), "field 'choices': expected 3 of them, got 2"),
    "one index twice": (lambda r: choice(r, index=0), r"field 'index': expected 0 to 2, got \[0, 0, 2\]"),
    "no ids": (lambda r: choice(r, token_ids=None), "response 1, field 'token_ids': expected a value, got none"),
    "empty": (lambda r: choice(r, token_ids=[]), "field 'token_ids': expected 1 to 10 of them, got 0"),
    "too many": (lambda r: choice(r, token_ids=[30] * 11), "field 'token_ids': expected 1 to 10 of them, got 11"),
    "a placeholder": (lambda r: choice(r, token_ids=[30, 6]), r"ids below \d+, without \[0, 4, 5, 6\], got 6"),
    "out of range": (lambda r: choice(r, token_ids=[30, 999]), r"ids below \d+, without .*, got 999"),
    "words": (lambda r: choice(r, token_ids=["user"]), r"ids below \d+, without .*, got user"),
    "aborted": (
        lambda r: choice(r, finish_reason="abort"),
        "field 'finish_reason': expected 'stop' or 'length', got 'abort'",
    ),
    "no end": (
        lambda r: choice(r, token_ids=[30, 31], finish_reason="stop"),
        r"expected one of \[3\], the last, as it stopped, got those at \[\] of 2",
    ),
    "past the end": (lambda r: choice(r, token_ids=[3, 30], finish_reason="stop"), r"got those at \[0\] of 2"),
    "cut": (
        lambda r: choice(r, token_ids=[30, 31], finish_reason="length"),
        "expected 10, as its length ran out, got 2: is --max-model-len too small",
    ),
    "no log-probs": (lambda r: choice(r, logprobs=None), "field 'logprobs': expected a value, got none"),
    "few log-probs": (
        lambda r: r["choices"][1]["logprobs"]["token_logprobs"].pop(),
        r"field 'token_logprobs': expected \d+, one a token, got \d+",
    ),
    "a missing log-prob": (
        lambda r: r["choices"][1]["logprobs"]["token_logprobs"].__setitem__(0, None),
        "field 'token_logprobs': expected finite log-probs, 0 at most, got None",
    ),
    "NaN": (lambda r: r["choices"][1]["logprobs"]["token_logprobs"].__setitem__(0, float("nan")), "at most, got nan"),
    "minus infinity": (lambda r: r["choices"][1]["logprobs"]["token_logprobs"].__setitem__(0, -9999.0), "got -9999.0"),
    "a positive one": (lambda r: r["choices"][1]["logprobs"]["token_logprobs"].__setitem__(0, 0.5), "at most, got 0.5"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_reply_that_is_not_as_asked_names_the_prompt_and_the_field(kind, context, prompts, serve):
    change, message = WRONG[kind]
    server = serve()
    right = engine(context, server)
    expected = right.generate(prompts[1:2], **SETTINGS, seeds=[1])

    def alter(reply):
        change(reply)
        return reply

    server.alter = alter
    with pytest.raises(RuntimeError, match=f"reply to prompt text.*{message}"):
        right.generate(prompts[1:2], **SETTINGS, seeds=[1])
    server.alter = lambda reply: reply
    again = right.generate(prompts[1:2], **SETTINGS, seeds=[1])
    assert [r.ids for r in again] == [r.ids for r in expected], "the same call succeeds once the server is right"


def test_choices_in_another_order_are_put_into_theirs(context, prompts, serve):
    server = serve()
    expected = generate(context, server, prompts[:2])
    server.alter = lambda reply: {**reply, "choices": reply["choices"][::-1]}
    assert [r.ids for r in generate(context, server, prompts[:2])] == [r.ids for r in expected]


def test_after_a_failure_no_further_prompts_are_sent(context, prompts, serve):
    server = serve()
    server.alter = lambda reply: {**reply, "model": "tiny"}
    with pytest.raises(RuntimeError, match="field 'model'"):
        generate(context, server, prompts, concurrency=1)
    assert len(server.asked) <= 2


def test_a_temperature_at_which_a_bias_forbids_nothing_is_refused(context, prompts, serve):
    server = serve()
    with pytest.raises(ValueError, match="keeps placeholder tokens out up to temperature 4.0, got 5.0"):
        engine(context, server).generate(prompts, **{**SETTINGS, "temperature": 5.0}, seeds=list(range(8)))
    with pytest.raises(ValueError, match="needs 8 seeds, got None"):
        engine(context, server).generate(prompts, **SETTINGS)
    assert server.asked == []
