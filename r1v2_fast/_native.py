"""The native extension `_C`: whether it runs, with the reason where it does not, and its functions on tensors."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

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
    if any(_runs_on(arch, major, minor) for arch in architectures) or (major, minor) >= split_architecture(
        architectures[-1]
    ):
        return None
    here = f"{major}{minor}"
    return f"{built} for {' '.join(architectures)}, and this GPU is sm_{here}; reinstall with R1V2_FAST_ARCHS={here}"


def split_architecture(architecture: str) -> tuple[int, int]:
    digits = architecture.rstrip("af")
    return int(digits[:-1]), int(digits[-1])


def _runs_on(architecture: str, major: int, minor: int) -> bool:
    """Machine code runs on its own major version from its minor on; an `a` target on that very one."""
    own_major, own_minor = split_architecture(architecture)
    return own_major == major and (own_minor == minor if architecture.endswith("a") else own_minor <= minor)


def loaded() -> ModuleType:
    native = module()
    assert isinstance(native, ModuleType), native
    return native


def place(tensor: torch.Tensor) -> dict[str, int]:
    """Device index and its current stream's handle; -1 and 0 on the CPU."""
    if not tensor.is_cuda:
        return {"device": -1, "stream": 0}
    device = tensor.get_device()
    return {"device": device, "stream": torch.cuda.current_stream(device).cuda_stream}


def addresses(**tensors: torch.Tensor) -> dict[str, int]:
    """Where they lie; nobody behind the call can tell a stride or a device that is not what it takes."""
    devices = {tensor.device for tensor in tensors.values()}
    assert len(devices) == 1, devices
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def widened(priorities_N: torch.Tensor) -> torch.Tensor:
    """As kernels take them: contiguous, fp32 or fp64, on a GPU aligned to their 16-byte loads."""
    wide = priorities_N if priorities_N.dtype == torch.float64 else priorities_N.float()
    wide = wide.contiguous()
    return wide.clone() if wide.is_cuda and wide.data_ptr() % 16 else wide


def function(name: str, values: torch.Tensor) -> Callable[..., Any]:
    """The one for the dtype of `values`."""
    assert values.dtype in (torch.float32, torch.float64), values.dtype
    return getattr(loaded(), f"{name}_{'f64' if values.dtype == torch.float64 else 'f32'}")


def race_keys(priorities_N: torch.Tensor, seed: int, alpha: float) -> torch.Tensor:
    """log(E_i) - alpha log(p_i) as fp64 [N]; see reference/priority_sample.py."""
    p = widened(priorities_N)
    keys = torch.empty_like(p, dtype=torch.float64)
    function("race_keys", p)(**addresses(priorities=p, keys=keys), count=len(p), seed=seed, alpha=alpha, **place(p))
    return keys


Drawn = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""indices [k], probabilities [k], status [3]: positive priorities, index of the first bad one or -1, 1 for failure."""


def _room(p: torch.Tensor, k: int) -> dict[str, torch.Tensor]:
    ints = p.new_zeros(3, dtype=torch.int64)
    return {"indices": p.new_empty(k, dtype=torch.int64), "probabilities": p.new_empty(k), "status": ints}


def priority_sample(
    priorities_N: torch.Tensor, k: int, seed: int, alpha: float, *, threads: int | None = None
) -> Drawn:
    """Without replacement: the k smallest keys."""
    p = widened(priorities_N)
    out, native = _room(p, k), loaded()
    capacity = native.sample_capacity(len(p), k) if p.is_cuda else 0
    ranked = capacity <= native.RANKED_MOST
    head = p.new_empty(native.SAMPLE_HEAD_BYTES if p.is_cuda else 0, dtype=torch.uint8)
    keys, candidates = p.new_empty(capacity, dtype=torch.float64), p.new_empty(capacity, dtype=torch.int64)
    shares = p.new_empty(0 if ranked else capacity)
    function("priority_sample", p)(
        **addresses(priorities=p, head=head, keys=keys, candidates=candidates, shares=shares, **out),
        count=len(p),
        k=k,
        seed=seed,
        alpha=alpha,
        capacity=capacity,
        threads=threads or torch.get_num_threads(),
        **place(p),
    )
    indices, probabilities, status = out.values()
    if not ranked:  # the kernel's own ranks cost k^2: a library's sort is better there
        by_index = candidates.argsort()
        order = by_index[keys[by_index].argsort(stable=True)][:k]
        drawn = torch.arange(len(order), device=p.device) < status[0]
        indices[: len(order)] = candidates[order].where(drawn, -1)
        probabilities[: len(order)] = shares[order].where(drawn, 0)
    return indices, probabilities, status


def priority_draw(priorities_N: torch.Tensor, k: int, seed: int, alpha: float, *, threads: int | None = None) -> Drawn:
    """With replacement: inverse CDF on block sums."""
    p = widened(priorities_N)
    out = _room(p, k)
    space = p.new_empty(loaded().priority_draw_bytes(len(p)) if p.is_cuda else 0, dtype=torch.uint8)
    function("priority_draw", p)(
        **addresses(priorities=p, workspace=space, **out),
        count=len(p),
        k=k,
        seed=seed,
        alpha=alpha,
        workspace_bytes=len(space),
        threads=threads or torch.get_num_threads(),
        **place(p),
    )
    return out["indices"], out["probabilities"], out["status"]
