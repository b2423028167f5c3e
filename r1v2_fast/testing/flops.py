"""FLOPs of matrix products, counted from the shapes that the profiler saw.

`FlopCounterMode` sees nothing inside a registered op; the profiler sees every kernel call, on any device.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

# aten name -> which inputs are the two factors
PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::mv": (0, 1),
    "aten::dot": (0, 1),
    "aten::_scaled_mm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::baddbmm_": (1, 2),
    "aten::addbmm": (1, 2),
    "aten::addmv": (1, 2),
    "aten::addmv_": (1, 2),
    "aten::_addmm_activation": (1, 2),
}


def matmul_flops(function: Callable[[], object]) -> int:
    """2 x rows x inner x columns, summed over every matrix product that `function` runs."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profile:
        function()
    events = profile.events()
    assert events is not None
    return sum(_product_flops(event) for event in events if event.name in PRODUCTS and not _inside_a_product(event))


def _inside_a_product(event) -> bool:
    """mv calls addmv_: counted once, at the outermost."""
    while (event := event.cpu_parent) is not None:
        if event.name in PRODUCTS:
            return True
    return False


def _product_flops(event) -> int:
    first, second = (event.input_shapes[index] for index in PRODUCTS[event.name])
    columns = second[-1] if len(second) > 1 else 1
    return 2 * math.prod(first) * columns


def assert_flops(function: Callable[[], object], expected: float, *, band: float = 0.01) -> int:
    """The count lies within `band` of `expected`; returns it."""
    counted = matmul_flops(function)
    assert abs(counted - expected) <= band * expected, f"{counted:.4e} FLOPs counted, {expected:.4e} promised"
    return counted
