"""Launch parameters of the row kernels and which is faster, measured on this GPU, where `kernels/_launch.py` looks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.console import Console
from triton.runtime.errors import OutOfResources

from bench.timing import interleaved
from r1v2_fast.kernels import _launch
from r1v2_fast.kernels import linear_logprob as kernel
from r1v2_fast.ops import _linear_logprob_native as native

STEM = "linear_logprob"
VOCABULARIES = (32000, 64000, 128256, 152064, 262144)
TILE_BYTES = 1 << 30  # of fp32 logits: a chunk of linear_logprobs
CANDIDATES = tuple(
    {"BLOCK": block, "num_warps": warps, "STAGES": stages}
    for block, warps, stages in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16), (1, 2, 3, 4))
    if 4 <= block // (32 * warps) <= 32  # elements a thread: fewer load narrowly, more spill
)
Clock = Callable[[dict[str, int], int], float]
RowPass = Callable[..., None]  # of head, targets, raw, D and the outputs asked for


def _median(run: RowPass, V: int) -> float:
    """Seconds of the pass that `linear_logprobs` makes most: bf16, with a gradient."""
    rows = max(1, TILE_BYTES // (4 * V))
    logits, matrix = torch.randn(rows, V, device="cuda"), torch.empty(rows, V, device="cuda", dtype=torch.bfloat16)
    targets, raw = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.empty(10, rows, device="cuda")
    head = kernel.head_arguments(logits, None, None, 1.0, 1.0, None)
    passes = {"rows": lambda: run(head, targets, raw, matrix, ())}
    return interleaved(passes, device=torch.device("cuda"), rounds=9)["rows"].median


def seconds(parameters: dict[str, int], V: int) -> float:
    """Of Triton's row kernel."""
    try:
        return _median(partial(kernel.launch, parameters=parameters), V)
    except OutOfResources:  # more shared memory than this card has
        return float("inf")


def cluster_seconds(V: int) -> float:
    """Of `_C`'s, infinite where it does not run."""
    here = torch.empty(0, device="cuda")
    if native.why_not("cuda") is not None or native.lacks(here, V) is not None:
        return float("inf")
    return _median(partial(native.launch, own=True), V)


def tuned(
    clock: Clock = seconds,
    vocabularies: tuple[int, ...] = VOCABULARIES,
    cluster: Callable[[int], float] = lambda V: float("inf"),
) -> list[dict[str, Any]]:
    """The fastest candidate for each vocabulary size, with "rows": "cuda" where `cluster` beats it, as the file has them."""
    rows: list[dict[str, Any]] = []
    for V in vocabularies:
        best = min(CANDIDATES, key=lambda c: clock(dict(c), V))
        rows.append({"V": V, **best} | ({"rows": "cuda"} if cluster(V) < clock(dict(best), V) else {}))
    return rows


def show(console: Console) -> int:
    if not torch.cuda.is_available():
        console.print("tune measures kernels on a CUDA device, and there is none")
        return 1
    rows = tuned(cluster=cluster_seconds)
    path = _launch.path(STEM, torch.cuda.get_device_name())
    path.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    for row in rows:
        V = row["V"]
        both = {"triton": seconds({key: row[key] for key in CANDIDATES[0]}, V), "cluster": cluster_seconds(V)}
        speeds = ", ".join(f"{name} {6 * (TILE_BYTES // 4) / taken / 1e12:.2f} TB/s" for name, taken in both.items())
        console.print(f"{row}: {speeds} of 6 bytes a logit")
    console.print(f"written to {path}")
    return 0
