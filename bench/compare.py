"""Two result files side by side: the ratio of medians for each case and provider that both hold."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.record import read

Key = tuple[str, str, str, str]


def latest(path: Path) -> dict[Key, dict]:
    """The last line of each case and provider."""
    return {(line["stem"], line["case"], line["device"], line["provider"]): line for line in read(path)}


def show(before: Path, after: Path, console: Console) -> None:
    old, new = latest(before), latest(after)
    both = [key for key in new if key in old]
    if not both:
        raise ValueError(f"{before} and {after} share no case")
    out = Table(title=f"{before.name} -> {after.name}", title_justify="left")
    for heading in ("op", "case", "device", "provider", "before", "after", "after / before"):
        out.add_column(heading)
    for key in both:
        was, now = old[key]["seconds"], new[key]["seconds"]
        out.add_row(*key, f"{was * 1e3:.3g} ms", f"{now * 1e3:.3g} ms", f"{now / was:.2f}")
    machines = {line["environment"]["machine"] for lines in (old, new) for line in lines.values()}
    console.print(out)
    if len(machines) > 1:
        console.print(f"the two ran on different machines: {', '.join(sorted(machines))}")
