"""Two result files side by side: the ratio of medians for each case and provider that both hold."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.record import read
from bench.run import mebibytes, percent, three

Key = tuple[str, str, str, str, str]


def latest(path: Path) -> dict[Key, dict]:
    """The last line of each case and provider."""
    return {_key(line): line for line in read(path)}


def show(before: Path, after: Path, console: Console) -> None:
    old, new = latest(before), latest(after)
    both = [key for key in new if key in old]
    if not both:
        raise ValueError(f"{before} and {after} share no case")
    console.print(f"{before.name} -> {after.name}", markup=False)
    for (stem, case, shape, device), keys in groupby(both, key=lambda key: key[:4]):
        out = Table(title=f"{stem}: {case}\n{shape} on {device}", title_justify="left", title_style="bold")
        for heading in ("provider", "before", "after", "after / before", "roofline, after", "peak before", "after"):
            out.add_column(heading, justify="left" if heading == "provider" else "right")
        for key in keys:
            was, now = old[key], new[key]
            times = f"{three(was['seconds'] * 1e3)} ms", f"{three(now['seconds'] * 1e3)} ms"
            ratio = f"{now['seconds'] / was['seconds']:.2f}"
            out.add_row(key[-1], *times, ratio, percent(now), mebibytes(was), mebibytes(now))
        console.print(out)
    machines = {line["environment"]["machine"] for lines in (old, new) for line in lines.values()}
    if len(machines) > 1:
        console.print(f"the two ran on different machines: {', '.join(sorted(machines))}")


def _key(line: dict) -> Key:
    shape = " ".join(f"{name}={size}" for name, size in line["shape"].items())
    return line["stem"], line["case"], f"{shape} {line['dtype']}", line["device"], line["provider"]
