"""Groups from the ids that a trainer gives its prompts. N ids, G groups."""

from __future__ import annotations

import itertools
from collections import defaultdict

import numpy as np
import torch


def groups_from_ids(ids: torch.Tensor | np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """(order [N], offsets [G + 1]), int64: `ids[order]` has equal ids together, groups and members in first-seen order.

    ids     int tensor [N], or a NumPy array of ints, strings or hashable objects (verl's uids)
    cost    linear in N: radix sorts, on the tensor's device; for strings and objects one walk through a dict
    raises  ValueError on another shape or dtype, and on an id that is not hashable
    """
    if isinstance(ids, torch.Tensor):
        ints, floats = True, ids.is_floating_point() or ids.is_complex()
    elif isinstance(ids, np.ndarray):
        ints, floats = ids.dtype.kind in "iub", ids.dtype.kind in "fc"
    else:
        raise ValueError(f"ids must be a tensor or a NumPy array, got {type(ids).__name__}")
    if ids.ndim != 1 or floats:
        raise ValueError(f"ids must be ints, strings or objects [N], got {ids.dtype} {tuple(ids.shape)}")
    if ints:
        labels = _labels_of_ints(ids if isinstance(ids, torch.Tensor) else torch.from_numpy(ids.astype(np.int64)))
    else:
        labels = _labels_of_objects(ids.tolist())
    sizes = labels.bincount()
    return labels.argsort(stable=True), torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])


def _labels_of_ints(ids: torch.Tensor) -> torch.Tensor:
    """Each id's group, by sorting: a stable sort puts the first seen of equal ids first."""
    in_order, order = ids.sort(stable=True)
    begins = torch.ones_like(in_order, dtype=torch.bool)
    begins[1:] = in_order[1:] != in_order[:-1]
    group_of_run = order[begins].argsort().argsort()
    return torch.empty_like(order).scatter(0, order, group_of_run[begins.cumsum(0) - 1])


def _labels_of_objects(ids: list) -> torch.Tensor:
    numbers: dict = defaultdict(itertools.count().__next__)
    try:
        return torch.from_numpy(np.fromiter(map(numbers.__getitem__, ids), np.int64, len(ids)))
    except TypeError:
        for index, value in enumerate(ids):
            try:
                hash(value)
            except TypeError:
                raise ValueError(f"ids must be hashable, got {type(value).__name__} at index {index}") from None
        raise
