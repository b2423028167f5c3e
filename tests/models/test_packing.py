"""Packed rows against padded ones: the same log-probs, losses and gradients, in fp64."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from r1v2_fast import config
from r1v2_fast.data.collate import Sequence, collate
from r1v2_fast.log import Log
from r1v2_fast.models import attention
from r1v2_fast.models.packing import pack, packed_tokens
from r1v2_fast.testing.accuracy import assert_as_accurate
from r1v2_fast.testing.double import to_double
from r1v2_fast.train import run
from r1v2_fast.train.batching import tokens
from r1v2_fast.train.context import Context

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_data"
OWN = [
    "data.make=null", f"data.folder={EXAMPLE}", "evaluation.sets={own: records.jsonl}",
    *(f"{stage}.data=records.jsonl" for stage in ("align", "reward", "mpo", "grpo")),
]  # fmt: skip
SMALL = [
    "data.sizes={align: 16, policy: 16, reward: 16, heldout: 4}", "align.batch_size=6", "mpo.min_reward_gap=0.0",
    "reward.sampling.prompts=4", "mpo.sampling.prompts=5", "grpo.sampling.prompts=5", "grpo.sampling.group_size=4",
    "grpo.informative_from=answer",
]  # fmt: skip
EXACT = 1e-10  # parity in fp64, by the numerics contract


def test_a_group_is_laid_out_as_it_is_written():
    sequences = [
        Sequence([5, 6, 7], [1, 2], ["a"]),
        Sequence([8], [9], []),
        Sequence([5, 6, 7], [], ["a"]),
        Sequence([5, 6, 7], [3, 4, 4], ["a"]),
        Sequence([5, 6, 7], [1], ["b"]),  # the same words about another picture
    ]
    batch = pack(sequences)
    assert batch.input_ids.tolist() == [[5, 6, 7, 1, 2, 3, 4, 4, 8, 9, 5, 6, 7, 1]]
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 0, 1, 2, 3]]
    assert batch.layout.groups == [(3, [2, 0, 3]), (1, [1]), (3, [1])]
    assert batch.image_keys == [["a"], [], ["b"]]
    assert batch.rows.tolist() == [2, 3, 8, 2, 5, 6, 12]  # each first token from its prompt's last position
    assert batch.targets.tolist() == [1, 2, 9, 3, 4, 4, 1]
    assert batch.offsets.tolist() == [0, 2, 3, 3, 6, 7]
    assert batch.last.tolist() == [4, 9, 2, 7, 13]
    assert packed_tokens(sequences) == batch.input_ids.numel()


def stage_of(name, folder, *more, double=True):
    reward = folder / "reward.py"
    reward.write_text("def letters(prompts, completions, **_):\n    return [float(len(c) % 3) for c in completions]\n")
    rewards = [f"{s}.rewards=[{{name: answer, function: '{reward}:letters'}}]" for s in ("reward", "mpo", "grpo")]
    recipe = config.load("digits", [*SMALL, *rewards, f"run.folder={folder}", *more])
    context = Context(recipe, folder, Log(folder))
    loaded = context.initial()
    if double:
        to_double(loaded.model)
    context.use(loaded)
    stage = run.STAGES[name](context, getattr(recipe, name))
    if name == "reward":  # a head of zeros passes nothing on
        torch.nn.init.normal_(stage.model.head.weight, std=0.1)
    with torch.no_grad():  # away from the reference
        for parameter in stage.model.parameters.values():
            parameter.mul_(1.05)
    return stage


def loss_and_gradient(stage, samples, *, packing, metrics=None):
    stage.context.reader.packing = packing
    for parameter in stage.model.parameters.values():
        parameter.grad = None
    loss = stage.loss(samples, stage.counts(samples), {} if metrics is None else metrics)
    loss.backward()
    stage.forget_update()
    return loss.detach(), torch.cat([p.grad.flatten() for p in stage.model.parameters.values()])


def far(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("align", []),  # groups of one
        ("align", OWN),  # one, two and no images a prompt
        ("reward", []),
        ("mpo", []),  # pairs, several to a prompt
        ("mpo", OWN),
        ("grpo", []),
        ("grpo", OWN),
        ("grpo", ["grpo.loss.kl_coef=0.1"]),
        ("grpo", ["grpo.loss.entropy_coef=0.1", "grpo.loss.kind=gspo"]),
        ("grpo", ["grpo.gradient_checkpointing=true"]),
        ("grpo", ["grpo.train=[]", "grpo.lora={llm: {rank: 2}}"]),
        ("grpo", ["grpo.train=[adapter, llm, vision]"]),
    ],
)
def test_losses_and_gradients_equal_the_padded_ones(name, more, tmp_path):
    stage = stage_of(name, tmp_path, *more)
    samples = stage.collect(0, {})
    sequences = [s for sample in samples for s in sample.sequences]
    assert len({len(s.response_ids) for s in sequences}) > 1 and len({tuple(s.prompt_ids) for s in sequences}) > 1
    metrics = {}, {}
    ours, gradient = loss_and_gradient(stage, samples, packing=True, metrics=metrics[0])
    padded, wanted = loss_and_gradient(stage, samples, packing=False, metrics=metrics[1])
    assert abs(ours - padded) <= EXACT * max(1, abs(padded)) and wanted.abs().max() > 0
    assert far(gradient, wanted) <= EXACT
    if name == "mpo" and more == OWN:  # the adapter does not reach text: both sides' rewards are 0 up to rounding
        del metrics[1]["rewards/accuracies"]
    for key, value in metrics[1].items():
        assert abs(float(metrics[0][key]) - float(value)) <= 1e-6 * max(1, abs(float(value))), key  # fp32 means
    if name != "align":
        assert tokens(samples, packed=True) < tokens(samples, packed=False)


def test_a_response_alone_has_the_log_probs_that_it_has_in_its_group(tmp_path):
    stage = stage_of("grpo", tmp_path)
    samples = stage.collect(0, {})
    together = stage.response_logprobs(samples, temperature=1.0)
    alone = [stage.response_logprobs([sample], temperature=1.0)[0] for sample in samples]
    for (a,), (b,) in zip(together, alone, strict=True):
        assert (a - b).abs().max() <= EXACT * b.abs().max()


def test_a_response_does_not_see_its_siblings(tmp_path):
    stage = stage_of("grpo", tmp_path)
    sequences = [s for sample in stage.collect(0, {}) for s in sample.sequences]
    first = sequences[0]
    siblings = [s for s in sequences if s.prompt_ids == first.prompt_ids]
    assert len(siblings) > 1
    changed = [first, *(Sequence(s.prompt_ids, [7] * len(s.response_ids), s.image_keys) for s in siblings[1:])]
    n = len(first.response_ids)
    with torch.no_grad():
        before, after = (stage.model.response_logprobs(pack(s)).logprobs for s in (siblings, changed))
    assert torch.equal(before[:n], after[:n]) and not torch.equal(before[n:], after[n:])


def test_mixed_precision_is_as_accurate_packed_as_padded(tmp_path):
    """bf16 matmuls, fp32 adapter; the truth is the padded fp64 gradient of the same weights."""
    stage = stage_of("grpo", tmp_path, "model.dtype=bfloat16", double=False)
    samples = stage.collect(0, {})
    gradients = [loss_and_gradient(stage, samples, packing=packing)[1] for packing in (True, False)]
    exact = stage_of("grpo", tmp_path)
    exact.model.root.load_state_dict({n: t.double() for n, t in stage.model.root.state_dict().items()})
    _, truth = loss_and_gradient(exact, samples, packing=False)
    assert_as_accurate(*gradients, truth)


def test_gradient_checkpointing_recomputes_packed_layers(tmp_path):
    stage = stage_of("grpo", tmp_path)
    samples = stage.collect(0, {})
    plain = loss_and_gradient(stage, samples, packing=True)
    calls = []
    layer = stage.model.internvl.language_model.layers[0].self_attn
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    stage.model.checkpointing = True
    recomputed = loss_and_gradient(stage, samples, packing=True)
    handle.remove()
    assert len(calls) == 2 and all(map(torch.equal, plain, recomputed))


def test_other_language_models_are_padded_and_say_so(tmp_path, capsys):
    stage = stage_of("grpo", tmp_path)
    model = stage.model.internvl.language_model
    assert attention.supported(model)
    model.config.model_type = "llama"
    assert not attention.supported(model)
    assert stage.context._packing(stage.context.policy.loaded) is False
    assert "model.packing is off: a llama language model" in capsys.readouterr().out


def test_masks_that_are_no_layout_go_to_transformers_own_attention(tmp_path):
    """Rollout, `generate` and padded batches run as in a model that was never touched."""
    stage = stage_of("grpo", tmp_path)
    samples = stage.collect(0, {})
    batch = collate([s for sample in samples for s in sample.sequences], 0)
    model = stage.model.internvl.language_model
    with torch.no_grad():
        ours = stage.model.hidden(batch)
        model.config._attn_implementation = "sdpa"
        assert torch.equal(ours, stage.model.hidden(batch))


def test_a_saved_policy_names_no_attention_of_ours(tmp_path):
    stage = stage_of("grpo", tmp_path, double=False)
    stage.model.settle()
    stage.model.save(tmp_path / "saved")
    assert attention.NAME not in (tmp_path / "saved" / "config.json").read_text()


def test_two_pictures_are_told_apart(tmp_path):
    """The same words about two pictures are two prompts: their image features go where they belong."""
    stage = stage_of("grpo", tmp_path)
    prompt = stage.collect(0, {})[0].sequences[0].prompt_ids
    pictures = {"black": Image.new("RGB", (16, 16)), "white": Image.new("RGB", (16, 16), "white")}
    stage.context.corpus.image = pictures.__getitem__
    stage.context.reader.pixels.load = pictures.__getitem__
    sequences = [Sequence(prompt, [20, 3], [key]) for key in ("black", "white", "black")]
    with torch.no_grad():
        batch = pack(sequences)
        logprobs = stage.model.response_logprobs(batch).logprobs.split(2)
        alone = [stage.model.response_logprobs(pack([s])).logprobs for s in sequences]
    assert len(batch.layout.groups) == 2
    for a, b in zip(logprobs, alone, strict=True):
        assert (a - b).abs().max() <= EXACT * b.abs().max()
    assert (logprobs[0] - logprobs[1]).abs().max() > 1e-6
