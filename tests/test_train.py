"""The run end to end on a tiny dataset: stages, resume, rollout, and what the model promises."""

import json
import math

import pytest
import torch
import yaml
from transformers import AutoModelForImageTextToText, InternVLForConditionalGeneration

from r1v2_fast import config
from r1v2_fast.judge.summary import pairs_by_gap
from r1v2_fast.log import Log, read
from r1v2_fast.models import freeze, presets
from r1v2_fast.report import write
from r1v2_fast.train import run
from r1v2_fast.train.checkpoint import Checkpoints
from r1v2_fast.train.context import Context
from r1v2_fast.train.optimizer import learning_rate

TINY = [
    "align.steps=4", "reward.steps=2", "mpo.steps=3", "grpo.steps=4", "align.batch_size=8",
    "data.sizes={align: 64, policy: 64, reward: 32, heldout: 24}", "checkpoint.every=1", "evaluation.every=2",
    "reward.sampling.prompts=4", "mpo.sampling.prompts=8", "grpo.sampling.prompts=8", "mpo.min_reward_gap=0.0",
    # an untrained model never answers right, so a reward that differs from the start
    "grpo.rewards=[{name: answer, function: '%(reward)s'}, {name: model, function: reward_model, squash: sigmoid}]",
    "mpo.rewards=[{name: answer, function: '%(reward)s'}]", "reward.rewards=[{name: answer, function: '%(reward)s'}]",
]  # fmt: skip


@pytest.fixture
def overrides(tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def digits(prompts, completions, **_):\n    return [float(any(map(str.isdigit, c[:9]))) for c in completions]\n"
    )
    return [text % {"reward": f"{reward}:digits"} if "%(" in text else text for text in TINY]


def tiny(folder, overrides, *more):
    return config.load("digits", [*overrides, f"run.folder={folder}", *more])


def metrics(folder):
    drop = ("time", "step_time")
    return [{k: v for k, v in line.items() if k not in drop} for line in read(folder / "metrics.jsonl")]


def weights(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder / "final")
    return model.state_dict()


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, overrides, monkeypatch):
    whole = run.train(tiny(tmp_path / "a", overrides))
    saves = []
    save = Checkpoints.save

    def killed(self, stage, optimizer, step):
        save(self, stage, optimizer, step)
        saves.append(step)
        if len(saves) in (2, 3, 5, 6):  # once in align, in mpo and twice in grpo
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoints, "save", killed)
    kills = 0
    for attempt in range(20):
        try:
            stopped = run.train(tiny(tmp_path / "b", overrides), resume=attempt > 0)
            break
        except KeyboardInterrupt:
            kills += 1
    assert kills == 4
    assert metrics(whole) == metrics(stopped)
    expected, got = weights(whole), weights(stopped)
    assert expected.keys() == got.keys()
    for name in expected:
        assert torch.equal(expected[name], got[name]), name


def test_only_the_adapter_moves_in_the_policy_stages_and_the_run_reports(tmp_path, overrides):
    folder = run.train(tiny(tmp_path / "a", overrides))
    before = InternVLForConditionalGeneration.from_pretrained(folder / "stages" / "align").state_dict()
    moved = {freeze.part_of(n) for n, v in weights(folder).items() if not torch.equal(v, before[n])}
    assert moved == {"adapter"}
    lines = read(folder / "metrics.jsonl")
    grpo = [line for line in lines if line["stage"] == "grpo" and "reward" in line]
    assert len(grpo) == 4 and all("rewards/model/mean" in line for line in grpo)
    assert any("loss" in line for line in grpo), "at least one group was informative"
    assert [s for s in read(folder / "samples.jsonl") if s.get("advantage") is not None]
    page = write(folder).read_text()
    assert "Accuracy through the stages" in page and page.count("data:image/png") > 10
    with pytest.raises(ValueError, match="--resume"):
        run.train(tiny(folder, overrides))
    with pytest.raises(ValueError, match="another recipe"):
        run.train(tiny(folder, overrides, "grpo.steps=5"), resume=True)


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    recipe = config.load(
        "digits", [f"run.folder={folder}", "data.sizes={align: 16, policy: 16, reward: 16, heldout: 16}"]
    )
    context = Context(recipe, folder, Log(folder))
    context.use(context.initial())
    context.policy.train_parts(["adapter"])
    return context


def responses(context, **options):
    dataset = context.corpus.dataset("policy.parquet")
    prompts = context.reader.prompts(dataset, dataset.records[:5])
    settings = {"group_size": 3, "max_new_tokens": 6, "temperature": 0.7, **options}
    return prompts, context.engine.generate(prompts, seeds=list(range(len(prompts))), **settings)


