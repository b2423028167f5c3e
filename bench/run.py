"""Runs cases: correctness first, then interleaved timing and memory, then a table and JSON lines."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from bench import cases as cases_package
from bench.case import Case
from bench.ceilings import Ceilings, ceilings, roofline_percent
from bench.check import FOREIGN, check, errors
from bench.record import environment
from bench.timing import interleaved
from r1v2_fast.testing.memory import peak_bytes


def all_cases() -> list[Case]:
    modules = sorted(module.name for module in pkgutil.iter_modules(cases_package.__path__))
    return [case for name in modules for case in importlib.import_module(f"bench.cases.{name}").CASES]


def run(case: Case, device: torch.device, *, rounds: int, console: Console) -> list[dict]:
    """Lines for every provider that runs and is right; raises AssertionError where `ours` is wrong."""
    inputs = case.inputs(device)
    found = verified(case, inputs, device, console)
    functions = {name: partial(case.providers[name].run, inputs) for name in found}
    timings = interleaved(functions, device=device, rounds=rounds)
    peaks = {name: peak_bytes(function) for name, function in functions.items()}
    launched = {name: _launches(function, device) for name, function in functions.items()}
    ceiling = ceilings(case, device)
    shared: dict = {
        "stem": case.stem,
        "case": case.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "device": device.type,
        "flops": case.flops,
        "bytes": case.bytes,
        "ceilings": ceiling._asdict(),
        "environment": environment(device),
    }
    lines = [
        {**shared, "provider": name, "seconds": t.median, "low": t.low, "high": t.high, "rounds": t.rounds,
         "roofline_percent": roofline_percent(case, t.median, ceiling), "peak_bytes": peaks[name],
         "launches": launched[name], "error": found[name]}
        for name, t in timings.items()
    ]  # fmt: skip
    console.print(table(case, lines, ceiling))
    return lines


def _launches(function: Callable[[], object], device: torch.device) -> int | None:
    """Kernels a call starts on a GPU."""
    if device.type != "cuda":
        return None
    from r1v2_fast.testing.launches import kernels_launched  # triton exists where a GPU does

    return kernels_launched(function)


def verified(case: Case, inputs, device: torch.device, console: Console) -> dict[str, float | None]:
    """The providers to time, each with its largest error; a floor has none. A peer that fails is named and left out."""
    truth = case.truth(inputs)
    known = {name: case.providers[name].run(inputs) for name in ("pytorch", "ours")}
    check(case, inputs, known["ours"], known["pytorch"], truth)
    found: dict[str, float | None] = {}
    for name, provider in case.providers.items():
        reason = provider.why_not(device.type)
        try:
            outputs = known.pop(name, ()) or (provider.run(inputs) if reason is None else ())
        except Exception as raised:  # whatever a peer raises, the rest of the case goes on
            reason = f"it raised {type(raised).__name__}: {str(raised).strip().partition(chr(10))[0]}"
        if reason is None:
            found[name] = None if provider.floor else max(errors(outputs, truth))
            if (found[name] or 0) > FOREIGN:
                reason = f"it errs by {found.pop(name):.1e} of the largest value, which is another quantity"
        if reason is not None:
            console.print(f"  {name} is out: {reason}", markup=False)
    return found


def table(case: Case, lines: list[dict], ceiling: Ceilings) -> Table:
    shape = " ".join(f"{name}={size}" for name, size in case.shape.items())
    title = f"{case.stem}: {case.name}\n{shape} {case.dtype}; {described(ceiling)}"
    out = Table(title=title, title_justify="left", title_style="bold")
    on_gpu = ["launches"] if any(line["launches"] is not None for line in lines) else []
    for heading in ("provider", "median", "spread", "against ours", "roofline", *on_gpu, "peak", "error"):
        out.add_column(heading, justify="left" if heading == "provider" else "right")
    ours = next(line["seconds"] for line in lines if line["provider"] == "ours")
    for line in lines:
        out.add_row(
            line["provider"],
            f"{three(line['seconds'] * 1e3)} ms",
            f"{three(line['low'] * 1e3)} .. {three(line['high'] * 1e3)}",
            f"{line['seconds'] / ours:.2f} x",
            percent(line),
            *([str(line["launches"])] if on_gpu else []),
            mebibytes(line),
            "floor" if line["error"] is None else f"{line['error']:.1e}",
        )
    return out


def described(ceiling: Ceilings) -> str:
    rates = [f"matmul {rate / 1e12:.3g} TFLOP/s to {dtype}" for dtype, rate in ceiling.matmul.items()]
    return ", ".join([f"copy {ceiling.bandwidth / 1e9:.3g} GB/s", *rates])


def three(value: float) -> str:
    """Three digits, and all of those before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def percent(line: dict) -> str:
    return "-" if line.get("roofline_percent") is None else f"{three(line['roofline_percent'])} %"


def mebibytes(line: dict) -> str:
    return "-" if line.get("peak_bytes") is None else f"{three(line['peak_bytes'] / 2**20)} MiB"
