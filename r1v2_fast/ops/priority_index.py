"""Priorities that change a few at a time, and draws from them at a cost that does not grow with their number."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch

from r1v2_fast import _native
from r1v2_fast.ops import _backend, _number
from r1v2_fast.ops._priority_index_native import NativeSums
from r1v2_fast.ops.priority_sample import PrioritySample
from r1v2_fast.reference import priority_index as reference

_backend.register("priority_index", ("cuda", _native.why_not))

MOST_ALPHA = 6.0  # p^alpha of any fp32, and sums of 2^48 of them, are normal doubles
MOST_CAPACITY = 1 << 48


class PriorityIndex:
    """Draw indices in proportion to p^alpha, out of N priorities that are updated in place.

    formula         draws with replacement by inverse CDF on sums of p^alpha; without replacement their repeats are
                    skipped, which is sequential weighted sampling: sample_by_priority's distribution, its own stream
    shapes          capacity N; updates indices [n], priorities [n]; a sample's indices, probabilities [k]
    dtypes          priorities fp16, bf16, fp32, fp64, kept as fp32; indices int32, int64; probabilities fp32, of a single
                    draw before the first, p^alpha / total
    memory          5 bytes a priority, 13 where alpha is not 1; an update and a sample cost n and k block sums, whatever N
    random numbers  Philox 4x32-10, key = seed, counter = the draw's number; sums are added in one fixed order, so the CPU,
                    with any number of threads, and every GPU draw the same indices
    threads         calls from several threads take turns. On CUDA kernels run on the current stream: calls on different
                    streams are the caller's to order. With check=False nothing waits for the device, and a CUDA graph can
                    capture updates and samples
    differentiable  nothing
    backend         "cuda": block sums, on the CPU by their C++ twin; "torch": the definition, O(N) a sample
    raises          ValueError on a capacity, alpha, index, priority or seed out of range, or k beyond the positive ones;
                    RuntimeError where the backend cannot run
    source          Schaul et al., Prioritized experience replay (1511.05952), appendix B.2.1 on sums in a tree; Wong and
                    Easton, An efficient method for weighted sampling without replacement (1980)
    """

    def __init__(
        self, capacity: int, *, alpha: float = 1.0, device: str | torch.device = "cpu", backend: str = "auto"
    ) -> None:
        capacity = _number.whole("capacity", capacity, 1, MOST_CAPACITY, so_written="2^48")
        if not 0 <= alpha <= MOST_ALPHA:
            raise ValueError(f"alpha must lie in [0, {MOST_ALPHA:g}], got {alpha}")
        self.alpha = float(alpha)
        self.backend = _backend.pick("priority_index", backend, torch.empty(0, device=device))
        sums = NativeSums if self.backend == "cuda" else TorchSums
        self._sums: NativeSums | TorchSums = sums(capacity, self.alpha, torch.device(device))
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """The capacity."""
        return len(self._sums.leaves)

    @property
    def device(self) -> torch.device:
        return self._sums.leaves.device

    @property
    def priorities(self) -> torch.Tensor:
        """A copy, [N] fp32; 0 where nothing was written."""
        with self._lock:
            return self._sums.leaves.clone()

    @property
    def total(self) -> torch.Tensor:
        """Sum of p^alpha, [] fp64 on the index's device: reading it there waits for nothing."""
        with self._lock:
            return self._sums.total()

    def update(self, indices: torch.Tensor, priorities: torch.Tensor, *, check: bool = True) -> None:
        """Set priorities[indices[i]] = priorities[i]; of several for one index the last counts.

        shapes          indices [n], priorities [n], both on the index's device
        dtypes          indices int32, int64; priorities fp16, bf16, fp32, fp64, rounded to fp32
        check           True looks at the pairs before anything is written (one sync on a device); False skips pairs whose
                        index is out of range or whose priority is NaN, infinite or negative
        differentiable  nothing
        raises          ValueError on shapes, dtypes or devices; with check on an index out of range, a priority that is NaN,
                        infinite or negative, or a positive one that fp32 would round to 0 or infinity
        """
        if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"indices must be int32 or int64 [n], got {indices.dtype} {tuple(indices.shape)}")
        if priorities.shape != indices.shape or not priorities.is_floating_point():
            raise ValueError(
                f"priorities must be floats {tuple(indices.shape)} as indices are, got {priorities.dtype} "
                f"{tuple(priorities.shape)}"
            )
        if not indices.device == priorities.device == self.device:
            raise ValueError(
                f"indices and priorities must be on {self.device}, got {indices.device} and {priorities.device}"
            )
        priorities, kept = priorities.detach(), priorities.detach().float()
        if check:
            self._check(indices, priorities, kept)
        with self._lock:
            self._sums.write(indices.long(), kept)

    def _check(self, indices: torch.Tensor, priorities: torch.Tensor, kept: torch.Tensor) -> None:
        outside = (indices < 0) | (indices >= len(self))
        unusable = ~(kept.isfinite() & (kept >= 0)) | ((kept == 0) & (priorities > 0))
        bad = outside | unusable
        if not bool(bad.any()):  # the one sync
            return
        position = int(bad.nonzero()[0])
        if bool(outside[position]):
            raise ValueError(
                f"indices must lie in [0, {len(self)}), got {indices[position].item()} at position {position}"
            )
        raise ValueError(
            f"priorities must be 0 or more, finite and positive where they are after rounding to fp32, got "
            f"{priorities[position].item()} at position {position}"
        )

    def sample(self, k: int, *, seed: int, replacement: bool = False, check: bool = True) -> PrioritySample:
        """Draw k indices in proportion to p^alpha, one after the other.

        shapes          indices, probabilities [k]
        dtypes          indices int64; probabilities fp32: p^alpha / total before the first draw
        check           True counts what was drawn (one sync on a device); False gives index -1 and probability 0 behind the
                        last that could be
        differentiable  nothing
        raises          ValueError on k below 0, a seed outside [0, 2^63); with check on k beyond the positive priorities,
                        with replacement on none
        """
        k, seed = _number.whole("k", k, 0), _number.seed(seed)
        with self._lock:
            indices, probabilities, drawn = self._sums.draw(k, seed, replacement)
        if check and k and int(drawn) < k:
            raise ValueError(f"cannot draw k = {k} from {int(drawn)} positive priorities of {len(self)}")
        return PrioritySample(indices, probabilities)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has a lock of its own."""
        with self._lock:
            return {name: copy.deepcopy(value) for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=threading.Lock())

    def state_dict(self) -> dict[str, Any]:
        return {"alpha": self.alpha, "priorities": self.priorities}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a `state_dict()` of the same alpha and capacity; ValueError else, and nothing changes."""
        leaves = state["priorities"]
        if state["alpha"] != self.alpha:
            raise ValueError(f"alpha must be {self.alpha}, got a state of {state['alpha']}")
        if leaves.shape != (len(self),) or leaves.dtype != torch.float32:
            raise ValueError(
                f"priorities must be torch.float32 ({len(self)},), got {leaves.dtype} {tuple(leaves.shape)}"
            )
        bad = ~(leaves.isfinite() & (leaves >= 0))
        if bool(bad.any()):
            index = int(bad.nonzero()[0])
            raise ValueError(f"priorities must be finite and 0 or more, got {leaves[index].item()} at index {index}")
        with self._lock:
            self._sums.load(leaves)


class TorchSums:
    """The torch backend: leaves, and everything else anew each time."""

    def __init__(self, capacity: int, alpha: float, device: torch.device) -> None:
        self.alpha = alpha
        self.leaves = torch.zeros(capacity, device=device)

    def total(self) -> torch.Tensor:
        return reference.masses(self.leaves, self.alpha).sum()

    def load(self, leaves_N: torch.Tensor) -> None:
        self.leaves.copy_(leaves_N)

    def write(self, indices_n: torch.Tensor, priorities_n: torch.Tensor) -> None:
        reference.write(self.leaves, indices_n, priorities_n)

    def draw(self, k: int, seed: int, replacement: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        indices = torch.full((k,), -1, dtype=torch.int64, device=self.leaves.device)
        found = reference.sample(self.leaves, k, seed, self.alpha, replacement)
        indices[: len(found)] = found
        share = reference.masses(self.leaves[found], self.alpha) / self.total()
        probabilities = torch.zeros(k, device=self.leaves.device)
        probabilities[: len(found)] = share.float()
        return indices, probabilities, torch.tensor(len(found), device=self.leaves.device)
