"""What runs here: versions, and for every op the backend that `auto` takes with the reasons against the others."""

from __future__ import annotations

import importlib.metadata
import platform

import torch

from r1v2_fast import (
    _native,
    ops,  # noqa: F401  (registers the backends)
)
from r1v2_fast._version import __version__
from r1v2_fast.ops import _backend


def run(require: list[str]) -> int:
    """Print the findings; 1 where a required backend cannot run any op on this machine's devices, else 0."""
    print(f"r1v2_fast {__version__}, Python {platform.python_version()}, {platform.machine()}")
    for package in ("torch", "triton", "transformers"):
        try:
            print(f"  {package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"  {package} not installed")
    devices = ["cpu"]
    if torch.cuda.is_available():
        devices.append("cuda")
        print(f"  GPU {torch.cuda.get_device_name()}")
    else:
        print("  no CUDA device")
    native = _native.module()
    if isinstance(native, ImportError):
        print(f"  _C is out: {_native.why_not('cpu')}")
    else:
        runtime, _ = native.cuda_versions()
        built = (
            f"CUDA {runtime // 1000}.{runtime % 1000 // 10} for {native.cuda_architectures}" if runtime else "no CUDA"
        )
        print(f"  _C built with {built}")
    running = set()
    for device in devices:
        print(f"\non {device}")
        for op in _backend.ops():
            chosen = _backend.auto(op, device)
            print(f"  {op:<18} {chosen}{' (its C++ twin)' if (chosen, device) == ('cuda', 'cpu') else ''}")
            for verdict in _backend.verdicts(op, device):
                if verdict.why_not is None:
                    running.add(verdict.backend)
                else:
                    print(f"    {verdict.backend} is out: {verdict.why_not}")
    missing = [backend for backend in require if backend not in running]
    for backend in missing:
        print(f"\nrequired backend {backend!r} cannot run any op here")
    return 1 if missing else 0
