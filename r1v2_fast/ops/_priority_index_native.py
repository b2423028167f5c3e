"""PriorityIndex's arrays and the calls of `_C` that work on them. N leaves, n updates, k draws."""

from __future__ import annotations

import torch

from r1v2_fast import _native


class NativeSums:
    """Leaves p, their powers where alpha is not 1, and sums in a tree of 256 children a node (csrc/block_sums.h)."""

    def __init__(self, capacity: int, alpha: float, device: torch.device) -> None:
        doubles = _native.loaded().priority_index_doubles(capacity)
        self.alpha = alpha
        self.leaves = torch.zeros(capacity, device=device)
        self.powers = None if alpha == 1 else torch.zeros(capacity, dtype=torch.float64, device=device)
        self.sums = torch.zeros(doubles, dtype=torch.float64, device=device)
        self.root = _native.loaded().priority_index_root(capacity)
        self.threads: int | None = None  # on the CPU; None: torch's

    def total(self) -> torch.Tensor:
        return self.sums[self.root].clone()

    def load(self, leaves_N: torch.Tensor) -> None:
        self.leaves.copy_(leaves_N)
        _native.loaded().priority_index_build(**self._arrays(), **self._place())

    def write(self, indices_n: torch.Tensor, priorities_n: torch.Tensor) -> None:
        indices_n, priorities_n = indices_n.contiguous(), priorities_n.contiguous()
        for name, tensor, dtype in (("indices", indices_n, torch.int64), ("priorities", priorities_n, torch.float32)):
            if tensor.dtype != dtype or tensor.shape != indices_n.shape or tensor.device != self.leaves.device:
                raise ValueError(
                    f"{name} must be {dtype} {tuple(indices_n.shape)} on {self.leaves.device}, got {tensor.dtype} "
                    f"{tuple(tensor.shape)} on {tensor.device}"
                )
        workspace = self._workspace("priority_index_update_bytes", len(indices_n))
        _native.loaded().priority_index_update(
            **self._arrays(),
            **_native.addresses(indices=indices_n, priorities=priorities_n, workspace=workspace),
            count=len(indices_n),
            workspace_bytes=len(workspace),
            **self._place(),
        )

    def draw(self, k: int, seed: int, replacement: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(indices [k], probabilities [k], how many were drawn []); -1 and 0 behind those."""
        indices, probabilities = self.leaves.new_empty(k, dtype=torch.int64), self.leaves.new_empty(k)
        drawn = self.leaves.new_empty((), dtype=torch.int64)
        workspace = self._workspace("priority_index_sample_bytes", len(self.leaves), k, replacement)
        _native.loaded().priority_index_sample(
            **self._arrays(),
            k=k,
            seed=seed,
            replacement=replacement,
            **_native.addresses(indices=indices, probabilities=probabilities, drawn=drawn, workspace=workspace),
            workspace_bytes=len(workspace),
            **self._place(),
        )
        return indices, probabilities, drawn

    def _arrays(self) -> dict:
        powers = 0 if self.powers is None else self.powers.data_ptr()
        numbers = {"capacity": len(self.leaves), "alpha": self.alpha, "powers": powers}
        return numbers | _native.addresses(leaves=self.leaves, sums=self.sums)

    def _place(self) -> dict:
        return {"threads": self.threads or torch.get_num_threads(), **_native.place(self.leaves)}

    def _workspace(self, size_of: str, *arguments) -> torch.Tensor:
        """From torch's allocator, so that a CUDA graph can capture the call; the CPU needs none."""
        size = getattr(_native.loaded(), size_of)(*arguments) if self.leaves.is_cuda else 0
        return torch.empty(size, dtype=torch.uint8, device=self.leaves.device)
