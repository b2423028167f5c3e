"""GPUs by name: vendor numbers, and what share of them the kernels reach, measured where `bench/results` has lines."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
NODE = 8  # GPUs that NVLink joins


@dataclass(frozen=True)
class GPU:
    """One GPU as its vendor describes it."""

    title: str
    flops: float
    """Dense bf16 tensor-core FLOP/s."""
    fp32_flops: float
    """fp32 FLOP/s outside the tensor cores: what model.dtype float32 runs at, TF32 off."""
    memory: float
    """Bytes: nvidia-smi's memory.total."""
    bandwidth: float
    """Bytes/s of its memory."""
    nvlink: float
    """Bytes/s in one direction, half of what the vendor names for both."""
    source: str


GPUS = {
    "a100": GPU(
        "NVIDIA A100 SXM 80 GB", 312e12, 19.5e12, 81920 * 2**20, 2.039e12, 300e9, "NVIDIA A100 datasheet, SXM 80 GB"
    ),
    "h100": GPU("NVIDIA H100 SXM", 989e12, 67e12, 81559 * 2**20, 3.35e12, 450e9, "NVIDIA H100 datasheet, SXM"),
    "h200": GPU("NVIDIA H200 SXM", 989e12, 67e12, 143771 * 2**20, 4.8e12, 450e9, "NVIDIA H200 datasheet, SXM"),
    "b200": GPU(
        "NVIDIA B200 SXM", 2250e12, 75e12, 183359 * 2**20, 8.0e12, 900e9, "NVIDIA HGX B200 datasheet, one of eight"
    ),
}


@dataclass(frozen=True)
class Share:
    """A share of the vendor's number, and where it is from."""

    value: float
    source: str


@dataclass(frozen=True)
class Efficiency:
    """What the kernels reach of a GPU."""

    matmul: Share
    """Of the FLOP/s, in the layers' matrix products."""
    attention: Share
    """Of the FLOP/s, in attention's products, forward and backward."""
    head: Share
    """Of the FLOP/s, in the log-prob op."""
    bandwidth: Share
    """Of the memory's bytes/s."""
    link: Share
    """Of the links' bytes/s, in collectives."""


ASSUMED = Efficiency(
    matmul=Share(0.75, "assumed: below the 790 of 989 TFLOP/s that peers report for large products on an H200"),
    attention=Share(0.45, "assumed: FlexAttention, forward and backward"),
    head=Share(0.72, "assumed: 790 of 989 TFLOP/s, over 1.10, this op's target"),
    bandwidth=Share(0.85, "assumed"),
    link=Share(0.75, "assumed: all-gathers of large layers"),
)


def find(name: str) -> GPU:
    """The GPU of that name; raises ValueError with the known names on another."""
    if name not in GPUS:
        raise ValueError(f"expected --gpu among {', '.join(GPUS)}, got {name!r}")
    return GPUS[name]


def efficiency(name: str, results: Path = RESULTS) -> Efficiency:
    """What was measured on that GPU, the median of its lines; what was not is assumed and says so.

    A line counts where its environment.machine names the GPU: ceilings.matmul.bfloat16 and ceilings.bandwidth for
    products and memory, and flops / seconds of linear_logprob's frozen head in bf16 for the log-prob op.
    """
    gpu, found = find(name), _lines(name, results)
    matmul = [x for line in found if (x := line.get("ceilings", {}).get("matmul", {}).get("bfloat16"))]
    bandwidth = [x for line in found if (x := line.get("ceilings", {}).get("bandwidth"))]
    head = [line["flops"] / line["seconds"] for line in found if _is_head(line)]
    return Efficiency(
        matmul=_measured(matmul, gpu.flops, ASSUMED.matmul),
        attention=ASSUMED.attention,
        head=_measured(head, gpu.flops, ASSUMED.head),
        bandwidth=_measured(bandwidth, gpu.bandwidth, ASSUMED.bandwidth),
        link=ASSUMED.link,
    )


def _is_head(line: dict[str, Any]) -> bool:
    wanted = {"stem": "linear_logprob", "provider": "ours", "dtype": "bfloat16"}
    frozen = line.get("case") == "frozen head, forward and backward"
    return frozen and all(line.get(key) == value for key, value in wanted.items()) and bool(line.get("seconds"))


def _measured(values: list[float], peak: float, otherwise: Share) -> Share:
    if not values:
        return otherwise
    middle = sorted(values)[len(values) // 2]
    return Share(middle / peak, f"measured, bench/results, {len(values)} lines")


def _lines(name: str, results: Path) -> list[dict[str, Any]]:
    paths = sorted(results.glob("*.jsonl")) if results.is_dir() else []
    lines = [json.loads(text) for path in paths for text in path.read_text(encoding="utf-8").splitlines() if text]
    return [line for line in lines if name.upper() in str(line.get("environment", {}).get("machine", "")).upper()]
