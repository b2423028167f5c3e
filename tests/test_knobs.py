"""What trainers expect of a loop: exact accumulation, mini-batches, sampling knobs, LoRA, mixed precision, schedules."""

import inspect
from pathlib import Path
from typing import get_args

import pytest
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from r1v2_fast import config, ops
from r1v2_fast.data.collate import Sequence
from r1v2_fast.log import Log, read
from r1v2_fast.models import freeze, load, lora
from r1v2_fast.ops.policy_loss import KINDS
from r1v2_fast.parallel.metrics import Mean
from r1v2_fast.rollout.generation import LocalEngine
from r1v2_fast.testing.double import to_double
from r1v2_fast.train import batching, run
from r1v2_fast.train.batching import tokens
from r1v2_fast.train.context import Context
from r1v2_fast.train.loop import _rehearse
from r1v2_fast.train.optimizer import Optimizer, learning_rate

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "own_data"
SMALL = [
    "data.sizes={align: 64, policy: 64, reward: 32, heldout: 12}", "align.batch_size=12", "mpo.min_reward_gap=0.0",
    "reward.sampling.prompts=4", "mpo.sampling.prompts=6", "grpo.sampling.prompts=6", "grpo.sampling.group_size=4",
    "align.steps=2", "reward.steps=1", "mpo.steps=2", "grpo.steps=3", "evaluation.every=2", "evaluation.records=6",
    "grpo.informative_from=answer",
]  # fmt: skip


@pytest.fixture
def reward(tmp_path):
    """A reward that differs within the groups of a model that has learnt nothing."""
    path = tmp_path / "reward.py"
    path.write_text("def letters(prompts, completions, **_):\n    return [float(len(c) % 3) for c in completions]\n")
    return [f"{stage}.rewards=[{{name: answer, function: '{path}:letters'}}]" for stage in ("reward", "mpo", "grpo")]


def recipe_of(folder, reward, *more):
    return config.load("digits", [*SMALL, *reward, f"run.folder={folder}", *more])


def stage_of(name, folder, reward, *more, double=False):
    recipe = recipe_of(folder, reward, *more)
    context = Context(recipe, folder, Log(folder))
    loaded = context.initial()
    if double:
        to_double(loaded.model)
    context.use(loaded)
    return run.STAGES[name](context, getattr(recipe, name))


def micro_batches(samples, budget):
    return batching.micro_batches(samples, budget, packed=True)


def packed(samples):
    return tokens(samples, packed=True)


def gradient(stage, samples, budget):
    """Of the whole of `samples`, gathered in micro-batches."""
    parts = micro_batches(samples, budget)
    for parameter in stage.model.parameters.values():
        parameter.grad = None
    for part in parts:
        stage.loss(part, stage.counts(samples), {}).backward()
    return torch.cat([p.grad.flatten() for p in stage.model.parameters.values()]), len(parts)


def far(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("align", ["align.train=[adapter, llm]"]),
        ("reward", []),
        ("mpo", []),
        ("mpo", ["mpo.generation=token"]),
        ("grpo", []),
        *(("grpo", [f"grpo.loss.kind={kind}"]) for kind in KINDS if kind not in ("grpo", "cispo")),
        ("grpo", ["grpo.loss.kind=cispo", "grpo.loss.clip_high=5"]),
        ("grpo", ["grpo.loss.aggregate=seq_mean_token_sum", "grpo.loss.ratio_level=sequence"]),
        ("grpo", ["grpo.loss.entropy_coef=0.1", "grpo.loss.rollout_mode=sequence_truncate"]),
        ("grpo", ["grpo.loss.off_policy_threshold=0.0", "grpo.loss.rollout_mode=token_mask"]),
        ("grpo", ["grpo.advantages.baseline=leave_one_out", "grpo.advantages.scale=batch"]),
        ("grpo", ["grpo.loss.kl_coef=0.1"]),
        ("grpo", ["grpo.average_over=all"]),
    ],
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name, more, tmp_path, reward):
    stage = stage_of(name, tmp_path, reward, *more, double=True)
    samples = stage.collect(0, {})
    if name == "reward":  # a head of zeros passes nothing on
        torch.nn.init.normal_(stage.model.head.weight, std=0.1)
    whole, count = gradient(stage, samples, None)
    budget = 3 * packed(samples[:1])
    split, parts = gradient(stage, samples, budget)
    assert count == 1 and parts > 2 and whole.abs().max() > 0
    assert far(split, whole) <= 1e-10  # parity in fp64, by the numerics contract
    alone, _ = gradient(stage, samples[:1], None)
    assert far(alone, whole) > 1e-3, "one sample's gradient would pass too"


