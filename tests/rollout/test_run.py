"""Runs whose responses a vLLM server samples: the same as with the local engine, and truncated weights where it differs."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Qwen2ForCausalLM

from r1v2_fast import config
from r1v2_fast.cli import main
from r1v2_fast.log import Log, read
from r1v2_fast.models import load
from r1v2_fast.models.feature_cache import FeatureCache
from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout.choose import engine_of
from r1v2_fast.rollout.http import Client
from r1v2_fast.rollout.weight_transfer import WeightTransfer, language_model_weights
from r1v2_fast.train import run
from r1v2_fast.train.context import Context

SMALL = [
    "run.stages=[grpo]", "model.preset=null", "data.sizes={policy: 24, heldout: 6, align: 4, reward: 4}", "samples_every=1",
    "grpo.steps=2", "grpo.sampling.prompts=6", "grpo.sampling.group_size=4", "checkpoint.every=1", "evaluation.every=9",
    "grpo.informative_from=answer", "rollout.timeout=30", "rollout.retries=0",
]  # fmt: skip


@pytest.fixture
def recipe(context, tmp_path):
    """recipe(folder, server, *overrides): two steps of GRPO from the context's policy."""
    load.save_folder(tmp_path / "model", context.policy.loaded)
    reward = tmp_path / "reward.py"
    reward.write_text("def letters(prompts, completions, **_):\n    return [float(len(c) % 3) for c in completions]\n")
    terms = f"grpo.rewards=[{{name: answer, function: '{reward}:letters'}}]"

    def make(folder, server, *more):
        engine = [] if server is None else ["rollout.engine=vllm", f"rollout.url={server.url}"]
        own = [f"run.folder={tmp_path / folder}", f"model.path={tmp_path / 'model'}", terms]
        return config.load("digits", [*SMALL, *own, *engine, *more])

    return make


def stage_of(recipe):
    folder = Path(recipe.run.folder)
    context = Context(recipe, folder, Log(folder))
    context.use(context.initial())
    return run.STAGES["grpo"](context, recipe.grpo)


def lowered(reply, by):
    """The log-probs of a reply, less what `by` has for each token in turn."""
    for choice in reply["choices"]:
        logprobs = choice["logprobs"]["token_logprobs"]
        choice["logprobs"]["token_logprobs"] = [x - by[i % len(by)] for i, x in enumerate(logprobs)]
    return reply


def lines(folder):
    drop = ("time", "step_time")
    return [{k: v for k, v in line.items() if k not in drop} for line in read(folder / "metrics.jsonl")]


