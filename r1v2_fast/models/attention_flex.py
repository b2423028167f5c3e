"""FlexAttention over a packed row: whole tiles of the mask that nobody sees are never computed.

L tokens, T = ceil(L / 128) tiles. Compiled once for every length; the backward exists on CUDA alone. Not yet run on a GPU.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch.nn.attention.flex_attention import BlockMask, flex_attention

if TYPE_CHECKING:
    from r1v2_fast.models.attention import Layout

TILE = 128


def attend(query, key, value, layout: Layout, scale: float | None) -> torch.Tensor:
    """query [1, Hq, L, D], key and value [1, Hk, L, D] to [1, Hq, L, D]."""
    mask = layout.once("flex", lambda: block_mask(layout))
    return _compiled()(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)


@functools.cache
def _compiled():
    # lengths are symbols: without that every new length of a row would compile again
    return torch.compile(flex_attention, dynamic=True)


def block_mask(layout: Layout) -> BlockMask:
    """Which tiles are empty, full or between, from the layout's intervals: [L, T] at most, where
    `create_block_mask` would make the whole [L, L]."""
    own, start, end = layout.own_start, layout.prompt_start, layout.prompt_end
    length, device = len(layout), own.device
    tiles = -(-length // TILE)
    place = torch.arange(length, device=device)[:, None]
    low = torch.arange(0, length, TILE, device=device)[None, :]
    high = (low + TILE).clamp(max=length)

    def touches(begin, behind):
        return (begin < high) & (behind > low)

    def covers(begin, behind):
        return (begin <= low) & (behind >= high)

    own, start, end = own[:, None], start[:, None], torch.minimum(end[:, None], place + 1)
    some = _by_tile(touches(own, place + 1) | touches(start, end), tiles).any(1)
    full = _by_tile(covers(own, place + 1) | covers(start, end), tiles).all(1)
    between, full = some & ~full, some & full

    edges_3L = torch.stack([layout.own_start, layout.prompt_start, layout.prompt_end])

    def mask_mod(batch, head, q, k):
        return (k <= q) & ((k >= edges_3L[0, q]) | ((k >= edges_3L[1, q]) & (k < edges_3L[2, q])))

    return BlockMask.from_kv_blocks(
        *_ordered(between), *_ordered(full), BLOCK_SIZE=TILE, mask_mod=mask_mod, seq_lengths=(length, length)
    )


def _by_tile(seen_LT: torch.Tensor, tiles: int) -> torch.Tensor:
    """[L, T] to [T, 128, T]; rows beyond L see nothing."""
    rows = seen_LT.new_zeros(tiles * TILE, tiles)
    rows[: len(seen_LT)] = seen_LT
    return rows.view(tiles, TILE, tiles)


def _ordered(tiles_TT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(how many, which first) of each row's tiles, as BlockMask takes them: [1, 1, T] and [1, 1, T, T] int32."""
    which = tiles_TT.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return tiles_TT.sum(1, dtype=torch.int32)[None, None], which.to(torch.int32)[None, None]
