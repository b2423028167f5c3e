"""Launch parameters of the row kernel, measured on this GPU and written where `kernels/_launch.py` looks for them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import torch
from rich.console import Console
from triton.runtime.errors import OutOfResources

from bench.timing import interleaved
from r1v2_fast.kernels import _launch
from r1v2_fast.kernels import linear_logprob as kernel

STEM = "linear_logprob"
VOCABULARIES = (32000, 64000, 128256, 152064, 262144)
TILE_BYTES = 1 << 30  # of fp32 logits: a chunk of linear_logprobs
CANDIDATES = tuple(
    {"BLOCK": block, "num_warps": warps, "STAGES": stages}
    for block, warps, stages in itertools.product((1024, 2048, 4096, 8192), (4, 8, 16), (1, 2, 3, 4))
    if 4 <= block // (32 * warps) <= 32  # elements a thread: fewer load narrowly, more spill
)
Clock = Callable[[dict[str, int], int], float]


def seconds(parameters: dict[str, int], V: int) -> float:
    """Median of the pass that `linear_logprobs` makes most: bf16, with a gradient."""
    rows = max(1, TILE_BYTES // (4 * V))
    logits, matrix = torch.randn(rows, V, device="cuda"), torch.empty(rows, V, device="cuda", dtype=torch.bfloat16)
    targets, raw = torch.zeros(rows, dtype=torch.int64, device="cuda"), torch.empty(10, rows, device="cuda")
    head = kernel.head_arguments(logits, None, None, 1.0, 1.0, None)

    def run() -> None:
        kernel.launch(head, targets, raw, matrix, (), parameters=parameters)

    try:
        return interleaved({"rows": run}, device=torch.device("cuda"), rounds=9)["rows"].median
    except OutOfResources:  # more shared memory than this card has
        return float("inf")


def tuned(clock: Clock = seconds, vocabularies: tuple[int, ...] = VOCABULARIES) -> list[dict[str, int]]:
    """The fastest candidate for each vocabulary size, as the JSON file lists them."""
    return [{"V": V, **min(CANDIDATES, key=lambda c: clock(dict(c), V))} for V in vocabularies]


def show(console: Console) -> int:
    if not torch.cuda.is_available():
        console.print("tune measures kernels on a CUDA device, and there is none")
        return 1
    rows = tuned()
    path = _launch.path(STEM, torch.cuda.get_device_name())
    path.write_text("[\n" + ",\n".join(" " + json.dumps(row) for row in rows) + "\n]\n", encoding="utf-8")
    for row in rows:
        bandwidth = 6 * (TILE_BYTES // 4) / seconds({k: v for k, v in row.items() if k != "V"}, row["V"])
        console.print(f"V={row['V']}: {row}, {bandwidth / 1e12:.2f} TB/s of 6 bytes a logit")
    console.print(f"written to {path}")
    return 0