def test_behaviour_log_probs_are_the_training_log_probs(context):
    from r1v2_fast.data.collate import Sequence

    prompts, sampled = responses(context)
    sequences = [Sequence(prompts[i // 3].ids, r.ids, prompts[i // 3].image_keys) for i, r in enumerate(sampled)]
    batch = context.reader.batch(sequences, "cpu")
    ours = context.policy.response_logprobs(batch, temperature=0.7).logprobs
    behaviour = torch.cat([r.logprobs for r in sampled])
    assert (ours - behaviour).abs().max() <= 1e-5 * behaviour.abs().max()


def test_a_policy_never_samples_a_placeholder(context):
    forbidden = set(context.policy.forbidden.tolist())
    names = set(context.policy.tokenizer.convert_ids_to_tokens(sorted(forbidden)))
    assert names == {"<pad>", "<img>", "</img>", "<IMG_CONTEXT>"}
    _, sampled = responses(context, temperature=50.0, max_new_tokens=12, group_size=20)
    assert not forbidden & {token for r in sampled for token in r.ids}


def test_a_prompt_is_prefilled_once_for_its_responses(context, monkeypatch):
    rows = []
    forward = type(context.policy.internvl.language_model).forward

    def counted(self, *args, **kwargs):
        rows.append(tuple(kwargs["inputs_embeds"].shape[:2]))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(context.policy.internvl.language_model), "forward", counted)
    prompts, _ = responses(context)
    assert rows[0] == (5, max(len(p.ids) for p in prompts)) and all(r == (15, 1) for r in rows[1:])


def test_an_image_is_encoded_once_and_its_features_match_transformers(context, monkeypatch):
    dataset = context.corpus.dataset("policy.parquet")
    keys = dataset.image_keys(dataset[9])
    calls = []
    encode = context.policy._encode
    monkeypatch.setattr(context.policy, "_encode", lambda k: calls.append(k) or encode(k))
    ours = context.policy.image_embeddings([keys, keys])
    context.policy.image_embeddings([keys])
    assert calls == [keys]
    theirs = context.policy.internvl.get_image_features(
        context.reader.pixels(keys)[0], vision_feature_layer=-1, vision_feature_select_strategy="default"
    ).pooler_output.flatten(0, 1)
    assert torch.equal(ours, torch.cat([theirs, theirs]))


def test_the_reference_is_a_swap_and_no_second_model(context):
    parameters = list(context.policy.parameters.values())
    values = freeze.snapshot(parameters)
    with torch.no_grad():
        parameters[0].add_(1.0)
    trained = parameters[0].detach().clone()
    with freeze.swapped(parameters, values):
        assert not torch.equal(parameters[0], trained)
    assert torch.equal(parameters[0], trained)
    with torch.no_grad():
        parameters[0].sub_(1.0)


def test_r1v2_38b_has_the_published_shapes():
    with torch.device("meta"):
        model = InternVLForConditionalGeneration(presets.r1v2_38b())
    adapter = sum(p.numel() for n, p in model.named_parameters() if freeze.part_of(n) == "adapter")
    assert adapter == 91_786_240
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    vision, text = "model.vision_tower.", "model.language_model."
    layer, block = f"{vision}encoder.layer.44.", f"{text}layers.63."
    expected = {
        f"{vision}embeddings.cls_token": (1, 1, 3200),
        f"{vision}embeddings.position_embeddings": (1, 1025, 3200),
        f"{vision}embeddings.patch_embeddings.projection.weight": (3200, 3, 14, 14),
        f"{layer}attention.q_proj.weight": (3200, 3200),
        f"{layer}attention.q_norm.weight": (3200,),
        f"{layer}mlp.fc1.weight": (12800, 3200),
        f"{layer}lambda_1": (3200,),
        "model.multi_modal_projector.layer_norm.weight": (12800,),
        "model.multi_modal_projector.linear_1.weight": (5120, 12800),
        "model.multi_modal_projector.linear_2.weight": (5120, 5120),
        f"{text}embed_tokens.weight": (152064, 5120),
        f"{block}self_attn.q_proj.weight": (5120, 5120),
        f"{block}self_attn.k_proj.weight": (1024, 5120),
        f"{block}self_attn.v_proj.bias": (1024,),
        f"{block}mlp.gate_proj.weight": (27648, 5120),
        f"{block}mlp.down_proj.weight": (5120, 27648),
        f"{text}norm.weight": (5120,),
        "lm_head.weight": (152064, 5120),
    }
    assert {name: shapes.get(name) for name in expected} == expected
    assert f"{layer}attention.q_proj.bias" not in shapes
    assert f"{vision}encoder.layer.45.lambda_1" not in shapes and f"{text}layers.64.mlp.gate_proj.weight" not in shapes


def test_the_toy_has_about_a_third_of_a_million_parameters(context):
    assert 250_000 < sum(p.numel() for p in context.policy.loaded.model.parameters()) < 350_000


def test_an_unknown_key_names_the_closest():
    with pytest.raises(ValueError, match="unknown key 'grpo.sampling.group_siz'; did you mean 'group_size'"):
        config.load("digits", ["grpo.sampling.group_siz=4"])
    with pytest.raises(ValueError, match="mpo.rewards.0.squash"):
        config.load("digits", ["mpo.rewards=[{name: a, function: exact_match, squash: tanh}]"])
    with pytest.raises(ValueError, match="did you mean 'digits'"):
        config.load("digit", [])


def test_pairs_need_the_gap():
    totals = torch.tensor([0.0, 1.0, 0.4, 2.0, 2.0, 2.0])
    assert pairs_by_gap(totals, 3, min_gap=0.5, max_pairs=4) == [(1, 0), (1, 2)]
    assert pairs_by_gap(totals, 3, min_gap=0.5, max_pairs=1) == [(1, 0)]


def test_the_learning_rate_is_a_pure_function_of_the_step():
    settings = config.Optimizer(lr=1.0, warmup_steps=4, decay="linear")
    rates = [learning_rate(settings, step, 8) for step in range(8)]
    assert rates == [0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25]


def test_equal_rewards_everywhere_are_explained_in_a_sentence(tmp_path, overrides, capsys):
    constant = tmp_path / "constant.py"
    constant.write_text("def one(prompts, completions, **_):\n    return [1.0] * len(completions)\n")
    term = f"[{{name: answer, function: '{constant}:one'}}]"
    run.train(tiny(tmp_path / "a", overrides, "run.stages=[grpo]", f"grpo.rewards={term}", "grpo.steps=1"))
    assert "nothing to learn from: 100% of the groups have equal rewards" in " ".join(capsys.readouterr().out.split())


def test_ready_pairs_train_without_sampling(tmp_path, overrides):
    records = [
        {"id": str(i), "prompt": f"Add the digits {i}.", "chosen": "<think>1</think>1", "rejected": "2 2"}
        for i in range(6)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, records)))
    more = (
        "run.stages=[mpo]",
        "mpo.sampling=null",
        "mpo.rewards=[]",
        "mpo.pairs=4",
        f"mpo.data={tmp_path}/pairs.jsonl",
    )
    folder = run.train(tiny(tmp_path / "a", overrides, *more, "mpo.steps=12", "mpo.train=[llm]"))
    losses = [line["loss"] for line in read(folder / "metrics.jsonl") if "loss" in line]
    assert len(losses) == 12 and losses[-1] < losses[0] and not any(map(math.isnan, losses))


