"""Tensors that FSDP shards by rows: which rows are this rank's, and how to make one from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch.distributed.tensor import DTensor, Shard


def span(tensor: DTensor) -> tuple[int, int]:
    """This rank's rows of a tensor sharded by rows over one mesh dimension: equal runs, the last ones shorter."""
    assert tensor.placements == (Shard(0),), f"expected rows over one dimension, got {tensor.placements}"
    rows, size = tensor.shape[0], tensor.device_mesh.size()
    run = -(-rows // size)
    start = min(run * tensor.device_mesh.get_local_rank(), rows)
    return start, min(start + run, rows)


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, int | None]:
    """(what this rank holds, its first row, or None where every rank holds the whole)."""
    if not isinstance(tensor, DTensor):
        return tensor.detach(), None
    return cast(DTensor, tensor.detach()).to_local(), span(tensor)[0]


def place(
    reference: torch.Tensor,
    rows: Callable[[int, int], torch.Tensor],
    whole: Callable[[], torch.Tensor],
) -> torch.Tensor:
    """A tensor placed as `reference` is, of `rows(start, stop)` where that is sharded, else of the `whole`."""
    if not isinstance(reference, DTensor):
        return whole().to(reference.device)
    own = rows(*span(reference)).to(reference.device)
    return DTensor.from_local(
        own, reference.device_mesh, reference.placements, shape=reference.shape, stride=reference.stride()
    )
