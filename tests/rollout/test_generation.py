"""The local engine: the same responses with any number of slots, and transformers' and the training forward's numbers."""

import threading

import pytest
import torch
from transformers import AutoModelForImageTextToText, Qwen2Config, Qwen2Model

from r1v2_fast.data.collate import Sequence, collate
from r1v2_fast.models import load
from r1v2_fast.models.feature_cache import FeatureCache
from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout import decode, generation
from r1v2_fast.rollout.generation import LocalEngine, end_ids
from r1v2_fast.rollout.slots import window_of

SETTINGS = {"group_size": 3, "max_new_tokens": 12}


def sample(context, prompts, *, temperature=1.0, **options):
    settings = {**SETTINGS, "temperature": temperature, "seeds": list(range(len(prompts)))}
    return LocalEngine(context.policy, **options).generate(prompts, **settings)


def same(got, expected):
    assert [r.ids for r in got] == [r.ids for r in expected]
    assert [r.finished for r in got] == [r.finished for r in expected]
    for one, other in zip(got, expected, strict=True):
        assert one.logprobs.dtype == torch.float32 and one.logprobs.shape == (len(one.ids),)
        assert (one.logprobs - other.logprobs).abs().max() <= 1e-5 * (1 + other.logprobs.abs().max())


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("options", [{"max_rows": n} for n in (1, 2, 4, 7, 23, 99)] + [{"prefill_tokens": 40}])
def test_slots_and_refill_do_not_change_a_response(options, temperature, context, prompts):
    whole = sample(context, prompts, temperature=temperature)
    assert len(whole) == 3 * len(prompts) and len({len(r.ids) for r in whole}) > (1 if temperature == 0 else 4)
    assert {r.finished for r in whole} == {True, False}
    same(sample(context, prompts, temperature=temperature, **options), whole)


def test_a_response_does_not_depend_on_its_company(context, prompts):
    whole = sample(context, prompts)
    alone = LocalEngine(context.policy).generate([prompts[5]], **SETTINGS, temperature=1.0, seeds=[5])
    same(alone, whole[15:18])


def test_widths_of_attention_do_not_change_a_response(context, prompts, monkeypatch):
    whole = sample(context, prompts)
    monkeypatch.setattr(decode, "BUCKET", 8)
    same(sample(context, prompts, max_rows=5), whole)


def test_greedy_responses_equal_transformers_generate_token_for_token(context, prompts, tmp_path):
    """From the saved folder, whose generation config suppresses the tokens that a rollout forbids."""
    policy = context.policy
    favourite = torch.cat([r.logprobs for r in sample(context, prompts[:1], temperature=0.0)])
    assert favourite.exp().max() > 0.2, "not a coin toss"
    with torch.no_grad():  # a model that would rather write placeholders
        head = policy.head.weight[policy.forbidden].clone()
        policy.head.weight[policy.forbidden] = 3 * policy.head.weight[[9, 10, 11, 12]]
    try:
        load.save_folder(tmp_path, policy.loaded)
        ours = LocalEngine(policy).generate(prompts, group_size=1, max_new_tokens=12, temperature=0.0)
    finally:
        policy.head.weight.data[policy.forbidden] = head
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    unsuppressed = 0
    for prompt, response in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt.ids])
        pixels = {"pixel_values": torch.cat(context.reader.pixels(prompt.image_keys))} if prompt.image_keys else {}
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels, "max_new_tokens": 12}
        theirs = model.generate(**given, do_sample=False)[0, ids.shape[1] :].tolist()
        assert response.ids == theirs
        free = model.generate(**given, do_sample=False, suppress_tokens=None)[0, ids.shape[1] :].tolist()
        unsuppressed += free != theirs
    assert len({tuple(r.ids) for r in ours}) > 3 and unsuppressed > 0


