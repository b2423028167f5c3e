"""filter, chat, export and a stopped train as a user meets them, on a policy that is sometimes right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer, GotOcr2ImageProcessorPil

from r1v2_fast.cli import main
from r1v2_fast.commands import filter as filtering
from r1v2_fast.commands.model import open_model
from r1v2_fast.config import Evaluation
from r1v2_fast.data.records import Dataset
from r1v2_fast.train.context import Corpus
from r1v2_fast.train.evaluate import evaluate
from r1v2_fast.train.rollout import rollout
from r1v2_fast.train.stop import Stopped

RUN = [
    "run.stages=[align,reward,grpo]", "align.steps=60", "align.batch_size=32", "align.optimizer.warmup_steps=5",
    "align.optimizer.lr=2.0e-3", "reward.steps=1", "reward.sampling.prompts=4", "grpo.steps=1", "evaluation.every=30",
    "data.sizes={align: 256, policy: 40, reward: 8, heldout: 24}",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands") / "run"
    assert main(["train", "digits", *RUN, f"run.folder={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def held_out(folder):
    """(dataset, reader, policy, greedy completions) of the clean held-out records."""
    corpus = Corpus(folder / "data")
    dataset = corpus.dataset("heldout_clean.jsonl")
    policy, reader = open_model(folder / "final", corpus, "cpu")
    config = Evaluation(sets={"clean": "heldout_clean.jsonl"}, max_new_tokens=12)
    return dataset, reader, policy, evaluate(policy, reader, dataset, config)


@pytest.fixture
def pool(folder, tmp_path):
    """A folder of records of its own, for what lies beside them."""
    for name in ("heldout_clean.jsonl", "policy.parquet"):
        shutil.copy(folder / "data" / name, tmp_path)
    shutil.copytree(folder / "data" / "images", tmp_path / "images")
    return tmp_path


def run_filter(folder, data, out, *more):
    return main(["filter", str(folder / "final"), str(data), str(out), "--batch-size", "8", *map(str, more)])


def columns(path, *names):
    return {record.id: tuple(record.columns[name] for name in names) for record in Dataset(path).records}


@pytest.mark.parametrize(("data", "out"), [("policy.parquet", "out.parquet"), ("heldout_clean.jsonl", "out.jsonl")])
def test_filter_writes_the_pass_rates_of_an_independent_count(folder, pool, data, out, capsys):
    (pool / "rule.py").write_text(
        "import json\n"
        "def rule(prompts, completions, *, answer, digits, **columns):\n"
        f"    with open({str(pool / 'seen.jsonl')!r}, 'a') as lines:\n"
        "        for seen in zip(completions, answer, digits): print(json.dumps(seen), file=lines)\n"
        "    return [None if c.endswith('7') else float(c.endswith('>' + a)) for c, a in zip(completions, answer)]\n"
    )
    options = ["--score", f"{pool / 'rule.py'}:rule", "--group-size", 5, "--temperature", 0.7, "--keep-all"]
    assert run_filter(folder, pool / data, pool / out, *options) == 0
    records = Dataset(pool / data).records
    seen = [json.loads(line) for line in (pool / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == 5 * len(records) and len({completion for completion, *_ in seen}) > 5
    written = columns(pool / out, "pass_rate", "pass_count", "responses")
    rates = []
    for record, group in zip(records, (seen[i : i + 5] for i in range(0, len(seen), 5)), strict=True):
        assert {tuple(rest) for _, *rest in group} == {(record.answer, record.columns["digits"])}
        scored = [c for c, *_ in group if not c.endswith("7")]
        right = sum(c.split("</think>")[-1] == record.answer for c in scored)
        assert written.pop(record.id) == (right / len(scored) if scored else None, right, len(scored))
        rates.append(right / len(scored) if scored else None)
    assert not written and 0 < sum(rate not in (None, 0, 1) for rate in rates) < len(rates)
    said = capsys.readouterr().out
    assert f"kept {len(records)} of {len(records)} records" in said
    assert re.search(rf"never +{rates.count(0)} ", said), said


def test_almost_greedy_sampling_is_right_where_the_evaluation_is(folder, held_out, pool):
    data = pool / "heldout_clean.jsonl"
    assert run_filter(folder, data, pool / "out.jsonl", "--group-size", 2, "--temperature", 1e-3, "--keep-all") == 0
    rates = [rate for (rate,) in columns(pool / "out.jsonl", "pass_rate").values()]
    right = held_out[-1].right
    assert rates == [float(value) for value in right] and 0 < sum(right) < len(right)


@pytest.mark.parametrize(("data", "out"), [("policy.parquet", "out.parquet"), ("heldout_clean.jsonl", "out.jsonl")])
def test_filter_keeps_the_informative_records_as_they_are(folder, pool, data, out):
    assert run_filter(folder, pool / data, pool / "all.parquet", "--keep-all") == 0
    assert run_filter(folder, pool / data, pool / out) == 0
    rates = columns(pool / "all.parquet", "pass_rate")
    before, after = Dataset(pool / data), Dataset(pool / out)
    assert [r.id for r in after.records] == [id for id, (rate,) in rates.items() if 0 < rate < 1]
    originals = {record.id: record for record in before.records}
    for record in after.records:
        original = originals[record.id]
        assert (record.prompt, record.answer) == (original.prompt, original.answer)
        added = {name: record.columns.pop(name) for name in filtering.COLUMNS}
        assert record.columns == original.columns and added["pass_rate"] == rates[record.id][0]
        keys = after.image_keys(record), before.image_keys(original)
        assert after.image(keys[0][0]).tobytes() == before.image(keys[1][0]).tobytes()


def test_filter_bounds_are_among_what_is_kept(folder, pool):
    data = pool / "policy.parquet"
    assert run_filter(folder, data, pool / "all.parquet", "--keep-all", "--group-size", 4) == 0
    rates = columns(pool / "all.parquet", "pass_rate")
    assert run_filter(folder, data, pool / "some.parquet", "--low", 0.0, "--high", 0.25, "--group-size", 4) == 0
    assert columns(pool / "some.parquet", "pass_rate") == {k: v for k, v in rates.items() if v[0] <= 0.25}
    assert {(0.0,), (0.25,)} <= set(rates.values())


def test_a_parquet_pool_needs_nothing_beside_it(folder, pool, tmp_path_factory):
    out = tmp_path_factory.mktemp("elsewhere") / "deep" / "out.parquet"
    assert run_filter(folder, pool / "heldout_clean.jsonl", out, "--keep-all") == 0
    shutil.rmtree(pool / "images")
    dataset = Dataset(out)
    assert [dataset.image(key).size for r in dataset.records for key in dataset.image_keys(r)] == [(16, 16)] * 24
    assert parquet.read_metadata(out).num_rows == 24


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_a_killed_filter_goes_on_to_the_same_bytes(folder, pool, out, monkeypatch, capsys):
    data, progress = pool / "heldout_clean.jsonl", pool / f"{out}.progress.jsonl"
    assert run_filter(folder, data, pool / f"whole-{out}") == 0
    count, counted = filtering._count, []

    def killed(*arguments):
        if arguments[-1] == 2 and counted.count("killed") < 2:
            counted.append("killed")
            raise KeyboardInterrupt
        counted.append(arguments[-1])
        return count(*arguments)

    monkeypatch.setattr(filtering, "_count", killed)
    with pytest.raises(KeyboardInterrupt):
        run_filter(folder, data, pool / out)
    assert not (pool / out).exists() and len(progress.read_text().splitlines()) == 3
    progress.write_text(progress.read_text()[:-9])  # the kill cut the last line short
    with pytest.raises(KeyboardInterrupt):
        run_filter(folder, data, pool / out)
    assert run_filter(folder, data, pool / out, "--seed", 1) == 2
    assert "begun with seed 0, got 1;" in capsys.readouterr().err
    assert run_filter(folder, data, pool / out) == 0
    assert counted == [0, 1, "killed", 1, "killed", 2]
    assert (pool / out).read_bytes() == (pool / f"whole-{out}").read_bytes()
    assert not progress.exists() and not list(pool.glob("*.partial"))


def test_another_seed_draws_other_responses(folder, pool):
    for seed in (0, 1):
        assert run_filter(folder, pool / "policy.parquet", pool / f"{seed}.parquet", "--keep-all", "--seed", seed) == 0
    assert columns(pool / "0.parquet", "pass_count") != columns(pool / "1.parquet", "pass_count")


def test_filter_that_keeps_nothing_keeps_its_counts(folder, pool, capsys):
    data, out = pool / "policy.parquet", pool / "out.parquet"
    assert run_filter(folder, data, out, "--low", 0.99, "--high", 0.995) == 2
    assert "no record kept" in (error := capsys.readouterr().err) and "--keep-all" in error and not out.exists()
    assert run_filter(folder, data, out, "--keep-all", "--group-size", 3) == 2
    assert "begun with group_size 8, got 3" in capsys.readouterr().err
    assert run_filter(folder, data, out, "--keep-all") == 0


@pytest.mark.parametrize(
    ("data", "out", "options", "message"),
    [
        ("policy.parquet", "out.jsonl", [], "write .parquet"),
        ("heldout_clean.jsonl", "deep/out.jsonl", [], "write .parquet"),
        ("heldout_clean.jsonl", "out.csv", [], "a .jsonl or .parquet file to write, got"),
        ("heldout_clean.jsonl", "policy.parquet", [], "policy.parquet exists; add --overwrite"),
        ("heldout_clean.jsonl", "out.jsonl", ["--temperature", "0"], "--temperature must be above 0"),
        ("heldout_clean.jsonl", "out.jsonl", ["--group-size", "0"], "--group-size must be at least 1, got 0"),
        ("heldout_clean.jsonl", "out.jsonl", ["--records", "0"], "--records must be at least 1, got 0"),
        ("heldout_clean.jsonl", "out.jsonl", ["--keep-all", "--low", "0.5"], "got --keep-all with --low 0.5"),
        ("heldout_clean.jsonl", "out.jsonl", ["--score", "exact"], "got 'exact'"),
        ("missing.jsonl", "out.jsonl", [], "missing.jsonl"),
    ],
)
def test_filter_says_what_is_wrong_before_it_starts(folder, pool, data, out, options, message, capsys, monkeypatch):
    monkeypatch.setattr(filtering, "open_model", lambda *_: pytest.fail("the model was loaded"))
    assert run_filter(folder, pool / data, pool / out, *options) == 2
    assert message in capsys.readouterr().err
    assert not (pool / f"{out}.progress.jsonl").exists()


def test_filter_overwrites_when_told_to(folder, pool):
    (pool / "out.jsonl").write_text("something else")
    assert run_filter(folder, pool / "heldout_clean.jsonl", pool / "out.jsonl", "--overwrite", "--keep-all") == 0
    assert len(Dataset(pool / "out.jsonl")) == 24


def test_a_training_that_is_stopped_leaves_with_the_signals_status(tmp_path, capsys, monkeypatch):
    def stopped(*_, **__):
        raise Stopped("stopped after step 3 of align, checkpointed", 15)

    monkeypatch.setattr("r1v2_fast.train.run.train", stopped)
    assert main(["train", "digits", f"run.folder={tmp_path}"]) == 143
    assert "stopped after step 3 of align, checkpointed; go on with --resume" in capsys.readouterr().err


def picture_of(dataset, index):
    return str(dataset.root / dataset[index].images[0])


def test_chat_gives_the_greedy_answer_and_nothing_else(folder, held_out, capsys):
    dataset, *_, result = held_out
    answers = []
    for index in range(4):
        question = dataset[index].prompt.removeprefix("<image>\n")
        before_question = ["chat", str(folder / "final"), "--image", picture_of(dataset, index), question]
        marked = ["chat", str(folder / "final"), f"<image>\n{question}", "--image", picture_of(dataset, index)]
        for arguments in (before_question, marked):
            assert main([*arguments, "--max-new-tokens", "12"]) == 0
            answers.append(capsys.readouterr().out)
            assert answers[-1] == result.completions[index] + "\n"
    assert len(set(answers)) > 1


def test_chat_goes_on_over_several_questions(folder, held_out, tmp_path):
    dataset, reader, policy, _ = held_out
    said = "Read the digits.\nAdd the digits.\n\nHow many digits?\n"
    command = [sys.executable, "-m", "r1v2_fast", "chat", str(folder / "final"), "--max-new-tokens", "12"]
    done = subprocess.run(
        [*command, "--image", picture_of(dataset, 0)], input=said, capture_output=True, text=True, check=True
    )
    record, history, answers = dataset[0], [], []
    for text in ("<image>\nRead the digits.", "Add the digits."):
        history.append({"role": "user", "content": text})
        asked = type(record)(record.id, list(history), record.images, None, None, None)
        (response,) = rollout(policy, [reader.prompt(dataset, asked)], group_size=1, max_new_tokens=12, temperature=0.0)
        answers.append(reader.encoder.decode(response.ids))
        history.append({"role": "assistant", "content": answers[-1]})
    assert done.stdout == "".join(f"{answer}\n" for answer in answers)  # the empty line ended it
    assert "> " not in done.stderr  # a prompt is for a terminal


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--image", "nowhere.png", "Read."], "nowhere.png"),
        (["--image", "broken.png", "Read."], "broken.png"),
        (["Read <image>."], "expected 0 <image> marks in the question, one a picture, got 1"),
        (["--image", "good.png", "<image> and <image>."], "expected 1 <image> marks in the question"),
        (["Read.", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["Read.", "--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
    ],
)
def test_chat_says_in_one_sentence_what_is_wrong(folder, tmp_path, options, message, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (16, 16)).save("good.png")
    Path("broken.png").write_bytes(Path("good.png").read_bytes()[:40])
    assert main(["chat", str(folder / "final"), *options]) == 2
    out, error = capsys.readouterr()
    assert message in error and error.count("\n") == 1 and not out


def test_chat_refuses_a_reward_model(folder, capsys):
    assert main(["chat", str(folder / "stages" / "reward"), "Read."]) == 2
    assert "expected a policy's folder, got a reward model" in capsys.readouterr().err


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("export") / "model"
    (folder / "environment.json").write_text(json.dumps({"version": "9.8.7", "commit": "0123abcd", "torch": "2"}))
    assert main(["export", str(folder), str(out)]) == 0
    assert main(["export", str(folder), str(out)]) == 2
    return out


def test_transformers_answers_as_the_rollout_does(exported, held_out):
    dataset, reader, _, result = held_out
    model = AutoModelForImageTextToText.from_pretrained(exported)
    tokenizer, processor = AutoTokenizer.from_pretrained(exported), GotOcr2ImageProcessorPil.from_pretrained(exported)
    for index, record in enumerate(dataset.records[:12]):
        ids = torch.tensor([reader.prompt(dataset, record).ids])
        pixels = processor([dataset.image(key) for key in dataset.image_keys(record)], return_tensors="pt")
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels["pixel_values"],
            max_new_tokens=12,
            do_sample=False,
        )
        assert tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True) == result.completions[index]


def test_transformers_never_writes_a_placeholder(exported, folder, held_out):
    """Where a placeholder is the likeliest token, generate takes the next one, as the rollout does."""
    dataset, reader, policy, _ = held_out
    model = AutoModelForImageTextToText.from_pretrained(exported)
    assert set(model.generation_config.suppress_tokens) == set(policy.forbidden.tolist())
    image_token = model.config.image_token_id
    with torch.no_grad():  # an untied head: the placeholder's row outbids every other token
        model.lm_head.weight[image_token] = 0
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(model.lm_head.weight)))
        model.lm_head.bias[image_token] = 1e4
    ids = torch.tensor([reader.prompt(dataset, dataset[0]).ids])
    pixels = torch.cat(reader.pixels(dataset.image_keys(dataset[0])))
    output = model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=6, do_sample=False)
    assert image_token not in output[0, ids.shape[1] :]


def test_the_card_says_what_was_trained_and_measured(exported, folder):
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\n")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for stage in ("align", "grpo"):
        last = [line for line in lines if line["stage"] == stage and "eval/clean/accuracy" in line][-1]
        names = [f"eval/{s}/{m}" for s in ("clean", "low_contrast") for m in ("accuracy", "hallucination")]
        assert f"| {stage} | {' | '.join(f'{last[name]:.1%}' for name in names)} |" in card
    assert "commit: 0123abcd" in card and "version: 9.8.7" in card
    assert (folder / "recipe.yaml").read_text() in card
    assert "| stage grpo | `policy.parquet` | 40 |" in card and "| `heldout_clean.jsonl` | 24 |" in card
    assert "32 prompts of 8 responses a step, rewarded by answer + format + model" in card


def test_the_cards_snippet_runs_and_answers(exported, held_out):
    dataset, *_, result = held_out
    index = next(i for i, record in enumerate(dataset.records) if record.columns["kind"] == "read")
    shutil.copy(picture_of(dataset, index), exported / "picture.png")
    snippet = re.search(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)[1]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", snippet], cwd=exported, env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == result.completions[index], done.stderr


def test_an_exported_folder_is_read_by_the_other_commands(exported, folder, held_out, capsys):
    capsys.readouterr()
    data = str(folder / "data" / "heldout_clean.jsonl")
    assert main(["evaluate", str(exported), data]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == held_out[-1].metrics["accuracy"]


def test_export_takes_a_stage_and_a_dtype(folder, tmp_path):
    assert main(["export", str(folder), str(tmp_path / "a"), "--from", "align", "--dtype", "bfloat16"]) == 0
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "a", dtype="auto")
    stage = AutoModelForImageTextToText.from_pretrained(folder / "stages" / "align")
    assert model.dtype == torch.bfloat16
    for name, tensor in stage.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor.to(torch.bfloat16)), name
    card = (tmp_path / "a" / "README.md").read_text()
    assert "the policy at the end of stage align" in card and "stage grpo" not in card


def test_export_of_the_best_policy_says_when_it_was(folder, tmp_path, capsys):
    assert main(["export", str(folder), str(tmp_path / "a"), "--from", "best"]) == 2
    assert "--from must be one of ['final', 'align', 'reward', 'grpo']" in capsys.readouterr().err
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    shutil.copytree(run / "stages" / "align", run / "best")
    best = {"metric": "eval/clean/accuracy", "value": 0.875, "stage": "align", "step": 40}
    (run / "best" / "best.json").write_text(json.dumps(best))
    assert main(["export", str(run), str(tmp_path / "a"), "--from", "best"]) == 0
    card = (tmp_path / "a" / "README.md").read_text()
    assert "the policy after step 40 of align: the best `eval/clean/accuracy`, 0.875." in card


def test_export_leaves_alone_what_it_did_not_write(folder, tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_run").mkdir()
    stage = folder / "stages" / "align"
    for arguments, message in [
        ([folder, tmp_path], "is not empty; add --overwrite"),
        ([folder, tmp_path, "--overwrite"], "--overwrite replaces an earlier export"),
        ([folder, stage, "--overwrite"], "--overwrite replaces an earlier export"),
        ([folder, tmp_path / "x", "--from", "reward"], "got a reward model"),
        ([folder, tmp_path / "x", "--from", "mpo"], "--from must be one of ['final', "),
        ([tmp_path / "no_run", tmp_path / "x"], "expected the folder of a run with its recipe.yaml"),
    ]:
        assert main(["export", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists() and (stage / "model.safetensors").exists()
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob("*.partial"))
    assert main(["export", str(folder), str(tmp_path / "empty")]) == 0
    (tmp_path / "empty" / "stale.txt").touch()
    assert main(["export", str(folder), str(tmp_path / "empty"), "--overwrite"]) == 0
    assert not (tmp_path / "empty" / "stale.txt").exists()
