"""r1v2-fast filter: rollout and rule ahead of training, to begin with prompts that the policy sometimes gets right.

R1V2's offline use of the Selective Sample Buffer: a prompt answered always or never has no advantage in its group.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from r1v2_fast import log
from r1v2_fast.commands import pool
from r1v2_fast.commands.model import check_at_least, open_model
from r1v2_fast.data.records import Dataset, Record
from r1v2_fast.judge.panel import arguments_of
from r1v2_fast.judge.reward import load_reward, score
from r1v2_fast.models.policy import Policy
from r1v2_fast.train.context import Corpus, Reader
from r1v2_fast.train.rollout import rollout

COLUMNS = ("pass_rate", "pass_count", "responses")
BINS = 5  # of the summary, between never and always


@dataclass(frozen=True)
class Sampling:
    score: str
    group_size: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    """Prompts of one rollout."""
    seed: int

    def __post_init__(self) -> None:
        check_at_least(1, group_size=self.group_size, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        if not self.temperature > 0:
            raise ValueError(f"--temperature must be above 0, or a group repeats one response, got {self.temperature}")

    def generator(self, batch: int, device: torch.device) -> torch.Generator:
        """A pure function of (seed, batch): going on after a kill restores no state."""
        key = f"{self.seed}/filter/{batch}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little") >> 1
        return torch.Generator(device).manual_seed(seed)


def run(
    model: str,
    data: str,
    out: str,
    *,
    low: float | None,
    high: float | None,
    keep_all: bool,
    records: int | None,
    root: str | None,
    allow_outside: bool,
    overwrite: bool,
    device: str,
    **sampled: Any,
) -> str:
    """Write records of `data` to `out` with pass_rate, pass_count and responses (those scored); returns a summary.

    Killed and started again it goes on from `out`.progress.jsonl, and ends as if it had never been stopped.

    records    the first so many
    low, high  pass rates kept, the bounds among them; None is above 0, and below 1
    sampled    the fields of `Sampling`
    """
    sampling, path, target = Sampling(**sampled), Path(data), Path(out)
    if keep_all and (low, high) != (None, None):
        raise ValueError(f"expected --keep-all or bounds, got --keep-all with --low {low} and --high {high}")
    if records is not None:
        check_at_least(1, records=records)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; add --overwrite or name another file")
    corpus = Corpus(path.parent, root=root, allow_outside=allow_outside)
    dataset = corpus.dataset(path.name)
    chosen = dataset.records[:records]
    pool.check(target, dataset, chosen)
    load_reward(sampling.score)
    policy, reader = open_model(model, corpus, device)

    given = {
        "model": str(Path(model).resolve()),
        "model_time": max(file.stat().st_mtime for file in Path(model).iterdir()),
        "data": str(path.resolve()),
        "data_digest": hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest(),
        "root": str(dataset.root.resolve()),
        "records": len(chosen),
        "device": str(policy.internvl.device),
        **asdict(sampling),
    }
    progress = target.with_name(target.name + ".progress.jsonl")
    target.parent.mkdir(parents=True, exist_ok=True)
    counts = _resume(progress, given)
    batches = [chosen[start : start + sampling.batch_size] for start in range(0, len(chosen), sampling.batch_size)]
    shown = TextColumn("filter"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*shown, console=Console(stderr=True)) as bar, progress.open("a", encoding="utf-8") as lines:
        task = bar.add_task("filter", total=len(chosen), completed=sum(map(len, batches[: len(counts)])))
        for index, batch in enumerate(batches[len(counts) :], start=len(counts)):
            counts.append(_count(policy, reader, dataset, batch, sampling, index))
            lines.write(json.dumps(counts[-1]) + "\n")
            lines.flush()
            bar.advance(task, len(batch))

    right, scored = ([n for line in counts for n in line[name]] for name in ("right", "scored"))
    rates = [r / n if n else None for r, n in zip(right, scored, strict=True)]
    kept = [i for i, rate in enumerate(rates) if keep_all or _keeps(rate, low, high)]
    summary = _histogram(rates)
    if not kept:
        raise ValueError(
            f"no record kept\n{summary}\n{progress} holds the counts: "
            "start again with other --low and --high, or with --keep-all"
        )
    columns = {name: [column[i] for i in kept] for name, column in zip(COLUMNS, (rates, right, scored), strict=True)}
    pool.write(target, dataset, [chosen[i] for i in kept], columns)
    progress.unlink()
    return f"{summary}\nkept {len(kept)} of {len(chosen)} records in {target}"


def _resume(progress: Path, given: dict[str, Any]) -> list[dict]:
    """The counts of the batches done; raises ValueError where they were made with other arguments."""
    begun, *counts = (log.read(progress) if progress.is_file() else []) or [given]
    if differs := [
        f"{name} {begun.get(name)!r}, got {given[name]!r}" for name in given if begun.get(name) != given[name]
    ]:
        raise ValueError(f"{progress} was begun with {'; '.join(differs)}; go on with the same, or remove it")
    partial = progress.with_name(progress.name + ".partial")  # less the line that a kill cut short
    partial.write_text("".join(json.dumps(line) + "\n" for line in [given, *counts]), encoding="utf-8")
    os.replace(partial, progress)
    return counts


def _count(
    policy: Policy, reader: Reader, dataset: Dataset, batch: list[Record], sampling: Sampling, index: int
) -> dict[str, list[int]]:
    """Of every record of a batch: the responses that are right, and those that could be scored at all."""
    size = sampling.group_size
    responses = rollout(
        policy,
        reader.prompts(dataset, batch),
        group_size=size,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        generator=sampling.generator(index, policy.internvl.device),
    )
    each = [record for record in batch for _ in range(size)]
    arguments = arguments_of(each, [reader.encoder.decode(response.ids) for response in responses])
    scores = score(sampling.score, load_reward(sampling.score), *arguments, [record.where for record in each])
    groups = [scores[start : start + size] for start in range(0, len(scores), size)]
    return {
        "right": [sum(value >= 1 for value in group) for group in groups],
        "scored": [sum(not math.isnan(value) for value in group) for group in groups],
    }


def _keeps(rate: float | None, low: float | None, high: float | None) -> bool:
    if rate is None:
        return False
    return (rate > 0 if low is None else rate >= low) and (rate < 1 if high is None else rate <= high)


def _histogram(rates: list[float | None]) -> str:
    """Records by pass rate."""
    between = [f"{i / BINS:.1f} to {(i + 1) / BINS:.1f}" for i in range(BINS)]
    rows = dict.fromkeys(["never", *between, "always", "unscored"], 0)
    for rate in rates:
        if rate is None:
            rows["unscored"] += 1
        elif rate in (0, 1):
            rows["always" if rate else "never"] += 1
        else:
            rows[between[int(rate * BINS)]] += 1
    if not rows["unscored"]:
        del rows["unscored"]
    widest = max(rows.values())
    lines = [f"{name:>10} {n:7} {'█' * round(30 * n / widest)}".rstrip() for name, n in rows.items()]
    return "\n".join([" pass rate records", *lines])