@pytest.mark.parametrize("max_rows", [None, 5])
def test_sampled_log_probs_are_the_training_forwards(max_rows, context, prompts):
    sampled = sample(context, prompts, temperature=0.7, max_rows=max_rows)
    sequences = [Sequence(prompts[i // 3].ids, r.ids, prompts[i // 3].image_keys) for i, r in enumerate(sampled)]
    batch = collate(sequences, 0)
    ours = context.policy.response_logprobs(batch, temperature=0.7).logprobs.detach()
    behaviour = torch.cat([r.logprobs for r in sampled])
    assert (ours - behaviour).abs().max() <= 1e-5
    hotter = context.policy.response_logprobs(batch, temperature=0.8).logprobs.detach()
    assert (hotter - behaviour).abs().max() > 1e-2, "another temperature would pass too"


@pytest.mark.parametrize("parts", [["adapter"], ["adapter", "llm"]], ids=["adapter", "language model in fp32"])
def test_in_16_bits_too_log_probs_are_the_training_forwards_up_to_rounding(parts, context, prompts, tmp_path):
    load.save_folder(tmp_path, context.policy.loaded)
    policy = Policy(load.from_folder(tmp_path, dtype=torch.bfloat16), context.reader.pixels, FeatureCache())
    policy.train_parts(parts)
    sampled = LocalEngine(policy, max_rows=5).generate(prompts, **SETTINGS, temperature=1.0, seeds=list(range(8)))
    sequences = [Sequence(prompts[i // 3].ids, r.ids, prompts[i // 3].image_keys) for i, r in enumerate(sampled)]
    ours = policy.response_logprobs(collate(sequences, 0)).logprobs.detach()
    theirs = torch.cat([r.logprobs for r in sampled])
    assert theirs.dtype == torch.float32 and (ours - theirs).abs().mean() <= 0.02 * theirs.abs().mean()


def test_no_placeholder_in_a_hundred_thousand_samples(context, prompts, monkeypatch):
    """At a temperature that makes all tokens about as likely: without the ban one in ten would be a placeholder."""
    monkeypatch.setattr(generation, "end_ids", lambda policy: [-1])
    settings = {"group_size": 500, "max_new_tokens": 26, "temperature": 1000.0, "seeds": list(range(len(prompts)))}
    sampled = LocalEngine(context.policy).generate(prompts, **settings)
    counts = torch.bincount(torch.tensor([r.ids for r in sampled]).flatten(), minlength=len(context.policy.tokenizer))
    assert counts.sum() >= 100_000
    forbidden = context.policy.forbidden
    allowed = torch.ones(len(counts), dtype=torch.bool).index_fill_(0, forbidden, False)
    assert len(forbidden) == 4 and counts[forbidden].sum() == 0
    assert counts[allowed].min() > 0.7 * counts[allowed].float().mean(), "the others are all met"


def test_a_prompt_is_prefilled_once_and_let_go_when_its_last_response_has_begun(context, prompts, monkeypatch):
    seen, held = [], []
    prefill, refill = generation.prefill, generation._Run.refill
    monkeypatch.setattr(
        generation, "prefill", lambda policy, part: seen.extend(p.id for p in part) or prefill(policy, part)
    )

    def watched(run):
        refill(run)
        held.append(len(run.held))
        for prefilled in run.held.values():
            keys = prefilled.cache[0][0]
            assert keys.untyped_storage().nbytes() == keys.nbytes, "the prompts beside it are held too"
        assert run.decoder.cache.layers[0][0].shape[0] == 4

    monkeypatch.setattr(generation._Run, "refill", watched)
    sample(context, prompts, max_rows=4)
    assert seen == [prompt.id for prompt in prompts]
    assert max(held) == 1 and held[-1] == 0


def test_the_tokens_of_a_prefill_stay_within_the_budget(context, prompts, monkeypatch):
    sizes = []
    embed = context.policy.embed
    monkeypatch.setattr(context.policy, "embed", lambda ids, keys: sizes.append(ids.numel()) or embed(ids, keys))
    sample(context, prompts, prefill_tokens=45)
    longest = max(len(prompt.ids) for prompt in prompts)
    assert 1 < len(sizes) < len(prompts) and max(sizes) <= max(45, longest)


@pytest.mark.parametrize("mine", [[0, 1, 2], [], [3]], ids=["three prompts", "none", "one"])
def test_ranks_call_the_language_model_equally_often(mine, context, prompts):
    """Two ranks, in threads: each forward of a sharded model is a collective, so one missing call would hang them all."""
    shares = [[prompts[i] for i in mine], [prompts[i] for i in (4, 5, 6, 7)]]
    said, barrier, calls, got = [False, False], threading.Barrier(2, timeout=60), [0, 0], [None, None]
    rank = threading.local()

    def agree(own):
        said[rank.index] = own
        barrier.wait()
        either = any(said)
        barrier.wait()
        return either

    def run(index):
        rank.index = index
        settings = {**SETTINGS, "temperature": 1.0, "seeds": list(range(len(shares[index])))}
        got[index] = LocalEngine(context.policy, max_rows=4, agree=agree).generate(shares[index], **settings)

    hook = context.policy.internvl.language_model.register_forward_hook(
        lambda *_: calls.__setitem__(rank.index, calls[rank.index] + 1)
    )
    threads = [threading.Thread(target=run, args=(index,)) for index in (0, 1)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        hook.remove()
    assert calls[0] == calls[1] > 12
    for share, responses in zip(shares, got, strict=True):
        settings = {**SETTINGS, "temperature": 1.0, "seeds": list(range(len(share)))}
        same(responses, LocalEngine(context.policy).generate(share, **settings))


def test_sliding_layers_see_their_window_alone(context, prompts):
    internvl = context.policy.internvl
    old = internvl.language_model
    sizes = {k: getattr(old.config, k) for k in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    windows = {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
    torch.manual_seed(0)
    model = Qwen2Model(Qwen2Config(**sizes, **heads, **windows)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(5.0 if parameter.ndim == 2 else 1.0)
    assert window_of(model) == 6
    internvl.language_model = model
    try:
        sampled = sample(context, prompts, max_rows=5)
        sequences = [Sequence(prompts[i // 3].ids, r.ids, prompts[i // 3].image_keys) for i, r in enumerate(sampled)]
        ours = context.policy.response_logprobs(collate(sequences, 0)).logprobs.detach()
    finally:
        internvl.language_model = old
    assert (ours - torch.cat([r.logprobs for r in sampled])).abs().max() <= 1e-5


def test_what_it_cannot_run_is_refused(context, prompts, monkeypatch):
    with pytest.raises(ValueError, match="sampling at temperature 0.5 needs 8 seeds, got 1"):
        context.engine.generate(prompts, **SETTINGS, temperature=0.5, seeds=[1])
    monkeypatch.setattr(
        context.policy.internvl.language_model.config, "layer_types", ["linear_attention", "full_attention"]
    )
    with pytest.raises(ValueError, match=r"full_attention and sliding_attention layers, got \['linear_attention'\]"):
        LocalEngine(context.policy)


def test_a_response_ends_with_the_first_end_token(context, prompts):
    end = set(end_ids(context.policy))
    for response in sample(context, prompts):
        assert [token in end for token in response.ids] == [False] * (len(response.ids) - 1) + [response.finished]
        assert response.finished or len(response.ids) == 12