def test_the_keys_of_a_recipe_are_the_arguments_of_the_ops_with_their_defaults():
    made_by_the_stage = {"informative_from", "informative_tol", "zero_uninformative", "component_weights", "backend"}
    made_by_the_stage |= {name for name in _keywords(ops.policy_loss) if name.endswith(("logprobs", "normalizer"))}
    made_by_the_stage |= {"mask", "offsets", "importance_weights", "token_weights", "entropy"}
    assert set(get_args(config.PolicyLoss.model_fields["kind"].annotation)) == set(KINDS)
    another_default = {"rollout_mode"}  # null: behaviour_cap's weight
    for section, op in ((config.PolicyLoss, ops.policy_loss), (config.Advantages, ops.group_advantages)):
        keywords = {name: value for name, value in _keywords(op).items() if name not in made_by_the_stage}
        defaults = section().model_dump()
        assert defaults.keys() == keywords.keys()
        for name in keywords.keys() - another_default - {"gmpo_clamp"}:
            assert defaults[name] == keywords[name], name


def _keywords(op):
    return {p.name: p.default for p in inspect.signature(op).parameters.values() if p.kind == p.KEYWORD_ONLY}


@pytest.mark.parametrize("name", ["align", "grpo"])
def test_a_batch_of_text_and_image_records_has_the_gradient_of_each_alone(name, tmp_path, reward):
    own = ["data.make=null", f"data.folder={EXAMPLE}", f"{name}.data=records.jsonl", f"{name}.train=[adapter, llm]"]
    more = [*own, "align.batch_size=8", "grpo.sampling.prompts=8", "evaluation.sets={own: records.jsonl}"]
    stage = stage_of(name, tmp_path, reward, *more, double=True)
    samples = stage.collect(0, {})
    assert {len(s.image_keys) for sample in samples for s in sample.sequences} == {0, 1, 2}
    mixed, _ = gradient(stage, samples, None)
    apart, parts = gradient(stage, samples, 1)
    assert parts == len(samples) and far(apart, mixed) <= 1e-10


def test_a_part_that_sees_nothing_of_a_micro_batch_adds_nothing(tmp_path, reward):
    """Vision alone trains, and the micro-batch is text."""
    own = ["data.make=null", f"data.folder={EXAMPLE}", "grpo.data=records.jsonl", "grpo.train=[vision]"]
    more = [*own, "grpo.sampling.prompts=8", "evaluation.sets={own: records.jsonl}", "grpo.micro_batch_tokens=1"]
    folder = run.train(recipe_of(tmp_path / "a", reward, *more, "run.stages=[grpo]"))
    assert any(line.get("grad_norm", 0) > 0 for line in read(folder / "metrics.jsonl"))


def test_the_metrics_of_mpo_do_not_depend_on_micro_batches(tmp_path, reward):
    stage = stage_of("mpo", tmp_path, reward)
    with torch.no_grad():
        for parameter in stage.model.parameters.values():
            parameter.mul_(1.3)  # away from the reference
    samples = stage.collect(0, {})
    found = []
    for budget in (None, 2 * packed(samples[:1])):
        mean = Mean(sums=("num_tokens", *stage.shares))
        for part in micro_batches(samples, budget):
            own = {}
            stage.loss(part, stage.counts(samples), own)
            mean.add(own, weight=stage.weight(part))
        found.append({name: float(value) for name, value in mean.values().items()})
    assert found[1] == pytest.approx(found[0], rel=1e-4, abs=1e-6) and found[0]["mpo/preference"] > 0.1