def close(one, other):
    assert one.keys() == other.keys()
    for name, value in other.items():
        if isinstance(value, float):
            assert one[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
        else:
            assert one[name] == value, name


def test_a_run_over_a_server_equals_the_local_one(recipe, serve):
    server = serve()
    local, served = run.train(recipe("local", None)), run.train(recipe("served", server))
    expected, got = lines(local), lines(served)
    assert [line["step"] for line in got if "loss" in line] == [0, 1] and len(got) == len(expected) == 4
    assert any(line.get("grad_norm", 0) > 0 for line in got)
    for one, other in zip(got, expected, strict=True):
        close(one, other)
    ours, theirs = (read(folder / "samples.jsonl") for folder in (served, local))
    assert [s["completion"] for s in ours] == [s["completion"] for s in theirs]
    moved = load.from_folder(served / "final").model.model
    before = load.from_folder(recipe("x", None).model.path).model.model
    assert not torch.equal(moved.multi_modal_projector.linear_1.weight, before.multi_modal_projector.linear_1.weight)
    assert torch.equal(
        moved.language_model.layers[0].mlp.up_proj.weight, server.language_model.layers[0].mlp.up_proj.weight
    )
    images = [body["prompt_embeds"] for body in server.asked]
    assert len(set(images)) > 20, "the adapter moved, and with it the prompts"


def test_a_run_in_16_bits_sends_embeddings_in_them(recipe, context, tmp_path, serve):
    half = load.from_folder(recipe("x", None).model.path, dtype=torch.bfloat16)
    server = serve(Policy(half, context.reader.pixels, FeatureCache()))  # which asserts the dtype of what arrives
    folder = run.train(recipe("run", server, "model.dtype=bfloat16"))
    assert any(line.get("grad_norm", 0) > 0 for line in lines(folder))


def test_a_converted_language_model_is_what_a_server_needs(recipe, context, prompts, tmp_path, serve):
    assert main(["convert", recipe("x", None).model.path, str(tmp_path / "llm"), "--language-model-only"]) == 0
    alone = Qwen2ForCausalLM.from_pretrained(tmp_path / "llm")
    server = serve(SimpleNamespace(internvl=SimpleNamespace(language_model=alone.model), head=alone.lm_head))
    engine_of(config.Rollout(engine="vllm", url=server.url), context.policy).probe(prompts[0])
    assert len(server.asked) == 1


def test_a_server_with_raw_log_probs_stops_the_run_before_its_first_step(recipe, serve):
    server = serve(mode="raw_logprobs")
    with pytest.raises(RuntimeError, match="--logprobs-mode processed_logprobs"):
        run.train(recipe("run", server))
    assert len(server.asked) == 1


def test_a_run_whose_server_died_resumes_to_the_same_numbers(recipe, serve, tmp_path):
    whole = run.train(recipe("whole", serve()))
    server = serve()
    server.before = lambda handler, number: number > 1 + 12 + 6 + 3 and not handler.answer(500, b"worker died")
    with pytest.raises(RuntimeError, match="status 500: worker died"):
        run.train(recipe("stopped", server))
    assert [line["step"] for line in lines(tmp_path / "stopped") if "loss" in line] == [0]
    other = serve()
    stopped = run.train(recipe("stopped", other), resume=True)  # at another address, which is free to change
    assert other.url != server.url
    for one, expected in zip(lines(stopped), lines(whole), strict=True):
        close(one, expected)


def test_log_probs_that_differ_weigh_tokens_by_the_truncated_ratio(recipe, serve):
    """One update a rollout: old is the policy's own, detached, so a token weighs min(exp(old - behaviour), cap)."""
    server = serve()

    server.alter = lambda reply: lowered(reply, (0.0, 0.4, 1.5))
    stage = stage_of(recipe("run", server, "grpo.loss.aggregate=token_sum", "grpo.buffer=null"))
    samples = stage.collect(0, {})
    parameters = list(stage.model.parameters.values())
    got = torch.autograd.grad(stage.loss(samples, stage.counts(samples), {}), parameters)

    batch = stage.context.reader.batch([sample.sequence for sample in samples], "cpu")
    current = stage.context.policy.response_logprobs(batch, temperature=1.0).logprobs
    behaviour = torch.cat([sample.behaviour_logprobs for sample in samples])
    lengths = batch.offsets.diff()
    advantages = torch.tensor([sample.advantage for sample in samples]).repeat_interleave(lengths)
    ratio = (current.detach() - behaviour).exp()
    weights = ratio.clamp(max=stage.config.loss.behaviour_cap)
    third = torch.cat([torch.arange(n) % 3 for n in lengths.tolist()])
    for remainder, weight in enumerate((1.0, 1.4918247, 2.0)):
        assert (weights[third == remainder] - weight).abs().max() <= 1e-4
    expected = torch.autograd.grad(-(weights * advantages * current).sum(), parameters)
    unweighted = torch.autograd.grad(
        -(advantages * stage.context.policy.response_logprobs(batch, temperature=1.0).logprobs).sum(), parameters
    )
    for one, other, plain in zip(got, expected, unweighted, strict=True):
        assert (one - other).abs().max() <= 1e-4 * other.abs().max()
        assert (plain - other).abs().max() > 1e-2 * other.abs().max()


def test_several_updates_start_from_the_policys_own_log_probs(recipe, serve):
    server = serve()
    server.alter = lambda reply: lowered(reply, (0.5,))
    stage = stage_of(recipe("run", server, "grpo.updates_per_rollout=2"))
    for sample in stage.collect(0, {}):
        assert (sample.old_logprobs - sample.behaviour_logprobs - 0.5).abs().max() <= 1e-4


def test_a_recipe_that_trains_the_language_model_needs_a_way_for_its_weights(recipe, serve):
    server = serve()
    message = "grpo trains the language model, which a vLLM server holds too: rollout.weight_transfer must be host:port"
    for more in ("grpo.train=[adapter, llm]", "grpo.lora={llm: {rank: 4}}"):
        with pytest.raises(ValueError, match=message):
            recipe("run", server, more)
        recipe("run", None, more)
        recipe("run", server, more, "rollout.weight_transfer=127.0.0.1:29500")
    recipe("run", server, "grpo.train=[adapter, vision]")


@pytest.mark.parametrize("parts", [(["adapter", "llm"], {}), (["adapter"], {"llm": config.LoRA(rank=4)})])
def test_the_weights_that_are_sent_are_the_language_models_own(parts, recipe, context, prompts):
    loaded = load.from_folder(recipe("run", None).model.path)
    policy = Policy(loaded, context.reader.pixels, FeatureCache())
    policy.train_parts(*parts)
    with torch.no_grad():
        for name, parameter in policy.parameters.items():
            if "multi_modal_projector" not in name:
                parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    alone = Qwen2ForCausalLM(loaded.model.config.text_config).eval()
    sent = dict(language_model_weights(policy))
    assert sent.keys() == alone.state_dict().keys()
    alone.load_state_dict(sent)
    ids = torch.tensor([[9, 8, 20, 30, 31]])
    with torch.no_grad():
        hidden = policy.internvl.language_model(input_ids=ids).last_hidden_state
        assert (alone(input_ids=ids).logits - policy.head(hidden)).abs().max() <= 1e-4
        assert (
            alone(input_ids=ids).logits
            - context.policy.head(context.policy.internvl.language_model(input_ids=ids).last_hidden_state)
        ).abs().max() > 1e-2


def test_a_weight_transfer_says_what_it_needs(context, serve):
    client = Client(serve().url)
    for address in ("29500", "host:", "host:port"):
        with pytest.raises(ValueError, match=f"rollout.weight_transfer must be host:port, got '{address}'"):
            WeightTransfer(context.policy, client, address)
    with pytest.raises(ValueError, match="to a server on loopback alone: its endpoints take no key, got https://gpu"):
        WeightTransfer(context.policy, Client("https://gpu.example.com"), "127.0.0.1:29500")
    with pytest.raises(RuntimeError, match="needs a vllm with weight transfer installed.*rollout.engine=local"):
        WeightTransfer(context.policy, client, "127.0.0.1:29500").send()
