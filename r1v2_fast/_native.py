"""The native extension `_C`: whether it runs, with the reason where it does not, and its functions on tensors."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch


@functools.cache
def module() -> ModuleType | ImportError:
    try:
        return importlib.import_module("r1v2_fast._C")
    except ImportError as error:
        return error


def why_not(device_type: str) -> str | None:
    """None where `_C` runs on such a device, else the reason and what would work. On the CPU its C++ twin runs."""
    native = module()
    if isinstance(native, ModuleNotFoundError):
        return "r1v2_fast._C is not built; reinstall where a C++17 compiler and Python's headers are, or use backend='torch'"
    if isinstance(native, ImportError):
        return f"r1v2_fast._C does not load ({native}); reinstall it, or use backend='torch'"
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"it needs a CPU or CUDA tensor, got one on {device_type}; use backend='torch'"
    runtime, driver = native.cuda_versions()
    return cuda_why_not(native.cuda_architectures.split(), runtime, driver, torch.cuda.get_device_capability)


def cuda_why_not(architectures: list[str], runtime: int, driver: int, capability) -> str | None:
    """`capability` is called only where a driver answers."""
    if not architectures:
        return "r1v2_fast._C was built without CUDA; reinstall with nvcc and R1V2_FAST_CUDA=1, or use backend='torch'"
    built = f"r1v2_fast._C was built with CUDA {runtime // 1000}.{runtime % 1000 // 10}"
    if driver // 1000 < runtime // 1000:
        needed = {12: "525", 13: "580"}.get(runtime // 1000, "a newer one")
        found = (
            f"the driver here serves CUDA {driver // 1000}.{driver % 1000 // 10}" if driver else "no driver was found"
        )
        return f"{built}, which needs driver {needed} or newer; {found}. Update it, or use backend='torch'"
    major, minor = capability()
    if any(_runs_on(arch, major, minor) for arch in architectures) or (major, minor) >= _split(architectures[-1]):
        return None
    here = f"{major}{minor}"
    return f"{built} for {' '.join(architectures)}, and this GPU is sm_{here}; reinstall with R1V2_FAST_ARCHS={here}"


def _split(architecture: str) -> tuple[int, int]:
    digits = architecture.rstrip("af")
    return int(digits[:-1]), int(digits[-1])


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Machine code runs on its own major version from its minor on; an `a` target on that very one."""
    own_major, own_minor = _split(architecture)
    return own_major == major and (own_minor == minor if architecture.endswith("a") else own_minor <= minor)


def race_keys(priorities_N: torch.Tensor, seed: int, alpha: float) -> torch.Tensor:
    """log(E_i) - alpha log(p_i) as fp64 [N]; see reference/priority_sample.py."""
    native = module()
    assert isinstance(native, ModuleType), native
    priorities_N = priorities_N.contiguous()
    if priorities_N.dtype != torch.float64:
        priorities_N = priorities_N.float()
    keys = torch.empty_like(priorities_N, dtype=torch.float64)
    device, stream = -1, 0
    if priorities_N.is_cuda:
        device = priorities_N.get_device()
        stream = torch.cuda.current_stream(device).cuda_stream
    function = native.race_keys_f64 if priorities_N.dtype == torch.float64 else native.race_keys_f32
    function(priorities_N.data_ptr(), keys.data_ptr(), len(keys), seed, alpha, device, stream)
    return keys
