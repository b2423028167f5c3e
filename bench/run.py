"""Runs cases: correctness first, then interleaved timing, then a table and JSON lines."""

from __future__ import annotations

import importlib
import pkgutil
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from bench import cases as cases_package
from bench.case import Case, Outputs
from bench.record import environment
from bench.timing import Timing, interleaved


def all_cases() -> list[Case]:
    modules = sorted(module.name for module in pkgutil.iter_modules(cases_package.__path__))
    return [case for name in modules for case in importlib.import_module(f"bench.cases.{name}").CASES]


def run(case: Case, device: torch.device, *, rounds: int, console: Console) -> list[dict]:
    """Lines for every provider that runs and is right; raises AssertionError where `ours` is wrong."""
    inputs = case.inputs(device)
    runnable = {}
    for name, provider in case.providers.items():
        if (reason := provider.why_not(device.type)) is None:
            runnable[name] = provider
        else:
            console.print(f"  {name} is out: {reason}")
    errors = check(case, inputs, {name: provider.run(inputs) for name, provider in runnable.items()})
    functions = {name: partial(provider.run, inputs) for name, provider in runnable.items()}
    timings = interleaved(functions, device=device, rounds=rounds)
    console.print(table(case, timings, errors))
    shared: dict = {
        "stem": case.stem,
        "case": case.name,
        "shape": case.shape,
        "dtype": case.dtype,
        "device": device.type,
    }
    shared |= {"flops": case.flops, "bytes": case.bytes, "environment": environment(device)}
    return [
        {**shared, "provider": name, "seconds": t.median, "low": t.low, "high": t.high, "rounds": t.rounds, "error": errors[name]}
        for name, t in timings.items()
    ]  # fmt: skip


def check(case: Case, inputs, outputs: dict[str, Outputs]) -> dict[str, float]:
    """The largest error of each provider relative to the truth's largest value; the relative rule for ours."""
    truth = case.truth(inputs)
    errors = {name: _error(values, truth) for name, values in outputs.items()}
    ulp = torch.finfo(outputs["ours"][0].dtype).eps
    allowed = 1.5 * errors["pytorch"] + ulp
    assert errors["ours"] <= allowed, f"{case.name}: ours errs by {errors['ours']:.2e}, allowed {allowed:.2e}"
    return errors


def _error(values: Outputs, truth: Outputs) -> float:
    worst = 0.0
    for value, exact in zip(values, truth, strict=True):
        scale = exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        worst = max(worst, ((value.double() - exact).abs().max() / scale).item())
    return worst


def table(case: Case, timings: dict[str, Timing], errors: dict[str, float]) -> Table:
    shape = " ".join(f"{name}={size}" for name, size in case.shape.items())
    out = Table(title=f"{case.stem}: {case.name}\n{shape} {case.dtype}", title_justify="left", title_style="bold")
    for heading in ("provider", "median", "spread", "against ours", "error"):
        out.add_column(heading, justify="left" if heading == "provider" else "right")
    ours = timings["ours"].median
    for name, t in timings.items():
        spread = f"{t.low * 1e3:.3g} .. {t.high * 1e3:.3g}"
        out.add_row(name, f"{t.median * 1e3:.3g} ms", spread, f"{t.median / ours:.2f} x", f"{errors[name]:.1e}")
    return out
