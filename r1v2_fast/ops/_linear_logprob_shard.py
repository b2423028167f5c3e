"""Vocabulary-parallel heads: each rank of a group holds an equal slice of the vocabulary, in the order of its ranks.

Two all-reduces of [n] statistics make every rank's the whole row's; a third sums the hidden gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from r1v2_fast.ops._linear_logprob_rows import Raw


@dataclass(frozen=True)
class Shard:
    group: dist.ProcessGroup
    ids: int  # of a shard
    first: int  # this rank's first id

    @property
    def vocabulary(self) -> int:
        return self.ids * self.group.size()

    def sum(self, values: torch.Tensor) -> None:
        """In place, over the shards."""
        dist.all_reduce(values, group=self.group)


def shard_of(name: str, ids: int) -> Shard | None:
    """The shard of this rank in the group of that name; "" is no group. A registered op takes names, not groups."""
    if not name:
        return None
    group = dist.distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    return Shard(group, ids, ids * group.rank())


def combine(raw: Raw, targets_n: torch.Tensor, shard: Shard) -> Raw:
    """The whole row's statistics from this shard's; `targets_n` count from the shard's first id."""
    ahead = torch.stack((raw.top, raw.target))
    dist.all_reduce(ahead, dist.ReduceOp.MAX, group=shard.group)
    top, target = ahead.unbind(0)
    shrink = (raw.top - top).exp()
    here = raw.target > -torch.inf
    # the first maximum: the target's shard must hold the maximum, and none before it may equal it
    beaten = torch.where(here, (raw.beaten > 0) | (raw.top < top), (targets_n >= shard.ids) & (raw.top == top))
    sums = torch.stack(
        (
            raw.others * shrink,
            raw.factor.where(here, 0),
            shrink * (raw.weighted + (raw.top - top) * raw.others),
            raw.squares * shrink.square(),
            raw.total,
            raw.allowed,
            beaten.to(top.dtype),
        )
    )
    shard.sum(sums)
    others, factor, weighted, squares, total, allowed, beaten = sums.unbind(0)
    return Raw(top, others, target, factor, raw.scale * shrink, weighted, squares, total, allowed, beaten)
