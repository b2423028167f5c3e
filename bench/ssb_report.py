"""Tables of the SSB study: differences are paired by seed, mean and standard error of the mean."""

from __future__ import annotations

import itertools
import math
import statistics
from pathlib import Path

from rich.console import Console
from rich.table import Table

GROUP_SIZE = 8  # of recipes/digits-ssb.yaml


def show(lines: list[dict], console: Console) -> None:
    runs = {(line["arm"], line["prompts"], line["seed"]): line for line in lines}
    console.print(_mechanism(lines))
    console.print(_effect(runs))
    for prompts in worse(lines):
        console.print(
            f"[red]the shipped default is worse than plain by more than 2 standard errors at {prompts} prompts"
        )


def plot(lines: list[dict], path: Path) -> None:
    """Accuracy over responses sampled, a panel for each batch size: means over seeds, and their standard error."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sizes = sorted({line["prompts"] for line in lines})
    figure, panels = plt.subplots(1, len(sizes), figsize=(11, 3.4), dpi=110, sharey=True, layout="constrained")
    for axes, prompts in zip(panels, sizes, strict=True):
        for arm, colour, name in (("plain", "#5a6473", "plain GRPO"), ("buffer", "#2457a6", "with the buffer")):
            curves = [line["curve"] for line in lines if (line["arm"], line["prompts"]) == (arm, prompts)]
            points = [mean_and_error([a for _, _, a in at]) for at in zip(*curves, strict=True)]
            x = [step * prompts * GROUP_SIZE / 1000 for step, _, _ in curves[0]]
            y, e = [100 * mean for mean, _ in points], [100 * error for _, error in points]
            axes.plot(x, y, color=colour, lw=1.8, label=name)
            low, high = ([a + sign * b for a, b in zip(y, e, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=colour, alpha=0.18, lw=0)
        axes.set_title(f"{prompts} prompts a step", fontsize=10)
        axes.set_xlabel("thousand responses sampled")
        axes.grid(axis="y", color="#e3e7ee", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("right at low contrast, %")
    panels[0].legend(frameon=False, loc="lower right")
    figure.savefig(path)
    plt.close(figure)


def worse(lines: list[dict]) -> list[int]:
    """Batch sizes at which the shipped default ends below plain GRPO by more than 2 standard errors."""
    runs = {(line["arm"], line["prompts"], line["seed"]): line for line in lines}
    found = []
    for prompts in sorted({line["prompts"] for line in lines}):
        mean, error = mean_and_error(compared(runs, "buffer", prompts)["rollouts"])
        if mean < -2 * error:
            found.append(prompts)
    return found


def at_updates(curve: list[list[float]], updates: float) -> float:
    """Accuracy after so many optimizer steps, between evaluations on a straight line."""
    for (_, u0, a0), (_, u1, a1) in itertools.pairwise(curve):
        if u0 <= updates <= u1:
            return a1 if u1 == u0 else a0 + (a1 - a0) * (updates - u0) / (u1 - u0)
    return curve[-1][2]


def rollouts_to(curve: list[list[float]], accuracy: float, prompts: int) -> float:
    """Responses sampled until an evaluation first reaches `accuracy`; nan if none does."""
    return next((step * prompts * GROUP_SIZE for step, _, a in curve if a >= accuracy), math.nan)


def mean_and_error(values: list[float]) -> tuple[float, float]:
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def compared(runs: dict, arm: str, prompts: int) -> dict[str, list[float]]:
    """Of the seeds that both `arm` and plain have: accuracies, and what they differ by."""
    found: dict[str, list[float]] = {k: [] for k in ("plain", "arm", "rollouts", "updates", "plain_to", "arm_to")}
    for (name, p, seed), run in sorted(runs.items()):
        if (name, p) != (arm, prompts) or ("plain", prompts, seed) not in runs:
            continue
        plain = runs["plain", prompts, seed]
        both = min(plain["updates"], run["updates"])
        found["plain"].append(plain["final"])
        found["arm"].append(run["final"])
        found["rollouts"].append(run["final"] - plain["final"])
        found["updates"].append(at_updates(run["curve"], both) - at_updates(plain["curve"], both))
        wanted = 0.95 * plain["final"]
        found["plain_to"].append(rollouts_to(plain["curve"], wanted, prompts))
        found["arm_to"].append(rollouts_to(run["curve"], wanted, prompts))
    return found


def _effect(runs: dict) -> Table:
    table = Table(
        "arm", "prompts", "seeds", "plain", "arm", "at equal rollouts", "at equal updates", "to 95 %: plain", "saved",
        title="accuracy at low contrast, and thousand responses to 95 % of plain's; differences paired by seed",
    )  # fmt: skip
    for arm, prompts in sorted({(a, p) for a, p, _ in runs if a != "plain"}, key=lambda k: (k[0] != "buffer", *k)):
        found = compared(runs, arm, prompts)
        saved = [(p - a) / 1000 for p, a in zip(found["plain_to"], found["arm_to"], strict=True) if not math.isnan(a)]
        never = len(found["arm"]) - len(saved)
        mean, error = mean_and_error(saved)
        table.add_row(
            arm,
            str(prompts),
            str(len(found["arm"])),
            _percent(found["plain"]),
            _percent(found["arm"]),
            _points(found["rollouts"]),
            _points(found["updates"]),
            f"{mean_and_error(found['plain_to'])[0] / 1000:.1f}",
            f"{mean:+.1f} ± {error:.1f}" + (f" ({never} never)" if never else ""),
        )
    return table


def _mechanism(lines: list[dict]) -> Table:
    table = Table("arm", "prompts", "share without", "share with", "staleness", "replayed tokens", "steps that differ",
                  title="the buffer's own numbers, mean over steps and seeds, and the simulation's")  # fmt: skip
    for arm, prompts in sorted({(line["arm"], line["prompts"]) for line in lines if line["mechanism"]}):
        own = [ln["mechanism"] for ln in lines if (ln["arm"], ln["prompts"]) == (arm, prompts) and ln["mechanism"]]
        table.add_row(
            arm, str(prompts), *(f"{statistics.fmean(m[k] for m in own):.2f}" for k in ("share_without", "share", "staleness")),
            f"{statistics.fmean(m['replayed_tokens'] for m in own):,.0f}",
            f"{sum(m['differing'] for m in own)} of {sum(m['steps'] for m in own)}",
        )  # fmt: skip
    return table


def _percent(values: list[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{100 * mean:.1f} ± {100 * error:.1f} %"


def _points(values: list[float]) -> str:
    mean, error = mean_and_error(values)
    return f"{100 * mean:+.1f} ± {100 * error:.1f}"
