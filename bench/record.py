"""One JSON line a measurement, with what is needed to read it later: commit, machine, versions."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
PEERS = ("trl", "liger-kernel", "verl", "cut-cross-entropy", "quack-kernels", "unsloth-zoo")


def environment(device: torch.device) -> dict[str, str | int | None]:
    versions = {name: installed(name) for name in ("torch", "triton", "r1v2-fast", *PEERS)}
    found: dict[str, str | int | None] = {
        "commit": _commit(),
        **{name: version for name, version in versions.items() if version is not None},
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(command, capture_output=True, text=True).stdout.split()
        return {**found, "machine": torch.cuda.get_device_name(device), "driver": driver[0] if driver else None}
    return {**found, "machine": _cpu_name(), "cores": os.cpu_count()}


def write(lines: list[dict], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as out:
        out.writelines(json.dumps(line) + "\n" for line in lines)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    root = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode:
        return None
    # results measure the code, they are not part of it
    status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":(exclude,top)bench/results"]
    changed = subprocess.run(status, cwd=root, capture_output=True, text=True).stdout
    return head.stdout.strip() + ("+changes" if changed.strip() else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()
