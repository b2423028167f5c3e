"""What runs here: versions, what `_C` holds, for every op the backend that `auto` takes and why the others are out, and which
fused layers liger-kernel gives."""

from __future__ import annotations

import importlib.metadata
import platform
from types import ModuleType

import torch

from r1v2_fast import (
    _native,
    ops,  # noqa: F401  (registers the backends)
)
from r1v2_fast._version import __version__
from r1v2_fast.models import fused
from r1v2_fast.ops import _backend


def run(require: list[str], device: str | None = None) -> int:
    """Print the findings; 1 where `device` is not here, or a required backend runs no op on it, else 0.

    device  "cpu" or "cuda"; None reports all that are here and requires of the fastest
    """
    print(f"r1v2_fast {__version__}, Python {platform.python_version()}, {platform.machine()}")
    for package in ("torch", "triton", "transformers"):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package} not installed")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"  GPU {torch.cuda.get_device_name()}, sm_{''.join(map(str, torch.cuda.get_device_capability()))}")
    else:
        print(f"  no CUDA device: this torch {_sees_none()}")
    for line in extension(_native.module()):
        print(f"  {line}")
    if device is not None and device not in devices:
        print(f"\nasked for {device}, which is not here")
        return 1
    for name in devices if device is None else [device]:
        _report(name)
    fastest = device or devices[-1]
    known = sorted({verdict.backend for op in _backend.ops() for verdict in _backend.verdicts(op, fastest)})
    missing = [backend for backend in require if not _runs(backend, fastest)]
    for backend in missing:
        print(f"\nrequired backend {backend!r} cannot run any op here, on {fastest}; known are {', '.join(known)}")
    return 1 if missing else 0


def _sees_none() -> str:
    return f"is built with CUDA {torch.version.cuda} and sees none" if torch.version.cuda else "is built without CUDA"


def extension(native: ModuleType | ImportError) -> list[str]:
    """What the installed `_C` holds, which its import needs no device to tell."""
    if isinstance(native, ImportError):
        return [f"_C is out: {_native.why_not('cpu')}"]
    runtime, driver = native.cuda_versions()
    names = native.cuda_architectures
    compiler = getattr(native, "compiler", "unknown compiler")
    if not names:
        return [f"_C without CUDA, its C++ twin alone; built by {compiler}", f"   {native.__file__}"]
    return [
        f"_C with CUDA for {names}, and PTX of {names.split()[-1].rstrip('af')} for later cards",
        f"   built by nvcc {getattr(native, 'nvcc_version', '') or 'unknown'}, {compiler}; cudart {_release(runtime)}",
        f"   {f'the driver serves CUDA {_release(driver)}' if driver else 'no driver was found'}",
        f"   {native.__file__}",
    ]


def _release(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _report(device: str) -> None:
    print(f"\non {device}")
    for op in _backend.ops():
        chosen = _backend.auto(op, device)
        print(f"  {op:<18} {chosen}{' (its C++ twin)' if (chosen, device) == ('cuda', 'cpu') else ''}")
        for verdict in _backend.verdicts(op, device):
            if verdict.why_not is not None:
                print(f"    {verdict.backend} is out: {verdict.why_not}")
    for layer in fused.LAYERS:
        why = fused.why_not(device, layer)
        print(f"  fused {layer:<12} {f'liger-kernel {fused.version()}' if why is None else f'off: {why}'}")


def _runs(backend: str, device: str) -> bool:
    verdicts = [verdict for op in _backend.ops() for verdict in _backend.verdicts(op, device)]
    return any(verdict.backend == backend and verdict.why_not is None for verdict in verdicts)