@pytest.mark.parametrize(
    "more",
    [
        ["grpo.loss.kind=gspo", "grpo.loss.off_policy_threshold=0.0"],
        ["grpo.loss.kind=vespo", "grpo.loss.rollout_mode=token_truncate"],
        ["grpo.loss.rollout_mode=sequence_truncate", "grpo.loss.kl_coef=0.1", "grpo.loss.clip_high=0.001"],
    ],
)
def test_the_metrics_of_grpo_do_not_depend_on_micro_batches(more, tmp_path, reward):
    stage = stage_of("grpo", tmp_path, reward, *more, double=True)
    samples = stage.collect(0, {})
    for index, sample in enumerate(samples):
        sample.old_logprobs = sample.behaviour_logprobs + 0.1 * (-1) ** index
    found = []
    for budget in (None, 2 * packed(samples[:1])):
        mean = Mean()
        for part in micro_batches(samples, budget):
            own = {}
            stage.loss(part, stage.counts(samples), own)
            mean.add(own, weight=stage.weight(part), weights=stage.weights(part))
        found.append({name: float(value) for name, value in mean.values().items()})
    assert found[1] == pytest.approx(found[0], rel=1e-6, abs=1e-9) and "ratio/mean" in found[0]


def test_a_rehearsal_is_the_largest_that_a_step_can_be(tmp_path, reward):
    for more, factor in (
        ([], 1),
        (["grpo.mini_batches=3"], 1 / 3),
        (["grpo.mini_batches=4", "grpo.buffer=null"], 2 / 6),  # two of six groups
        (["grpo.loss.kl_coef=0.1"], 2),
        (["grpo.average_over=all"], 2),
    ):
        stage = stage_of("grpo", tmp_path, reward, *more)
        assert len(stage.largest()) == 6 * 4 * factor
        for step in range(3):
            samples = stage.collect(step, {})
            met = max(packed(batch) for batch in stage.mini_batches(samples, step))
            assert met <= packed(stage.largest())


def test_mini_batches_share_out_the_samples_and_their_gradients_average_to_the_whole(tmp_path, reward):
    stage = stage_of("grpo", tmp_path, reward, "grpo.mini_batches=2", "grpo.updates_per_rollout=2", double=True)
    samples = stage.collect(0, {})
    dealt = list(stage.mini_batches(samples, 0))
    assert len(dealt) == 4 and all(s.old_logprobs is not None for s in samples)
    for first in (0, 2):
        assert sorted(id(s) for m in dealt[first : first + 2] for s in m) == sorted(map(id, samples))
    assert [id(s) for s in dealt[0]] != [id(s) for s in dealt[2]], "every pass deals anew"
    whole, _ = gradient(stage, samples, None)
    shares = [gradient(stage, m, None)[0] * len(m) / len(samples) for m in dealt[:2]]
    assert far(sum(shares), whole) <= 1e-10


def test_a_second_update_sees_the_old_log_probs(tmp_path, reward):
    more = ["run.stages=[grpo]", "grpo.updates_per_rollout=3", "grpo.mini_batches=2", "grpo.optimizer.lr=0.01"]
    folder = run.train(recipe_of(tmp_path / "a", reward, *more))
    lines = [line for line in read(folder / "metrics.jsonl") if "loss" in line]
    assert all(line["updates"] == 6 for line in lines)
    assert any(abs(line["ratio/mean"] - 1) > 1e-4 for line in lines), "later updates are off the sampling policy"
    once = run.train(recipe_of(tmp_path / "b", reward, "run.stages=[grpo]", "grpo.optimizer.lr=0.01"))
    ratios = [line["ratio/mean"] for line in read(once / "metrics.jsonl") if "loss" in line]
    assert all(ratio == 1 for ratio in ratios)


class Fake:
    def __init__(self, prompt, response, key=0):
        self.sequences = [Sequence([key] * prompt, [0] * response, [])]


