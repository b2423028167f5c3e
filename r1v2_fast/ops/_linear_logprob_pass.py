"""One chunk of rows through the head: matmul, then the row pass of the backend, then what other shards know.

n rows of a chunk, H hidden, V vocabulary (of this shard). D and E as in `_linear_logprob_rows`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from r1v2_fast.ops import _linear_logprob_rows as rows
from r1v2_fast.ops._linear_logprob_matmul import HALVES, accumulator, back_project, project
from r1v2_fast.ops._linear_logprob_rows import Raw, Shaping
from r1v2_fast.ops._linear_logprob_shard import Shard, combine

TILE_BYTES = 1 << 30  # logits of a chunk on a GPU
CPU_TILE_BYTES = 16 << 20  # on a CPU a chunk that stays near the caches is faster
KEPT_BYTES_CPU = 1 << 30
ROW_MULTIPLE = 128  # rows of a chunk that is not the last: the matmul's tile


@dataclass(frozen=True)
class Plan:
    """What all chunks of a call share."""

    weight: torch.Tensor  # [V, H]
    shaping: Shaping
    compute: torch.dtype
    outputs: tuple[str, ...]
    backend: str
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
    def target_apart(self) -> bool:
        """D is 0 at the target, whose term, the largest, is added in the end: it loses nothing in the matmul's sum.

        Not where a kernel writes D in 16 bits, whose rounding outweighs that.
        """
        return not (self.backend == "triton" and self.compute in HALVES)

    @property
    def wide(self) -> torch.dtype:
        return accumulator(self.compute)

    def here(self, targets_n: torch.Tensor) -> torch.Tensor:
        """Targets counted from this shard's first id."""
        return targets_n if self.shard is None else targets_n - self.shard.first

    def chunk_rows(self, count: int, kept: int, grad: bool, entropy_grad: bool) -> int:
        """Rows of a chunk: logits and what is written beside them fit what the kept rows leave of the workspace."""
        beside = (
            self.compute.itemsize * (grad + entropy_grad) if self.compute in HALVES and self.backend == "triton" else 0
        )
        on_cpu = self.weight.device.type == "cpu"
        cpu_tile = CPU_TILE_BYTES * (
            2 if self.weight.shape[1] >= 1024 else 1
        )  # the wider the head, the more the matmul counts
        most = (cpu_tile if on_cpu else TILE_BYTES) // (self.vocabulary * self.wide.itemsize)
        if self.workspace is not None:
            left = self.workspace - kept * padded(self.vocabulary, self.compute) * self.compute.itemsize
            most = min(most, left // (self.vocabulary * (self.wide.itemsize + beside)))
        most = max(1, most)
        if on_cpu or count <= most:
            return most
        even = -(-count // -(-count // most))  # chunks of one size, so that none is too thin for the matmul
        return min(most, -(-even // ROW_MULTIPLE) * ROW_MULTIPLE)


def padded(vocabulary: int, dtype: torch.dtype) -> int:
    """A row's stride in elements: a multiple of 128 bytes, so that any V loads in wide accesses."""
    per_line = 128 // dtype.itemsize
    return -(-vocabulary // per_line) * per_line


@torch.compiler.assume_constant_result
def _kept_bytes(device: torch.device) -> int:
    """Free memory is looked at once a graph, when it is traced."""
    return torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else KEPT_BYTES_CPU


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
    own: torch.Tensor  # [n]: D at the target, which the matrix holds unless `Plan.target_apart`
    entropy_matrix: torch.Tensor | None  # E [n, V]
    entropy_scale: torch.Tensor | None  # [n]: E is exp(z - m) (...) f divided by this

    def product(self, targets_n: torch.Tensor, plan: Plan) -> torch.Tensor:
        """D W [n, H] of this shard."""
        assert self.matrix is not None
        product = back_project(self.matrix, plan.weight, plan.compute)
        return add_target(product, self.own, targets_n, plan) if plan.target_apart else product


def add_target(product_nH: torch.Tensor, own_n: torch.Tensor, targets_n: torch.Tensor, plan: Plan) -> torch.Tensor:
    targets = plan.here(targets_n)
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
    if plan.backend == "triton":
        return _triton_chunk(logits_nV, targets, at, plan, grad, entropy_grad, into)
    outputs = plan.outputs + (("entropy",) if entropy_grad else ())
    part = rows.row_pass(logits_nV, targets, plan.shaping, at, outputs, grad=grad, entropy_grad=entropy_grad)
    whole = part.raw if plan.shard is None else combine(part.raw, targets, plan.shard)
    entropy_matrix = rows.entropy_matrix(part, whole, targets) if entropy_grad else None
    matrix = rows.gradient_matrix(part) if grad else None
    return Chunk(
        whole, matrix, whole.at_target(), entropy_matrix, (part.raw.top - whole.top).exp() if entropy_grad else None
    )


def _triton_chunk(logits_nV, targets, at, plan: Plan, grad: bool, entropy_grad: bool, into) -> Chunk:
    from r1v2_fast.kernels import linear_logprob as kernel
    from r1v2_fast.kernels import linear_logprob_grads as grads

    matrix = entropy_matrix = entropy_scale = None
    if grad:
        matrix = into
        if matrix is None:
            in_place = logits_nV.dtype == plan.compute and not entropy_grad
            matrix = logits_nV if in_place else room(logits_nV, len(logits_nV), plan.vocabulary, plan.compute)
    head = triton_head(logits_nV, plan.shaping, at, padded=True)
    stacked = logits_nV.new_empty(len(rows.RAW), len(logits_nV), dtype=torch.float32)
    outputs = plan.outputs + (("entropy",) if entropy_grad else ())
    kernel.launch(head, targets, stacked, matrix, outputs, padded=True)
    own = whole = rows.raw_of(stacked)
    if plan.shard is not None:
        whole = combine(own, targets, plan.shard)
        if matrix is not None and not plan.target_apart:
            rows.place(matrix, targets, whole.at_target())
    if entropy_grad:
        shift = (own.top - whole.top) - whole.mean_distance()
        entropy_matrix = room(logits_nV, len(logits_nV), plan.vocabulary, plan.compute)
        factor = grads.launch_entropy(head, own.top, shift, entropy_matrix)
        entropy_scale = (own.top - whole.top).exp() / factor
    return Chunk(whole, matrix, whole.at_target(), entropy_matrix, entropy_scale)


def triton_head(logits_nV: torch.Tensor, shaping: Shaping, at: torch.Tensor | slice, *, padded: bool = False) -> dict:
    from r1v2_fast.kernels import linear_logprob as kernel

    temperature = shaping.temperature
    if isinstance(temperature, torch.Tensor):
        temperature = temperature[at].float().contiguous()
    return kernel.head_arguments(
        logits_nV, shaping.bias, shaping.blocked, temperature, shaping.logit_scale, shaping.softcap, padded=padded
    )