def test_records_without_images_keep_the_adapter_in_the_graph(tmp_path, overrides, capsys):
    record = {"id": "0", "prompt": "Add the digits.", "chosen": "<think>1</think>1", "rejected": "2 2"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(record))
    more = (
        "run.stages=[mpo]",
        "mpo.sampling=null",
        "mpo.rewards=[]",
        "mpo.pairs=1",
        f"mpo.data={tmp_path}/pairs.jsonl",
    )
    run.train(tiny(tmp_path / "a", overrides, *more))
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("the gradient is exactly 0") == 1


def test_a_run_of_an_earlier_release_resumes_where_new_keys_have_their_defaults(tmp_path):
    sizes = "data.sizes={align: 64, policy: 8, reward: 8, heldout: 4}"
    recipe = tiny(tmp_path / "a", [], "run.stages=[align]", "align.steps=1", sizes)
    run.train(recipe)
    path = tmp_path / "a" / "recipe.yaml"
    saved = yaml.safe_load(path.read_text())
    del saved["rollout"], saved["model"]["packing"]
    path.write_text(yaml.safe_dump(saved))
    run.train(recipe, resume=True)
    saved["align"]["batch_size"] += 1
    path.write_text(yaml.safe_dump(saved))
    with pytest.raises(ValueError, match="another recipe, it differs in align.batch_size"):
        run.train(recipe, resume=True)


def test_sixteen_bit_stages_that_train_the_language_model_are_evaluated_on_the_way(tmp_path):
    """What trains is fp32 under autocast: keys come out in fp32, values in 16 bits."""
    sizes = "data.sizes={align: 64, policy: 8, reward: 8, heldout: 4}"
    more = ["run.stages=[align]", "align.steps=2", "evaluation.every=1", "model.dtype=bfloat16"]
    folder = run.train(tiny(tmp_path / "a", [], *more, sizes))
    steps = [line["step"] for line in read(folder / "metrics.jsonl") if "eval/clean/accuracy" in line]
    assert steps == [1, 2]
