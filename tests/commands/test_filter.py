"""r1v2-fast filter: the prompt pool, going on where it was stopped, and what it refuses."""

import json
import os
import re
import shutil

import pyarrow.parquet as parquet
import pytest

from r1v2_fast.cli import main
from r1v2_fast.commands import filter as filtering
from r1v2_fast.data.records import Dataset


def run_filter(folder, data, out, *more):
    return main(["filter", str(folder / "final"), str(data), str(out), "--batch-size", "8",
                 "--max-new-tokens", "12", *map(str, more)])  # fmt: skip


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

    def killed(policy, reader, dataset, batch, *rest):
        index = dataset.records.index(batch[0]) // len(batch)
        if index == 2 and counted.count("killed") < 2:
            counted.append("killed")
            raise KeyboardInterrupt
        counted.append(index)
        return count(policy, reader, dataset, batch, *rest)

    monkeypatch.setattr(filtering, "_count", killed)
    assert run_filter(folder, data, pool / out) == 130
    assert not (pool / out).exists() and len(progress.read_text().splitlines()) == 3
    progress.write_text(progress.read_text()[:-9])  # the kill cut the last line short
    assert run_filter(folder, data, pool / out) == 130
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
        ("heldout_clean.jsonl", "out.jsonl", ["--temperature", "inf"], "--temperature must be at least 0 and finite"),
        ("heldout_clean.jsonl", "out.jsonl", ["--low", ".9", "--high", ".1"], "--low must be at most --high"),
        ("heldout_clean.jsonl", "out.jsonl", ["--time-limit", "-1"], "--time-limit must be at least 0, got -1"),
        ("heldout_clean.jsonl", "out.jsonl", ["--max-tiles", "0"], "--max-tiles must be at least 1, got 0"),
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


def begin(folder, pool, monkeypatch, *options):
    """A filter that was killed in its third batch."""
    count = filtering._count

    def killed(policy, reader, dataset, batch, *rest):
        if dataset.records.index(batch[0]) == 16:
            raise KeyboardInterrupt
        return count(policy, reader, dataset, batch, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(filtering, "_count", killed)
        assert run_filter(folder, pool / "heldout_clean.jsonl", pool / "out.jsonl", *options) == 130


RULE = "def rule(prompts, completions, *, answer, **columns):\n    return [{} for _ in completions]\n"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("data_digest", lambda pool: (pool / "heldout_clean.jsonl").open("a").write("\n")),
        ("model_time", lambda pool: os.utime(pool / "run" / "final" / "config.json", (2e9, 2e9))),
        ("score_digest", lambda pool: (pool / "rule.py").write_text(RULE.format(0.0))),
    ],
)
def test_filter_does_not_go_on_with_what_has_changed(folder, pool, name, change, monkeypatch, capsys):
    shutil.copytree(folder / "final", pool / "run" / "final")
    (pool / "rule.py").write_text(RULE.format(1.0))
    options = ["--keep-all", "--group-size", 2, "--score", f"{pool / 'rule.py'}:rule"]
    begin(pool / "run", pool, monkeypatch, *options)
    change(pool)
    assert run_filter(pool / "run", pool / "heldout_clean.jsonl", pool / "out.jsonl", *options) == 2
    assert re.search(f"begun with {name} [^;]+, got [^;]+; go on with the same", capsys.readouterr().err)


def test_filter_goes_on_under_another_time_limit_and_on_nan(folder, pool, monkeypatch):
    begin(folder, pool, monkeypatch, "--keep-all")
    more = ["--keep-all", "--time-limit", 0, "--on-nan", "skip"]
    assert run_filter(folder, pool / "heldout_clean.jsonl", pool / "out.jsonl", *more) == 0


def test_a_record_is_answered_alike_in_batches_of_any_size(folder, pool):
    for size in (8, 5):
        out = pool / f"{size}.parquet"
        assert run_filter(folder, pool / "policy.parquet", out, "--keep-all", "--batch-size", size) == 0
    assert columns(pool / "8.parquet", "pass_count") == columns(pool / "5.parquet", "pass_count")