@pytest.mark.parametrize("packed", [True, False])
def test_the_longest_micro_batch_comes_first_and_none_is_over_the_budget(packed):
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 40, (50, 2), generator=generator).tolist()
    samples = [Fake(*pair) for pair in lengths]
    parts = batching.micro_batches(samples, 200, packed=packed)
    assert sorted(map(id, samples)) == sorted(id(s) for part in parts for s in part)
    sizes = [tokens(part, packed=packed) for part in parts]
    assert max(sizes) <= 200 and sizes[0] >= max(tokens([s], packed=packed) for s in samples)
    alone = batching.micro_batches([Fake(300, 5), Fake(1, 1)], 200, packed=packed)
    assert [len(part) for part in alone] == [1, 1]
    assert batching.micro_batches(samples, None, packed=packed) == [samples]


def test_a_rehearsal_fills_the_forward_as_ragged_samples_may(tmp_path, reward):
    budget = 600
    stage = stage_of("grpo", tmp_path, reward, f"grpo.micro_batch_tokens={budget}", "grpo.sampling.max_new_tokens=40")
    one = packed([stage.largest()[0]])
    rehearsed = batching.fullest(stage.largest(), budget, packed=True)
    assert budget - one < packed(rehearsed) <= budget
    for step in range(2):
        met = max(packed(part) for part in stage.micro_batches(stage.collect(step, {})))
        assert met <= packed(rehearsed) + one


def test_samples_that_share_a_prompt_are_packed_together_and_split_only_over_the_budget():
    groups = [[Fake(100, 5, key=k) for _ in range(8)] for k in range(3)]
    mixed = [group[i] for i in range(8) for group in groups]
    parts = micro_batches(mixed, 150)
    assert [packed(part) for part in parts] == [140, 140, 140]
    assert [len({s.sequences[0].prompt_ids[0] for s in part}) for part in parts] == [1, 1, 1]
    assert [packed(part) for part in micro_batches(mixed, 120)] == [120] * 6  # four responses and their prompt, twice
    assert [packed(part) for part in micro_batches(mixed, 280)] == [280, 140]


