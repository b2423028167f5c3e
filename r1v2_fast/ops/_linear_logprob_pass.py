"""One chunk of rows through the head: matmul, then the row pass of the backend, then what other shards know.

n rows of a chunk, H hidden, V vocabulary (of this shard). D and E as in `_linear_logprob_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from r1v2_fast.ops import _linear_logprob_native as native
from r1v2_fast.ops import _linear_logprob_rows as rows
from r1v2_fast.ops._linear_logprob_matmul import HALVES, accumulator, back_project, project
from r1v2_fast.ops._linear_logprob_rows import Raw, Shaping
from r1v2_fast.ops._linear_logprob_shard import Shard, combine

TILE_BYTES = 1 << 30  # logits of a chunk on a GPU
CPU_TILE_BYTES = 16 << 20  # on a CPU a chunk that stays near the caches is faster
KEPT_BYTES_CPU = 1 << 30
FP16_ENTROPY_SCALE = 2.0**11  # |E| stays below 23
ROW_MULTIPLE = 128  # rows of a chunk that is not the last: the matmul's tile


@dataclass(frozen=True)
class Plan:
    """What all chunks of a call share."""

    weight: torch.Tensor  # [V, H]
    shaping: Shaping
    compute: torch.dtype
    outputs: tuple[str, ...]
    backend: str  # "cuda" replaces Triton's row kernel alone
    shard: Shard | None
    workspace: int | None = None
    ignore_index: int = -100
    tolerance: float = 0.0

    @property
    def vocabulary(self) -> int:
        return len(self.weight)

    @property
    def whole_vocabulary(self) -> int:
        return self.vocabulary if self.shard is None else self.shard.vocabulary

    @property
    def fused(self) -> bool:
        """Kernels make the rows, not PyTorch."""
        return self.backend != "torch"

    @property
    def target_apart(self) -> bool:
        """D is 0 at the target, whose term, the largest, is added in the end: it loses nothing in the matmul's sum.

        Not where a kernel writes D in 16 bits, whose rounding outweighs that, unless other shards hold what it sums.
        """
        return self.shard is not None or not (self.fused and self.compute in HALVES)

    @property
    def wide(self) -> torch.dtype:
        return accumulator(self.compute)

    def here(self, targets_n: torch.Tensor) -> torch.Tensor:
        """Targets counted from this shard's first id."""
        return targets_n if self.shard is None else targets_n - self.shard.first

    def combined(self, raw: Raw, targets_n: torch.Tensor) -> Raw:
        """The statistics of whole rows; targets count from this shard's first id."""
        return raw if self.shard is None else combine(raw, targets_n, self.shard)

    def chunk_rows(self, count: int, kept: int, grad: bool, entropy_grad: bool) -> int:
        """Rows of a chunk: logits and what stands beside them fit what the kept rows leave of the workspace."""
        tile = self.vocabulary * self.wide.itemsize
        on_cpu = self.weight.device.type == "cpu"
        # the wider the head, the more the matmul counts, which likes many rows
        most = (CPU_TILE_BYTES << (self.weight.shape[1] >= 1024) if on_cpu else TILE_BYTES) // (tile + self._scratch())
        if self.workspace is not None:
            left = self.workspace - kept * padded(self.vocabulary, self.compute) * self.compute.itemsize
            most = min(most, left // (tile + self._beside(grad, entropy_grad) + self._scratch()))
        most = max(1, most)
        if on_cpu or count <= most:
            return most
        even = -(-count // -(-count // most))  # chunks of one size, so that none is too thin for the matmul
        return min(most, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)

    def _beside(self, grad: bool, entropy_grad: bool) -> int:
        """Bytes a row beside its logits: the kernel's matrices, or the temporaries of the row pass on torch."""
        if self.fused:
            return self.vocabulary * self.compute.itemsize * (grad * (self.compute in HALVES) + entropy_grad)
        shaping = self.shaping
        tiles = (shaping.softcap is not None and (grad or entropy_grad)) + ("entropy" in self.outputs or entropy_grad)
        tiles += ("is_top1" in self.outputs) + (shaping.blocked is not None and "mean_logits" in self.outputs)
        tiles += grad * (4 * (self.tolerance > 0) + (self.compute == torch.float16))
        return self.vocabulary * self.wide.itemsize * tiles

    def _scratch(self) -> int:
        """Bytes a row of the kernel that selects entries."""
        return 16 * candidates(self.vocabulary) if self.tolerance and self.fused else 0


def candidates(vocabulary: int) -> int:
    """Entries of a row that the row-sparse gradient's kernel looks at."""
    return min(4096, 1 << max(0, vocabulary - 1).bit_length())


def padded(vocabulary: int, dtype: torch.dtype) -> int:
    """A row's stride in elements: a multiple of 128 bytes, so that any V loads in wide accesses."""
    per_line = 128 // dtype.itemsize
    return -(-vocabulary // per_line) * per_line


@torch.compiler.assume_constant_result
def _kept_bytes(device: torch.device) -> int:
    """Free memory, what the allocator holds unused included; looked at once a graph, when it is traced."""
    if device.type != "cuda":
        return KEPT_BYTES_CPU
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return (torch.cuda.mem_get_info(device)[0] + unused) // 4


def kept_rows(vocabulary: int, compute: torch.dtype, workspace: int | None, device: torch.device) -> int:
    """Rows whose D may be kept for the weight gradient: three quarters of a given workspace."""
    budget = _kept_bytes(device) if workspace is None else workspace * 3 // 4
    return budget // (padded(vocabulary, compute) * compute.itemsize)


def room(like: torch.Tensor, count: int, vocabulary: int, dtype: torch.dtype) -> torch.Tensor:
    """[n, V] uninitialised, its rows padded to 128 bytes; a kernel may read the padding, which is 0."""
    whole = like.new_empty(count, padded(vocabulary, dtype), dtype=dtype)
    whole[:, vocabulary:].zero_()
    return whole[:, :vocabulary]


class Chunk(NamedTuple):
    raw: Raw  # of the whole row, on every shard
    matrix: torch.Tensor | None  # D [n, V]
    entropy_matrix: torch.Tensor | None  # E [n, V]
    entropy_scale: torch.Tensor | None  # [n]: E is exp(z - m) (...) f divided by this

    def product(self, targets_n: torch.Tensor, plan: Plan) -> torch.Tensor:
        """D scale W [n, H] of this shard; D W where D holds the target, for its rows to be scaled later."""
        assert self.matrix is not None
        product = back_project(self.matrix, plan.weight, plan.compute)
        if plan.shard is not None:  # elsewhere a D without the target has scale 1
            product.mul_(self.raw.scale[:, None])
        if plan.target_apart:
            add_target(product, self.raw.at_target(), plan.here(targets_n), plan)
        return product


def add_target(product_nH: torch.Tensor, own_n: torch.Tensor, targets: torch.Tensor, plan: Plan) -> torch.Tensor:
    """product += own W[target], in place, where this shard has the target."""
    own = own_n.where((targets >= 0) & (targets < plan.vocabulary), 0)
    weight = plan.weight[targets.clamp(0, plan.vocabulary - 1)].to(plan.compute)
    return product_nH.addcmul_(weight.to(product_nH.dtype), own[:, None])


def run_chunk(
    hidden_nH: torch.Tensor,
    targets_n: torch.Tensor,
    at: torch.Tensor | slice,  # which rows of the call they are, for the temperature
    plan: Plan,
    logits_nV: torch.Tensor,  # room, overwritten
    *,
    grad: bool,
    entropy_grad: bool = False,
    into: torch.Tensor | None = None,  # room for D in the compute dtype
) -> Chunk:
    targets = plan.here(targets_n)
    project(hidden_nH, plan.weight, logits_nV)
    if plan.fused:
        return _fused_chunk(logits_nV, targets, at, plan, grad, entropy_grad, into)
    outputs = plan.outputs + (("entropy",) if entropy_grad else ())
    part = rows.row_pass(logits_nV, targets, plan.shaping, at, outputs, grad=grad, entropy_grad=entropy_grad)
    whole = plan.combined(part.raw, targets)
    entropy_matrix = rows.entropy_matrix(part, whole, targets) if entropy_grad else None
    matrix = rows.gradient_matrix(part) if grad else None
    if entropy_matrix is None:
        return Chunk(whole, matrix, None, None)
    scale = (part.raw.top - whole.top).exp()
    if plan.compute == torch.float16:  # as the kernel stores it
        entropy_matrix, scale = entropy_matrix.mul_(FP16_ENTROPY_SCALE), scale / FP16_ENTROPY_SCALE
    return Chunk(whole, matrix, entropy_matrix, scale)


def _fused_chunk(logits_nV, targets, at, plan: Plan, grad: bool, entropy_grad: bool, into) -> Chunk:
    from r1v2_fast.kernels import linear_logprob_grads as grads

    matrix = entropy_matrix = entropy_scale = None
    if grad:
        matrix = into
        if matrix is None:
            in_place = logits_nV.dtype == plan.compute and not entropy_grad
            matrix = logits_nV if in_place else room(logits_nV, len(logits_nV), plan.vocabulary, plan.compute)
    head = triton_head(logits_nV, plan.shaping, at, padded=True)
    outputs = plan.outputs + (("entropy",) if entropy_grad else ())
    own = fused_rows(plan, head, targets, outputs, matrix, own=not plan.target_apart)
    whole = plan.combined(own, targets)
    if entropy_grad:
        shift = (own.top - whole.top) - whole.mean_distance()
        entropy_matrix = room(logits_nV, len(logits_nV), plan.vocabulary, plan.compute)
        factor = grads.launch_entropy(head, own.top, shift, entropy_matrix)
        entropy_scale = (own.top - whole.top).exp() / factor
    return Chunk(whole, matrix, entropy_matrix, entropy_scale)


def fused_rows(plan: Plan, head: dict, targets_n: torch.Tensor, outputs, matrix_nV=None, *, own: bool = False) -> Raw:
    """Statistics of rows in a `room`, and D into another, by the plan's row kernel."""
    if plan.backend != "cuda":
        return triton_rows(head, targets_n, outputs, matrix_nV, own=own, padded=True)
    stacked = rows.raw_room(head["logits"], len(targets_n), torch.float32)
    native.launch(head, targets_n, stacked, matrix_nV, outputs, own=own)
    return rows.raw_of(stacked)


def triton_rows(
    head: dict, targets_n: torch.Tensor, outputs: tuple[str, ...], matrix_nV: torch.Tensor | None = None, **options
) -> Raw:
    """The row kernel's statistics; D into `matrix_nV`."""
    from r1v2_fast.kernels import linear_logprob as kernel

    stacked = rows.raw_room(head["logits"], len(targets_n), torch.float32)
    kernel.launch(head, targets_n, stacked, matrix_nV, outputs, **options)
    return rows.raw_of(stacked)


def triton_head(logits_nV: torch.Tensor, shaping: Shaping, at: torch.Tensor | slice, *, padded: bool = False) -> dict:
    from r1v2_fast.kernels import linear_logprob as kernel

    temperature = shaping.temperature
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[at].float().contiguous()
    return kernel.head_arguments(
        logits_nV, shaping.bias, shaping.blocked, temperature, shaping.logit_scale, shaping.softcap, padded=padded
    )