def add_column(path, name, value):
    rows = [{**json.loads(line), name: value} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("column", "value", "out", "message"),
    [
        ("pass_rate", 0.5, "out.jsonl", "its column 'pass_rate' would be overwritten by filter's own: rename it"),
        ("big", 1 << 70, "out.parquet", "field 'big' does not fit a .parquet column"),
    ],
)
def test_filter_names_a_column_that_it_cannot_keep(folder, pool, column, value, out, message, capsys):
    add_column(pool / "heldout_clean.jsonl", column, value)
    assert run_filter(folder, pool / "heldout_clean.jsonl", pool / out) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_pool_can_be_filtered_again(folder, pool):
    for data, out, size in [("heldout_clean.jsonl", "a.jsonl", 3), ("a.jsonl", "b.jsonl", 4)]:
        assert run_filter(folder, pool / data, pool / out, "--keep-all", "--group-size", size) == 0
    assert {n for (n,) in columns(pool / "a.jsonl", "responses").values()} == {3}
    assert {n for (n,) in columns(pool / "b.jsonl", "responses").values()} == {4}


def test_filter_says_how_many_responses_were_cut(folder, pool, capsys):
    data = pool / "heldout_clean.jsonl"
    assert run_filter(folder, data, pool / "out.jsonl", "--max-new-tokens", 1) == 2
    error = capsys.readouterr().err
    assert "no record kept" in error and "\n100.0% of the responses were cut at 1 tokens" in error
    assert run_filter(folder, data, pool / "all.jsonl", "--keep-all", "--max-new-tokens", 40) == 0
    assert "\n0.0% of the responses were cut at 40 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["out.jsonl", "out.parquet"])
def test_filter_on_a_full_disk_leaves_its_counts_and_no_pool(folder, pool, out, full_disk, capsys):
    full_disk(2048)  # more than the counts
    assert run_filter(folder, pool / "heldout_clean.jsonl", pool / out, "--keep-all") == 2
    error = capsys.readouterr().err
    assert error.rstrip().split("\n")[-1].startswith(f"r1v2-fast: cannot write {pool / out}: [Errno 27]")
    assert not (pool / out).exists() and not list(pool.glob("*.partial"))
    full_disk(100)
    assert run_filter(folder, pool / "heldout_clean.jsonl", pool / f"two-{out}", "--keep-all") == 2
    assert not list(pool.glob("*.partial"))
    full_disk(1 << 20)
    assert run_filter(folder, pool / "heldout_clean.jsonl", pool / out, "--keep-all") == 0


def test_out_below_a_file_is_one_sentence(folder, pool, capsys):
    (pool / "file").touch()
    assert run_filter(folder, pool / "heldout_clean.jsonl", pool / "file" / "out.parquet") == 2
    assert main(["export", str(folder), str(pool / "file" / "out")]) == 2
    assert main(["export", str(folder), str(pool / "file"), "--overwrite"]) == 2
    for line in capsys.readouterr().err.splitlines():
        assert line.startswith("r1v2-fast: ") and str(pool / "file") in line, line


def test_filter_and_evaluate_limit_a_rule_that_hangs_and_skip_nan(folder, pool, capsys):
    (pool / "slow.py").write_text("import time\ndef slow(completions, **rest):\n    time.sleep(60)\n")
    (pool / "nan.py").write_text("def nan(completions, **rest):\n    return [float('nan')] * len(completions)\n")
    data = pool / "heldout_clean.jsonl"
    short = ["--max-new-tokens", "2", "--records", "4"]
    evaluate = ["evaluate", str(folder / "final"), str(data), *short]
    keep = ["--keep-all", "--overwrite", *short]
    slow, nan = ["--score", f"{pool / 'slow.py'}:slow", "--time-limit", "0.2"], ["--score", f"{pool / 'nan.py'}:nan"]
    for run in (
        lambda *more: main([*evaluate, *more]),
        lambda *more: run_filter(folder, data, pool / "o.jsonl", *keep, *more),
    ):
        assert run(*slow) == 2 and "gave no answer within 0.2 s" in capsys.readouterr().err
        assert run(*nan) == 2 and "expected a finite number" in capsys.readouterr().err
        assert run(*nan, "--on-nan", "skip") == 0
    assert {rate for (rate,) in columns(pool / "o.jsonl", "pass_rate").values()} == {None}
