"""The contract of linear_logprobs, counted: FLOPs against 2NHV, and peak memory against the N x V logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

from r1v2_fast.ops import linear_logprobs
from r1v2_fast.testing.flops import matmul_flops
from r1v2_fast.testing.memory import peak_bytes

N, H, V = 1024, 512, 32768


def cases() -> list[tuple[str, float, Callable[[], object]]]:
    """(name, FLOPs promised in units of NHV, function)."""
    hidden, weight = torch.randn(N, H), torch.randn(V, H) / H**0.5
    targets = torch.randint(0, V, (N,))

    def step(trains_head: bool = False, **options):
        def run():
            h, w = hidden.clone().requires_grad_(), weight.detach().requires_grad_(trains_head)
            out = linear_logprobs(h, w, targets, **options)
            loss = out.logprobs.sum() if out.entropy is None else out.logprobs.sum() + out.entropy.sum()
            loss.backward()

        return run

    half = torch.arange(N) % 2 == 0
    return [
        ("no gradient", 2, lambda: linear_logprobs(hidden, weight, targets)),
        ("frozen head", 4, step()),
        ("frozen head, needs_grad on half", 3, step(needs_grad=half)),
        ("frozen head, entropy gradient", 6, step(outputs=("entropy",), entropy_grad=True)),
        ("trainable head, every row kept", 6, step(trains_head=True)),
        ("trainable head, 16 rows kept in 4 MiB", 8 - 2 * 16 / N, step(trains_head=True, workspace_bytes=4 << 20)),
    ]


def show(console: Console) -> bool:
    """Print the table; True where every count lies within 1 % of its promise and no peak reaches N x V uninvited."""
    out = Table(title=f"linear_logprobs, counted at N={N} H={H} V={V} fp32", title_justify="left", title_style="bold")
    for heading in ("case", "promised", "counted", "peak", "N x V logits"):
        out.add_column(heading, justify="left" if heading == "case" else "right")
    kept, holds = True, 4 * N * V
    for name, promised, function in cases():
        function()
        counted, peak = matmul_flops(function) / (N * H * V), peak_bytes(function)
        fits = abs(counted - promised) <= 0.01 * promised and (peak < holds or "every row kept" in name)
        kept &= fits
        flag = "" if fits else "  BROKEN"
        out.add_row(
            name,
            f"{promised:.3f} NHV",
            f"{counted:.3f} NHV{flag}",
            f"{peak / 2**20:.0f} MiB",
            f"{holds / 2**20:.0f} MiB",
        )
    console.print(out)
    return kept
