"""r1v2-fast filter: rollout and rule ahead of training, to begin with prompts that the policy sometimes gets right.

R1V2's offline use of the Selective Sample Buffer: a prompt answered always or never has no advantage in its group.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from r1v2_fast import log
from r1v2_fast.atomic import digest
from r1v2_fast.commands import pool
from r1v2_fast.commands.model import check_at_least, open_model
from r1v2_fast.data.records import Dataset, Record
from r1v2_fast.judge.panel import arguments_of
from r1v2_fast.judge.reward import load_reward
from r1v2_fast.judge.reward import score as judge
from r1v2_fast.rollout.engine import Engine
from r1v2_fast.rollout.generation import LocalEngine
from r1v2_fast.train.context import Corpus, Reader, seed_of

COLUMNS = ("pass_rate", "pass_count", "responses")
BINS = 5  # of the summary, between never and always


@dataclass(frozen=True)
class Sampling:
    group_size: int
    temperature: float
    max_new_tokens: int
    batch_size: int
    """Prompts of one rollout."""
    seed: int

    def __post_init__(self) -> None:
        check_at_least(1, group_size=self.group_size, max_new_tokens=self.max_new_tokens, batch_size=self.batch_size)
        check_at_least(0, temperature=self.temperature)
        if self.temperature == 0:
            raise ValueError(f"--temperature must be above 0, or a group repeats one response, got {self.temperature}")

    def seeds(self, records: list[Record]) -> list[int]:
        """A pure function of (seed, id): going on after a kill restores no state, in batches of any size."""
        return [seed_of(self.seed, f"filter/{record.id}", 0) for record in records]


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
    max_tiles: int | None,
    overwrite: bool,
    score: str,
    time_limit: float,
    on_nan: Literal["stop", "skip"],
    device: str,
    **sampled: Any,
) -> str:
    """Write records of `data` to `out` with pass_rate, pass_count and responses (those scored); returns a summary.

    Killed and started again it goes on from `out`.progress.jsonl, and ends as if it had never been stopped.

    records    the first so many
    low, high  pass rates kept, the bounds among them; None is above 0, and below 1
    score, time_limit, on_nan  the rule, right at 1 or more, and as `judge.reward.score` takes them; 0 seconds are none
    sampled    the fields of `Sampling`
    """
    sampling, path, target = Sampling(**sampled), Path(data), Path(out)
    if keep_all and (low, high) != (None, None):
        raise ValueError(f"expected --keep-all or bounds, got --keep-all with --low {low} and --high {high}")
    if low is not None and high is not None and not low <= high:
        raise ValueError(f"--low must be at most --high, got --low {low} and --high {high}")
    check_at_least(1, records=records, max_tiles=max_tiles)
    check_at_least(0, time_limit=time_limit)
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists; add --overwrite or name another file")
    corpus = Corpus(path.parent, root=root, allow_outside=allow_outside)
    dataset = corpus.dataset(path.name)
    chosen = dataset.records[:records]
    _check_columns(dataset)
    pool.check(target, dataset, chosen)
    rule = functools.partial(judge, score, load_reward(score), time_limit=time_limit or None, on_nan=on_nan)
    policy, reader = open_model(model, corpus, device, max_tiles=max_tiles)
    engine = LocalEngine(policy)

    given = {
        "model": str(Path(model).resolve()),
        "model_time": max(file.stat().st_mtime for file in Path(model).iterdir()),
        "data": str(path.resolve()),
        "data_digest": digest(path),
        "root": str(dataset.root.resolve()),
        "max_tiles": reader.pixels.max_tiles,
        "records": len(chosen),
        "device": str(policy.internvl.device),
        "score": score,
        "score_digest": digest(Path(score.rpartition(":")[0])) if ".py:" in score else None,
        **asdict(sampling),
    }
    progress = target.with_name(target.name + ".progress.jsonl")
    target.parent.mkdir(parents=True, exist_ok=True)
    counts = _resume(progress, given)
    batches = [chosen[start : start + sampling.batch_size] for start in range(0, len(chosen), sampling.batch_size)]
    shown = TextColumn("filter"), BarColumn(bar_width=30), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*shown, console=Console(stderr=True)) as bar:
        task = bar.add_task("filter", total=len(chosen), completed=sum(map(len, batches[: len(counts)])))
        for batch in batches[len(counts) :]:
            counts.append(_count(engine, reader, dataset, batch, sampling, rule))
            _append(progress, counts[-1])
            bar.advance(task, len(batch))

    right, scored = ([n for line in counts for n in line[name]] for name in ("right", "scored"))
    rates = [r / n if n else None for r, n in zip(right, scored, strict=True)]
    kept = [i for i, rate in enumerate(rates) if keep_all or _keeps(rate, low, high)]
    cut = sum(line["cut"] for line in counts) / (len(chosen) * sampling.group_size)
    summary = f"{_histogram(rates)}\n{cut:.1%} of the responses were cut at {sampling.max_new_tokens} tokens"
    if not kept:
        raise ValueError(
            f"no record kept\n{summary}\n{progress} holds the counts: "
            "start again with other --low and --high, or with --keep-all"
        )
    columns = {name: [column[i] for i in kept] for name, column in zip(COLUMNS, (rates, right, scored), strict=True)}
    pool.write(target, dataset, [chosen[i] for i in kept], columns)
    progress.unlink()
    return f"{summary}\nkept {len(kept)} of {len(chosen)} records in {target}"


def _check_columns(dataset: Dataset) -> None:
    """A filtered pool may be filtered again, which replaces its columns; a user's own must not be lost."""
    taken = [name for name in COLUMNS if any(name in record.columns for record in dataset.records)]
    if taken and len(taken) < len(COLUMNS):
        raise ValueError(f"{dataset.path}: its column {taken[0]!r} would be overwritten by filter's own: rename it")


def _resume(progress: Path, given: dict[str, Any]) -> list[dict]:
    """The counts of the batches done; raises ValueError where they were made with other arguments."""
    begun, *counts = (log.read(progress) if progress.is_file() else []) or [given]
    differs = [f"{name} {begun.get(name)!r}, got {given[name]!r}" for name in given if begun.get(name) != given[name]]
    if counts and differs:
        raise ValueError(f"{progress} was begun with {'; '.join(differs)}; go on with the same, or remove it")
    with pool.whole(progress) as partial:  # less the line that a kill cut short
        partial.write_text("".join(json.dumps(line) + "\n" for line in [given, *counts]), encoding="utf-8")
    return counts


def _append(progress: Path, counts: dict[str, Any]) -> None:
    try:
        with progress.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(counts) + "\n")
    except OSError as error:
        raise RuntimeError(f"cannot write {progress}: {error}; make room and start again to go on") from error


def _count(
    engine: Engine,
    reader: Reader,
    dataset: Dataset,
    batch: list[Record],
    sampling: Sampling,
    rule: Callable[..., list[float]],
) -> dict[str, Any]:
    """Of every record of a batch: the responses that are right, and those that could be scored; and how many were cut."""
    size = sampling.group_size
    responses = engine.generate(
        reader.prompts(dataset, batch),
        group_size=size,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seeds=sampling.seeds(batch),
    )
    each = [record for record in batch for _ in range(size)]
    arguments = arguments_of(each, [reader.encoder.decode(response.ids) for response in responses])
    scores = rule(*arguments, [record.where for record in each])
    groups = [scores[start : start + size] for start in range(0, len(scores), size)]
    return {
        "right": [sum(value >= 1 for value in group) for group in groups],
        "scored": [sum(not math.isnan(value) for value in group) for group in groups],
        "cut": sum(not response.finished for response in responses),
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
