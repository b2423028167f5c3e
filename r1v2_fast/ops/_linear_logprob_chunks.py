"""Row chunks through the head: matmul, row pass, gradient matmul. No logits outlive their chunk unless kept.

N rows, H hidden, V vocabulary, n rows of a chunk. Halves: logits are fp32 accumulators, on CUDA by the matmul's
out_dtype, on the CPU (which has none) by upcasting weight tiles; U and kept probabilities are in the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from r1v2_fast.ops._linear_logprob_rows import Rows, row_pass

TILE_BYTES = 1 << 30  # logits of a chunk on a GPU
CPU_TILE_BYTES = 16 << 20  # on a CPU a chunk that stays near the caches is faster
KEPT_BYTES_CPU = 1 << 30
UPCAST_BYTES = 64 << 20
FP16_SCALE = 2.0**15  # kept probabilities in fp16 would go subnormal below 6e-5


@dataclass(frozen=True)
class Head:
    """The head and what is done to its logits; all rows of a call share it but the per-row temperature."""

    weight: torch.Tensor  # [V, H]
    bias: torch.Tensor | None  # [V]
    temperature: torch.Tensor | float  # [N], or one for all
    logit_scale: float
    softcap: float | None
    forbidden: torch.Tensor | None

    def inverse_temperature(self, rows: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor | float:
        if isinstance(self.temperature, torch.Tensor):
            return self.temperature[rows].to(dtype).reciprocal()[:, None]
        return 1.0 / self.temperature

    def row_scale(self, rows: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor | float:
        """c = logit_scale / temperature, as [n, 1] or a float."""
        return self.logit_scale * self.inverse_temperature(rows, dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def project(hidden_nH: torch.Tensor, head: Head, out_nV: torch.Tensor) -> None:
    """logits = h W^T + b with the accumulator's precision, into `out_nV`."""
    weight = head.weight
    if hidden_nH.dtype == weight.dtype == out_nV.dtype:
        torch.mm(hidden_nH, weight.T, out=out_nV)
    elif hidden_nH.is_cuda and hidden_nH.dtype != torch.float32:
        torch.mm(hidden_nH, weight.to(hidden_nH.dtype).T, out_dtype=torch.float32, out=out_nV)
    else:
        wide = hidden_nH.to(out_nV.dtype)
        for tile in _weight_tiles(weight):
            out_nV[:, tile] = wide @ weight[tile].to(hidden_nH.dtype).to(out_nV.dtype).T
    if head.bias is not None:
        out_nV.add_(head.bias)


def back_project(kept_nV: torch.Tensor, head: Head, compute: torch.dtype) -> torch.Tensor:
    """K W in the accumulator's precision, [n, H]."""
    weight, wide = head.weight, accumulator(compute)
    if weight.dtype == compute == kept_nV.dtype:
        return kept_nV @ weight
    if kept_nV.is_cuda and compute != torch.float32:
        return torch.mm(kept_nV.to(compute), weight.to(compute), out_dtype=torch.float32)
    out = kept_nV.new_zeros(len(kept_nV), weight.shape[1], dtype=wide)
    for tile in _weight_tiles(weight):
        out.addmm_(kept_nV[:, tile].to(wide), weight[tile].to(compute).to(wide))
    return out


