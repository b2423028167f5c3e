"""The suite itself: it measures what is right, refuses what is wrong, and its lines can be read again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from r1v2_fast.testing.peaked import MIDDLE, SPARSE, TAU, peaked_policy

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "import dataclasses, json, torch\n"
    "from rich.console import Console\n"
    "from bench import ceilings, check\n"
    "from bench.case import Provider\n"
    "from bench.cases import group_advantage, linear_logprob as cases, linear_logprob_losses, logprobs_from_logits\n"
    "from bench.run import run, verified\n"
    "ceilings.COPIED['cpu'], ceilings.PRODUCT['cpu'] = 32 << 20, (256, 256, 1024)\n"
    "cpu, console = torch.device('cpu'), Console(width=160)\n"
    "def small(kind, devices=('cpu', 'cuda'), case=cases.case, **more):\n"
    "    made = case(kind, 512, 64, 2048, torch.float32, devices)\n"
    "    own = {n: p for n, p in made.providers.items() if n in ('ours', 'pytorch', 'matmuls')}\n"
    "    return dataclasses.replace(made, providers={**own, **more})\n"
)


def run(*arguments):
    environment = {**os.environ, "COLUMNS": "160"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_a_run_writes_lines_that_compare_reads(tmp_path):
    file = tmp_path / "cpu.jsonl"
    done = run(
        "-m", "bench", "--device", "cpu", "--rounds", "1", "--output", file, "run", "mpo_loss", "group_advantage"
    )
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    ran = {
        p: {(line["stem"], line["case"]) for line in lines if line["provider"] == p}
        for p in ("ours", "pytorch", "compile")
    }
    assert ran["ours"] == ran["pytorch"] == ran["compile"]  # and the peers that are installed
    assert {stem for stem, _ in ran["ours"]} == {"mpo_loss", "group_advantage"}
    assert all(line["seconds"] > 0 and line["environment"]["torch"] and line["environment"]["commit"] for line in lines)
    assert all(line["ceilings"]["bandwidth"] > 0 and line["peak_bytes"] > 0 for line in lines)
    for line in lines:
        line["seconds"] *= 2
        del line["roofline_percent"], line["peak_bytes"]  # as a file from before they were measured
    slower = tmp_path / "slower.jsonl"
    slower.write_text("\n".join(map(json.dumps, lines)))
    table = run("-m", "bench", "compare", file, slower)
    assert table.returncode == 0 and table.stdout.count("2.00") == len(lines), table.stderr


def test_an_unknown_op_is_named():
    done = run("-m", "bench", "run", "group_advantages")
    assert done.returncode and "no case of ['group_advantages']" in done.stderr and "'group_advantage'" in done.stderr


@pytest.mark.parametrize(("factor", "error"), [("1 + 1e-5", "1.0"), ("float('nan')", "inf")])
def test_a_wrong_result_is_never_timed(factor, error):
    done = run(
        "-c",
        SMALL + "case = group_advantage.CASES[0]\n"
        f"wrong = Provider(lambda rewards: (group_advantage.ours(rewards)[0] * ({factor}),))\n"
        "case = dataclasses.replace(case, providers={**case.providers, 'ours': wrong})\n"
        "run(case, cpu, rounds=1, console=console)",
    )
    assert f"ours errs by {error}" in done.stderr and "median" not in done.stdout


def test_a_peer_that_cannot_run_is_named_and_not_forgotten():
    done = run(
        "-c",
        SMALL + "from bench import peers_linear_logprob as peers\n"
        "peers.installed = {'liger-kernel': '0.7.0'}.get\n"
        "case = cases.case('frozen', 64, 32, 512, torch.float32, ('cpu',))\n"
        "out = {n: case.providers[n] for n in ('ours', 'pytorch', 'trl', 'liger', 'cce')}\n"
        "lines = run(dataclasses.replace(case, providers=out), cpu, rounds=1, console=console)\n"
        "assert [line['provider'] for line in lines] == ['ours', 'pytorch']",
    )
    assert done.returncode == 0, done.stderr
    for reason in (
        "trl is out: trl is not installed; pip install trl==1.16.0",
        "liger is out: liger-kernel 0.7.0 is installed, but its call here follows 0.8.5",
        "cce is out: cut-cross-entropy needs CUDA",
    ):
        assert reason in done.stdout


def test_a_peer_that_raises_or_computes_something_else_is_named_and_left_out():
    done = run(
        "-c",
        SMALL + "def broken(given):\n"
        "    raise RuntimeError('no tile [8]\\nand much more')\n"
        "negative = Provider(lambda given: tuple(-value for value in cases.ours(given)))\n"
        "case = small('frozen', broken=Provider(broken), negative=negative, good=Provider(cases.ours))\n"
        "lines = run(case, cpu, rounds=1, console=console)\n"
        "assert [line['provider'] for line in lines] == ['ours', 'pytorch', 'matmuls', 'good'], lines",
    )
    assert done.returncode == 0, done.stderr
    assert "broken is out: it raised RuntimeError: no tile [8]\n" in done.stdout
    assert "negative is out: it errs by 2.0e+00" in done.stdout


def test_a_floor_is_timed_and_unchecked_and_every_line_knows_its_share_of_the_roofline():
    done = run("-c", SMALL + "print('JSON' + json.dumps(run(small('frozen'), cpu, rounds=3, console=console)))")
    assert done.returncode == 0, done.stderr
    lines = {line["provider"]: line for line in json.loads(done.stdout.partition("JSON")[2])}
    assert lines["matmuls"]["error"] is None and lines["matmuls"]["seconds"] > 0
    assert lines["ours"]["error"] < 1e-5
    for line in lines.values():
        assert 0 < line["roofline_percent"] < 150 and line["peak_bytes"] > 0
        assert line["flops"] == 4 * 512 * 64 * 2048 and set(line["ceilings"]["matmul"]) == {"float32"}


def test_ceilings_are_positive_and_measured_once():
    done = run(
        "-c",
        SMALL + "measured = []\n"
        "clock = ceilings.clock\n"
        "ceilings.clock = lambda device: measured.append(device) or clock(device)\n"
        "first, again = (ceilings.ceilings(small('frozen'), cpu) for _ in range(2))\n"
        "assert first == again and len(measured) == 2, measured  # the copy and the product\n"
        "assert first.bandwidth > 1e6 and min(first.matmul.values()) > 1e6\n"
        "assert not ceilings.ceilings(group_advantage.CASES[0], cpu).matmul  # no FLOPs declared",
    )
    assert done.returncode == 0, done.stderr


def test_every_kind_of_case_has_a_truth_that_ours_and_pytorch_meet():
    done = run(
        "-c",
        SMALL + "made = [small(kind) for kind in cases.KINDS]\n"
        "made += [small(kind, case=linear_logprob_losses.case) for kind in ('grpo', 'sum')]\n"
        "made += [logprobs_from_logits.case(512, 2048, torch.float32, ('cpu',))]\n"
        "for case in made:\n"
        "    case = dataclasses.replace(case, providers={n: p for n, p in case.providers.items() if n != 'compile'})\n"
        "    found = verified(case, case.inputs(cpu), cpu, console)\n"
        "    assert found['pytorch'] < 1e-5, (case.name, found)\n"
        "    assert found['ours'] < (1e-2 if 'tolerance' in case.name else 1e-5), (case.name, found)\n"
        "print(len(made))",
    )
    assert done.returncode == 0 and done.stdout.strip() == "8", done.stderr


def test_what_a_case_allows_is_allowed_and_no_more():
    """grad_tolerance's bound, on the row's 2-norm."""
    done = run(
        "-c",
        SMALL + "case = small('tolerance')\n"
        "given = case.inputs(cpu)\n"
        "truth, plain = case.truth(given), case.providers['pytorch'].run(given)\n"
        "logprobs, grad = cases.ours(given)\n"
        "most = cases.tolerated(given)[1][:, None].float()\n"
        "aside = torch.nn.functional.normalize(torch.randn(512, 64), dim=1) * most\n"
        "check.check(case, given, (logprobs, grad + 0.99 * aside), plain, truth)\n"
        "print('within')\n"
        "check.check(case, given, (logprobs, grad + 1.01 * aside), plain, truth)",
    )
    assert done.stdout == "within\n", done.stderr
    assert "ours errs by" in done.stderr and "in output 1" in done.stderr


@pytest.mark.parametrize(("n", "h", "v"), [(103, 64, 8192), (60, 512, 20000), (40, 64, 32768)])
def test_a_peaked_policys_rows_need_few_entries_in_the_promised_shares(n, h, v):
    hidden, weight, targets = peaked_policy(n, h, v, seed=n)
    probs = (hidden.double() @ weight.double().T).softmax(1)
    needed = (probs.sort(descending=True).values.cumsum(1) < 1 - TAU).sum(1) + 1
    sparse, dense = needed <= SPARSE, needed > MIDDLE
    assert sparse.sum() == n - 2 * (n // 10) and dense.sum() == n // 10
    assert dense.int().argmax() > 0 and not sparse[: sparse.sum()].all(), "the kinds are mixed"
    chosen = probs.gather(1, targets[:, None]).squeeze(1)
    assert chosen[sparse].median() > 0.01 and ((targets >= 0) & (targets < v)).all()
    again = peaked_policy(n, h, v, seed=n)
    assert all(torch.equal(a, b) for a, b in zip((hidden, weight, targets), again, strict=True))


def test_a_peaked_policy_keeps_its_shares_in_bf16_and_refuses_what_it_cannot_shape():
    hidden, weight, _ = peaked_policy(100, 64, 8192, dtype=torch.bfloat16)
    mass = (hidden.double() @ weight.double().T).softmax(1).topk(SPARSE).values.sum(1)
    assert hidden.dtype == weight.dtype == torch.bfloat16 and (mass >= 1 - TAU).sum() == 80
    with pytest.raises(ValueError, match="h must be at least 64 and v within 2048 .. 262144, got h = 64, v = 1000"):
        peaked_policy(10, 64, 1000)


def test_tuning_keeps_the_fastest_parameters_of_each_vocabulary_and_needs_a_gpu():
    from bench import tune
    from r1v2_fast.kernels import _launch

    def clock(parameters, V):  # the fastest block grows with the vocabulary
        return abs(parameters["BLOCK"] - V // 16) + parameters["num_warps"] / 100 + parameters["STAGES"] / 1000

    rows = tune.tuned(clock, (16384, 131072))
    assert [(row["V"], row["BLOCK"], row["STAGES"]) for row in rows] == [(16384, 1024, 1), (131072, 8192, 1)]
    assert set(rows[0]) == {"V", *_launch.DEFAULT} and _launch.DEFAULT in tune.CANDIDATES
    if not torch.cuda.is_available():
        done = run("-m", "bench", "tune")
        assert done.returncode == 1 and "there is none" in done.stdout