@pytest.mark.parametrize("name", ["align", "reward", "mpo", "grpo"])
def test_a_rehearsal_of_the_longest_leaves_no_trace(name, tmp_path, reward, monkeypatch):
    stage = stage_of(name, tmp_path, reward)
    optimizer = Optimizer(stage.model.parameters, stage.settings.optimizer, dtype=torch.float32)
    before = freeze.snapshot(stage.model.parameters.values())
    _rehearse(stage, optimizer)
    assert all(map(torch.equal, before, stage.model.parameters.values()))
    assert all(p.grad is None for p in stage.model.parameters.values())
    assert stage.state()[1] == type(stage)(stage.context, stage.settings).state()[1]
    samples = stage.collect(0, {})
    assert packed(stage.largest()) >= packed(samples)

    def full(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(type(stage), "loss", full)
    with pytest.raises(RuntimeError, match=rf"stage {name}: out of memory .* {name}.micro_batch_tokens"):
        _rehearse(stage, optimizer)


def test_dynamic_sampling_fills_the_batch_with_informative_groups(tmp_path, reward):
    rare = tmp_path / "rare.py"
    rare.write_text("def zeros(prompts, completions, **_):\n    return [float(c[:1] == '0') for c in completions]\n")
    more = [f"grpo.rewards=[{{name: answer, function: '{rare}:zeros'}}]", "grpo.buffer=null"]
    plain = stage_of("grpo", tmp_path, [], *more)
    metrics = {}
    plain.collect(0, metrics)
    assert 0 < metrics["frac_informative"] < 1
    stage = stage_of("grpo", tmp_path, [], *more, "grpo.dynamic_sampling.max_rounds=8")
    samples = stage.collect(0, metrics)
    assert 1 < metrics["dynamic_sampling/rounds"] == stage.rounds <= 8
    assert len(samples) == 6 * 4 and all(sample.advantage != 0 for sample in samples)
    assert stage.state()[1]["rounds"] == stage.rounds
    short = stage_of("grpo", tmp_path, [], *more, "grpo.dynamic_sampling.max_rounds=2", "grpo.sampling.prompts=30")
    assert len(short.collect(0, metrics)) % 4 == 0 and short.rounds == 2


def test_dynamic_sampling_without_an_informative_group_falls_back_on_the_buffer(tmp_path, reward):
    stage = stage_of("grpo", tmp_path, reward, "grpo.dynamic_sampling.max_rounds=2")
    stage.collect(0, {})
    held = len(stage.buffer)
    assert held > 0
    stage.judge.functions["answer"] = lambda prompts, completions, **_: [1.0] * len(completions)
    metrics = {}
    samples = stage.collect(1, metrics)
    assert metrics["dynamic_sampling/rounds"] == 2 and metrics["frac_informative"] == 0
    assert samples and all(sample.replayed for sample in samples)


@pytest.mark.parametrize("ratio", ["stored", "decoupled"])
def test_replayed_samples_keep_their_ratio_to_what_sampled_them(ratio, tmp_path, reward):
    more = [f"grpo.buffer.ratio={ratio}", "grpo.loss.behaviour_cap=1.01", "grpo.updates_per_rollout=2"]
    stage = stage_of("grpo", tmp_path, reward, *more, double=True)
    stage.collect(0, {})
    with torch.no_grad():
        for parameter in stage.model.parameters.values():
            parameter.mul_(1.2)
    stage.judge.functions["answer"] = lambda prompts, completions, **_: [1.0] * len(completions)
    samples = stage.collect(1, {})
    assert samples and all(sample.replayed for sample in samples)
    metrics = {}
    stage.loss(samples, stage.counts(samples), metrics)
    if ratio == "stored":  # PPO's ratio to the behaviour; no weight
        assert metrics["ratio/mean"] != 1
        assert metrics["sampling/importance_sampling_ratio/max"] == 1
    else:  # the policy before this step is the old one, and the weight is capped
        assert metrics["ratio/mean"] == pytest.approx(1, abs=1e-6)
        assert metrics["sampling/importance_sampling_ratio/max"] == pytest.approx(1.01)


def test_overlong_responses_are_penalised_and_truncated_ones_masked(tmp_path, reward):
    stage = stage_of("grpo", tmp_path, reward, "grpo.overlong_cache=4", "grpo.mask_truncated=true", "grpo.buffer=null")
    metrics = {}
    samples = stage.collect(0, metrics)
    assert stage.judge.names == ["answer", "overlong"] and -1 <= metrics["rewards/overlong/mean"] < 0
    end = stage.context.policy.tokenizer.eos_token_id
    assert stage.judge.weights.tolist() == [1.0, 1.0]
    assert metrics["completions/clipped_ratio"] > 0
    assert samples and all(sample.sequence.response_ids[-1] == end for sample in samples)


def test_schedules_are_pure_functions_of_the_step():
    def rates(**settings):
        return [learning_rate(config.Optimizer(lr=1.0, **settings), step, 8) for step in range(8)]

    assert rates(warmup_steps=4, decay="linear") == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]
    assert rates(warmup_steps=2) == [0.5, *[1.0] * 7]
    cosine = rates(decay="cosine", min_lr_ratio=0.1)
    assert cosine[0] == 1.0 and cosine[4] == pytest.approx(0.55) and 0.1 < cosine[7] < 0.2
    assert cosine == sorted(cosine, reverse=True)


@pytest.mark.parametrize(("largest", "expected"), [(None, 10.0), (1.0, 1.0), (100.0, 10.0)])
def test_gradients_are_clipped_at_the_norm_or_not_at_all(largest, expected):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = Optimizer({"x": parameter}, config.Optimizer(lr=1.0, max_grad_norm=largest), dtype=torch.float32)
    seen = []
    parameter.register_post_accumulate_grad_hook(lambda p: None)
    optimizer.adamw.step = lambda *_, **__: seen.append(parameter.grad.item())
    optimizer.backward((10 * parameter).sum())
    assert optimizer.step(0.1) == 10.0 and seen == [pytest.approx(expected, rel=1e-5)]


def test_metrics_of_micro_batches_are_weighted_by_their_tokens():
    mean = Mean()
    mean.add({"a": torch.tensor(1.0), "num_tokens": 1, "x/min": torch.tensor(3.0), "x/max": 3.0}, weight=1)
    mean.add({"a": torch.tensor(5.0), "num_tokens": 3, "x/min": torch.tensor(2.0), "x/max": 2.0}, weight=3)
    assert mean.values() == {"a": 4.0, "num_tokens": 4, "x/min": 2.0, "x/max": 3.0}


