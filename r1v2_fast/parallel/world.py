"""The ranks of a run: who they are, and the few things they tell each other. One process alone needs no process group.

Objects travel pickled, between processes of one run alone; nothing that is stored is.
"""

from __future__ import annotations

import gc
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from r1v2_fast.stop import Stopped

T = TypeVar("T")


class World:
    """This rank among the others. Every method but `slice` is a collective: all ranks call it, in the same order."""

    def __init__(self, rank: int = 0, size: int = 1, device: torch.device | None = None):
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes and prints."""
        return self.rank == 0

    def slice(self, count: int) -> slice:
        """This rank's share of `count` things: one run of them, as equal as it goes."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of ranks; any object."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def concatenate(self, values: list[T]) -> list[T]:
        return [value for own in self.gather(values) for value in own]

    def any(self, value: bool) -> bool:
        return bool(self._reduced([value], dist.ReduceOp.MAX)[0])

    def most(self, value: int) -> int:
        return int(self._reduced([value], dist.ReduceOp.MAX)[0])

    def sums(self, values: dict[str, float]) -> dict[str, float]:
        """Each named number, summed over ranks; all have the same names."""
        return dict(zip(values, self._reduced(list(values.values()), dist.ReduceOp.SUM), strict=True))

    def total(self, value: torch.Tensor) -> torch.Tensor:
        """Its sum over ranks, on its device."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def once(self, work: Callable[[], T]) -> T:
        """`work` on the first rank alone; its result, or its exception's sentence, on all: the disk is looked at once."""
        result, error = None, None
        if self.first:
            try:
                result = work()
            except Exception as raised:
                error = raised
        if self.size > 1:
            said: list[Any] = [(result, _named(error, self.rank))]
            dist.broadcast_object_list(said, src=0)
            result, failed = said[0]
            if failed is not None and error is None:
                raise failed
        if error is not None:
            raise error
        return result  # type: ignore[return-value]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one rank raises inside, all raise: none goes on alone, to wait for ever. No collectives inside."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        failures = self.gather(_named(error, self.rank))
        if error is not None:
            raise error
        for failure in failures:
            if failure is not None:
                raise failure

    def _reduced(self, values: list, operation: Any) -> list[float]:
        if self.size == 1:
            return values
        held = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(held, operation)
        return held.tolist()


ALONE = World()


def _named(error: Exception | None, rank: int) -> Exception | None:
    """A copy that pickles, of a kind that the command line says in a sentence."""
    if error is None:
        return None
    kind = type(error) if type(error) in (ValueError, RuntimeError, ImportError) else RuntimeError
    name = "" if kind is type(error) else f"{type(error).__name__}: "
    return kind(f"rank {rank}: {name}{error}")


@contextmanager
def opened(device: str, *, timeout: float) -> Iterator[World]:
    """The world that torchrun's environment describes, and this rank's device in it; without torchrun, one rank.

    device   auto, or cuda: the GPU of LOCAL_RANK; cpu: gloo
    timeout  seconds that a rank waits for another before it takes it for lost
    raises   ValueError where the device names one GPU for several ranks; RuntimeError where there are too few GPUs
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World(device=pick_device(device))
        return
    chosen = _of_rank(pick_device(device), device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # what ranks tell each other goes over gloo on GPUs too: it costs the device nothing, and sees at once who has died
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield World(dist.get_rank(), size, chosen)
    except Stopped as stopped:  # on all ranks
        traceback.clear_frames(stopped.__traceback__)
        _close()
        raise
    _close()  # not after an error: it would wait for ranks that may be gone


def _close() -> None:
    """Once nothing uses the group: FSDP's modules hold it in cycles, and one left to the interpreter's end may abort there."""
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def first_rank() -> bool:
    """Of torchrun's environment; the only process is the first too."""
    return os.environ.get("RANK", "0") == "0"


def _of_rank(device: torch.device, name: str) -> torch.device:
    if device.type != "cuda":
        return device
    if device.index is not None:
        raise ValueError(f"run.device must be auto, cuda or cpu under torchrun, which places the ranks, got {name!r}")
    local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= count:
        raise RuntimeError(f"rank {local} of this machine has no GPU, {count} found; torchrun --nproc-per-node={count}")
    return torch.device("cuda", local)


def pick_device(name: str) -> torch.device:
    """raises  RuntimeError where CUDA is asked for and not there"""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"run.device={name} needs a CUDA device and driver, none found; run.device=cpu works")
    return device