def _weight_tiles(weight_VH: torch.Tensor) -> list[slice]:
    rows = max(1, UPCAST_BYTES // (4 * weight_VH.shape[1]))
    return [slice(start, start + rows) for start in range(0, len(weight_VH), rows)]


def chunk_rows(vocabulary: int, itemsize: int, workspace: int | None, on_cpu: bool) -> int:
    """Rows of a chunk: the tile takes at most half of a given workspace, what is kept takes the rest."""
    budget = CPU_TILE_BYTES if on_cpu else TILE_BYTES
    if workspace is not None:
        budget = min(budget, workspace // 2)
    return max(1, budget // (vocabulary * itemsize))


def kept_rows(vocabulary: int, compute: torch.dtype, workspace: int | None, device: torch.device) -> int:
    """Rows whose probabilities may be kept for the weight gradient."""
    itemsize = torch.empty(0, dtype=compute).element_size()
    if workspace is not None:
        budget = workspace // 2
    elif device.type == "cuda":
        budget = torch.cuda.mem_get_info(device)[0] // 4
    else:
        budget = KEPT_BYTES_CPU
    return budget // (vocabulary * itemsize)


class Forward(NamedTuple):
    """[N] statistics, zero in rows that were not asked for, and the gradients of one unit of upstream."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    mean_logits: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    unit_grad: torch.Tensor  # d logprob / d hidden [N, H], empty without a gradient
    entropy_unit_grad: torch.Tensor  # d entropy / d hidden [N, H], empty unless asked for
    kept: torch.Tensor  # K of the first kept gradient rows
    target_weight: torch.Tensor  # a of all rows


def forward(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    head: Head,
    *,
    grad_rows: torch.Tensor,  # rows whose gradient is made, if `grad`
    plain_rows: torch.Tensor,  # live rows without one
    outputs: tuple[str, ...],
    unit: bool,
    entropy_grad: bool,
    keep: int,
    workspace: int | None,
) -> Forward:
    wide = accumulator(hidden_NH.dtype)
    rows, vocabulary = len(hidden_NH), len(head.weight)
    grad = unit or keep > 0
    result = blank_forward(hidden_NH, vocabulary, outputs, unit=unit, entropy_grad=entropy_grad, keep=keep)
    size = chunk_rows(vocabulary, wide.itemsize, workspace, hidden_NH.device.type == "cpu")
    buffer = hidden_NH.new_empty(min(size, rows), vocabulary, dtype=wide)
    done = 0
    for wanted, with_grad in ((grad_rows, grad), (plain_rows, False)):
        for at in wanted.split(size):
            if not len(at):
                continue
            hidden, targets = hidden_NH[at], targets_N[at]
            logits = buffer[: len(at)]
            project(hidden, head, logits)
            inverse = head.inverse_temperature(at, wide)
            part = row_pass(
                logits,
                targets,
                inverse,
                head.logit_scale,
                head.softcap,
                head.forbidden,
                outputs,
                with_grad,
                with_grad and entropy_grad,
            )
            _store(result, at, part)
            if with_grad:
                _store_grads(result, at, part, hidden, targets, head, done)
                done += len(at)
    return result


def blank_forward(
    hidden_NH: torch.Tensor, vocabulary: int, outputs: tuple[str, ...], *, unit: bool, entropy_grad: bool, keep: int
) -> Forward:
    """Zeros of the right shapes: rows that nobody asks for stay so."""
    wide, rows, width = accumulator(hidden_NH.dtype), *hidden_NH.shape

    def asked(name: str, dtype: torch.dtype = wide) -> torch.Tensor:
        return hidden_NH.new_zeros(rows if name in outputs else 0, dtype=dtype)

    return Forward(
        hidden_NH.new_zeros(rows, dtype=wide),
        asked("entropy"),
        asked("is_top1", torch.bool),
        asked("mean_logits"),
        asked("log_sum_sq_probs"),
        hidden_NH.new_zeros(rows if unit else 0, width),
        hidden_NH.new_zeros(rows if unit and entropy_grad else 0, width),
        hidden_NH.new_empty(min(keep, rows), vocabulary),
        hidden_NH.new_zeros(rows if unit or keep else 0, dtype=wide),
    )


def _store(result: Forward, at, part: Rows) -> None:
    result.logprobs[at] = part.logprobs
    for name in ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs"):
        if (value := getattr(part, name)) is not None:
            getattr(result, name)[at] = value


def _store_grads(result: Forward, at, part: Rows, hidden, targets, head: Head, done: int) -> None:
    wide, compute = accumulator(hidden.dtype), hidden.dtype
    scale = head.row_scale(at, wide)
    assert part.kept is not None and part.target_weight is not None
    result.target_weight[at] = part.target_weight
    if len(result.unit_grad):
        towards_target = part.target_weight[:, None] * head.weight[targets].to(compute).to(wide)
        unit = (towards_target - back_project(part.kept, head, compute)) * scale
        result.unit_grad[at] = unit.to(compute)
    if len(result.entropy_unit_grad) and part.entropy_kept is not None:
        result.entropy_unit_grad[at] = (back_project(part.entropy_kept, head, compute) * -scale).to(compute)
    if (room := len(result.kept) - done) > 0:
        kept = part.kept[:room]
        result.kept[done : done + len(kept)] = kept * FP16_SCALE if compute == torch.float16 else kept


def entropy_unit_grad(hidden_NH: torch.Tensor, head: Head, rows: torch.Tensor, workspace: int | None) -> torch.Tensor:
    """d entropy / d hidden [N, H], recomputed: the lazy mode's 4NHV."""
    wide = accumulator(hidden_NH.dtype)
    out = torch.zeros_like(hidden_NH)
    for at, entropy_kept in _recomputed(hidden_NH, head, rows, workspace, want_entropy=True):
        out[at] = (back_project(entropy_kept, head, hidden_NH.dtype) * -head.row_scale(at, wide)).to(out.dtype)
    return out


def head_grads(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    head: Head,
    *,
    rows: torch.Tensor,  # the gradient rows, in the order in which they were kept
    kept: torch.Tensor,
    target_weight_N: torch.Tensor,
    grad_logprobs_N: torch.Tensor,
    grad_entropy_N: torch.Tensor | None,
    workspace: int | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dW = U^T (g X) and db: X's rows are scaled, never U; fp32 accumulation; kept rows are not recomputed."""
    compute, wide = hidden_NH.dtype, accumulator(hidden_NH.dtype)
    grad_weight = hidden_NH.new_zeros(head.weight.shape, dtype=wide)
    grad_bias = None if head.bias is None else hidden_NH.new_zeros(len(head.weight), dtype=wide)
    scale = head.row_scale(rows, wide)
    g = (grad_logprobs_N[rows].to(wide)[:, None] * scale).squeeze(1)
    largest = g.abs().max().clamp(min=torch.finfo(wide).tiny) if compute == torch.float16 and len(g) else 1.0

    def accumulate(matrix_nV: torch.Tensor, at: torch.Tensor, coefficient_n: torch.Tensor, factor: float) -> None:
        """grad -= matrix^T (coefficient X) / factor; halves are multiplied in the compute dtype, safely scaled."""
        scaled = hidden_NH[at].to(wide) * (coefficient_n / largest)[:, None]
        if matrix_nV.is_cuda and compute not in (torch.float32, torch.float64):
            update = torch.mm(matrix_nV.to(compute).T, scaled.to(compute), out_dtype=torch.float32)
            grad_weight.sub_(update * (largest / factor))
        else:
            grad_weight.addmm_(matrix_nV.T.to(wide), scaled * (largest / factor), alpha=-1)
        if grad_bias is not None:
            grad_bias.sub_(torch.mv(matrix_nV.T.to(wide), coefficient_n) / factor)

    held = min(len(kept), len(rows))
    if held:
        accumulate(kept[:held], rows[:held], g[:held], FP16_SCALE if compute == torch.float16 else 1.0)
    at_target = g * target_weight_N[rows]
    grad_weight.index_add_(0, targets_N[rows], hidden_NH[rows].to(wide) * at_target[:, None])
    if grad_bias is not None:
        grad_bias.index_add_(0, targets_N[rows], at_target)
    if held < len(rows):
        rest = rows[held:]
        for at, matrix in _recomputed(hidden_NH, head, rest, workspace, targets=targets_N):
            coefficient = (grad_logprobs_N[at].to(wide)[:, None] * head.row_scale(at, wide)).squeeze(1)
            accumulate(matrix, at, coefficient, 1.0)
    if grad_entropy_N is not None:
        for at, matrix in _recomputed(hidden_NH, head, rows, workspace, want_entropy=True):
            accumulate(matrix, at, (grad_entropy_N[at].to(wide)[:, None] * head.row_scale(at, wide)).squeeze(1), 1.0)
    return grad_weight, grad_bias


def _recomputed(hidden_NH, head: Head, rows, workspace, *, targets=None, want_entropy: bool = False):
    """Chunks of rows with their K (or E) made again."""
    wide, vocabulary = accumulator(hidden_NH.dtype), len(head.weight)
    size = chunk_rows(vocabulary, wide.itemsize, workspace, hidden_NH.device.type == "cpu")
    buffer = hidden_NH.new_empty(min(size, max(1, len(rows))), vocabulary, dtype=wide)
    for start in range(0, len(rows), size):
        at = rows[start : start + size]
        logits = buffer[: len(at)]
        project(hidden_NH[at], head, logits)
        chosen = targets[at] if targets is not None else torch.zeros_like(at)
        inverse = head.inverse_temperature(at, wide)
        part = row_pass(
            logits, chosen, inverse, head.logit_scale, head.softcap, head.forbidden, (), not want_entropy, want_entropy
        )
        yield at, part.entropy_kept if want_entropy else part.kept