def test_gradient_checkpointing_recomputes_layers_and_changes_no_bit(tmp_path, reward, monkeypatch):
    calls = []
    layers = {}

    def measured(more):
        stage = stage_of("grpo", tmp_path, reward, *more)
        samples = stage.collect(0, {})  # samples with a cache, which a checkpointed layer would throw away
        own = [m for m in stage.model.internvl.language_model.modules() if isinstance(m, GradientCheckpointingLayer)]
        layers["count"] = len(own)
        hooks = [layer.mlp.register_forward_pre_hook(lambda *_: calls.append(1)) for layer in own]
        calls.clear()
        grads, _ = gradient(stage, samples, None)
        for hook in hooks:
            hook.remove()
        return grads, len(calls)

    plain, once = measured([])
    saved, twice = measured(["grpo.gradient_checkpointing=true"])
    assert torch.equal(plain, saved) and once == layers["count"] and twice == 2 * once


def test_mixed_precision_keeps_what_trains_in_fp32_and_saves_the_models_dtype(tmp_path, reward):
    more = ["model.dtype=bfloat16", "run.stages=[mpo, grpo]"]
    stage = stage_of("grpo", tmp_path / "x", reward, *more)
    dtypes = {freeze.part_of(n): p.dtype for n, p in stage.model.root.named_parameters()}
    assert dtypes == {"adapter": torch.float32, "llm": torch.bfloat16, "vision": torch.bfloat16}
    folder = run.train(recipe_of(tmp_path / "a", reward, *more))
    lines = [line for line in read(folder / "metrics.jsonl") if "loss" in line]
    assert lines and all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    first = load.from_folder(folder / "stages" / "mpo").model
    last = load.from_folder(folder / "final").model
    assert {p.dtype for p in last.parameters()} == {torch.bfloat16}
    moved = {
        freeze.part_of(n)
        for (n, p), q in zip(last.named_parameters(), first.parameters(), strict=True)
        if not p.equal(q)
    }
    assert moved == {"adapter"}


def test_fp16_that_overflows_for_ever_stops_and_its_scale_is_checkpointed():
    parameter = torch.nn.Parameter(torch.ones(1))

    def made():
        return Optimizer({"x": parameter}, config.Optimizer(lr=0.1), dtype=torch.float16)

    optimizer = made()
    overflows = 0
    while True:
        optimizer.backward((parameter * torch.inf).sum())
        overflows += 1
        if optimizer.lost(optimizer.step(0.1)):
            break
    assert 10 < overflows < 30 and parameter.item() == 1
    other = made()
    other.load_state(*optimizer.state())
    assert other.scaler.get_scale() == optimizer.scaler.get_scale() < made().scaler.get_scale()


def test_fp16_scales_its_loss_and_survives_an_overflow():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = Optimizer({"x": parameter}, config.Optimizer(lr=0.1), dtype=torch.float16)
    scale = optimizer.scaler.get_scale()
    optimizer.backward((parameter * torch.inf).sum())
    optimizer.step(0.1)
    assert parameter.item() == 1 and optimizer.scaler.get_scale() == scale / 2
    optimizer.backward(parameter.sum())
    assert optimizer.step(0.1) == 1.0 and parameter.item() == pytest.approx(0.9)


LORA = "lora={llm: {rank: 4}, vision: {rank: 2, targets: [q_proj, v_proj]}}"


def test_lora_trains_its_own_parameters_and_the_reference_is_the_adapter_disabled(tmp_path, reward):
    stage = stage_of("mpo", tmp_path, reward, f"mpo.{LORA}")
    names = set(stage.model.parameters)
    assert {freeze.part_of(n) for n in names} == {"adapter", "llm", "vision"}
    assert {freeze.part_of(n) for n in names if lora.MARK not in n} == {"adapter"}
    assert {n.split(".lora_")[0].rsplit(".", 1)[-1] for n in names if "vision_tower" in n} == {"q_proj", "v_proj"}
    batch = stage.context.reader.batch(stage.largest()[0].sequences, "cpu")

    def logprobs():
        with torch.no_grad():
            return stage.model.response_logprobs(batch).logprobs

    before = logprobs()
    with torch.no_grad():
        for parameter in stage.model.parameters.values():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    stage.model.features.clear()
    trained = logprobs()
    assert not torch.equal(before, trained)
    with stage.model.reference():
        assert torch.equal(logprobs(), before)
    assert torch.equal(logprobs(), trained)
    assert {n for n, p in stage.model.root.named_parameters() if p.requires_grad} == names


def test_merged_lora_answers_as_it_did_and_loads_without_peft(tmp_path, reward):
    more = ["run.stages=[align, mpo]", "align.train=[adapter]"]
    ranks = "{llm: {rank: 8}, vision: {rank: 8}}"
    stage = stage_of("align", tmp_path / "x", reward, *more, f"align.lora={ranks}")
    optimizer = Optimizer(stage.model.parameters, stage.settings.optimizer, dtype=torch.float32)
    for step in range(60):
        samples = stage.collect(step, {})
        optimizer.backward(stage.loss(samples, stage.counts(samples), {}))
        optimizer.step(0.005)
    from r1v2_fast.train.evaluate import evaluate

    def answers(policy, context=stage.context):
        dataset = context.corpus.dataset("heldout_clean.jsonl")
        return evaluate(LocalEngine(policy), context.reader, dataset, context.recipe.evaluation).completions

    adapted = answers(stage.model)
    assert len(set(adapted)) > 1
    stage.model.save(tmp_path / "merged")
    assert answers(stage.model) == adapted, "saving merges a copy"
    context = Context(recipe_of(tmp_path / "x", reward, *more), tmp_path / "x", Log(tmp_path / "x"))
    context.use(load.from_folder(tmp_path / "merged"))
    assert answers(context.policy, context) == adapted
    stage.model.settle()
    assert answers(stage.model) == adapted
    state, own = context.policy.root.state_dict(), stage.model.root.state_dict()
    assert state.keys() == own.keys() and all(torch.equal(state[name], own[name]) for name in own)


def test_the_update_of_lora_is_alpha_over_rank_times_b_a(tmp_path, reward):
    stage = stage_of("mpo", tmp_path, reward, "mpo.lora={llm: {rank: 4, alpha: 6, targets: [q_proj]}}")
    name = next(n for n in stage.model.parameters if "lora_A" in n)
    a, b = stage.model.parameters[name], stage.model.parameters[name.replace("lora_A", "lora_B")]
    with torch.no_grad():
        b.fill_(0.5)
    base = name.split(".lora_A")[0]
    before = stage.model.root.state_dict()[f"{base}.base_layer.weight"]
    merged = lora.merged_state(stage.model.root)[f"{base}.weight"]
    torch.testing.assert_close(merged - before, 6 / 4 * b @ a)


def test_lora_names_what_it_lacks(tmp_path, reward, monkeypatch):
    with pytest.raises(ValueError, match=r"lora.llm.targets must be among .*'q_proj'.* got \['qproj'\]"):
        stage_of("mpo", tmp_path, reward, "mpo.lora={llm: {targets: [qproj]}}")
    with pytest.raises(ValueError, match="must not name the same part"):
        recipe_of(tmp_path, reward, "mpo.lora={adapter: {rank: 2}}")
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'r1v2-fast\[lora\]'"):
        stage_of("mpo", tmp_path, reward, f"mpo.{LORA}")


def test_a_run_logs_to_tensorboard_over_all_stages_and_a_resume(tmp_path, reward):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    more = ["run.loggers=[tensorboard]", "run.stages=[mpo, grpo]"]
    folder = run.train(recipe_of(tmp_path / "a", reward, *more))
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("reward")] == [1, 2, 3, 4, 5]
    lines = [line for line in read(folder / "metrics.jsonl") if "reward" in line]
    assert [event.value for event in events.Scalars("reward")] == pytest.approx([line["reward"] for line in lines])
    assert [event.step for event in events.Scalars("eval/clean/accuracy")] == [0, 2, 4, 5]
