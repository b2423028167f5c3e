"""The loops over chunks: the forward with the hidden gradient made in it, and the head's gradients in the backward.

N rows, H hidden, V vocabulary (of this shard), n rows of a chunk. No logits outlive their chunk unless kept. D and E as in
`_linear_logprob_rows`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from r1v2_fast.ops import _linear_logprob_rows as rows
from r1v2_fast.ops import _linear_logprob_sparse as sparse
from r1v2_fast.ops._linear_logprob_matmul import accumulator, add_outer, back_project
from r1v2_fast.ops._linear_logprob_pass import Chunk, Plan, padded, room, run_chunk
from r1v2_fast.ops._linear_logprob_rows import Raw

FP16_SCALE = 2.0**15  # kept probabilities in fp16 would go subnormal below 6e-5


class Forward(NamedTuple):
    """[N] statistics, 0 in ignored rows, and the gradients of one unit of upstream."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    is_top1: torch.Tensor
    mean_logits: torch.Tensor
    log_sum_sq_probs: torch.Tensor
    unit: torch.Tensor  # d logprob / d hidden = factor unit; [N, H], empty without a gradient
    factor: torch.Tensor  # [N]
    entropy_unit: torch.Tensor  # d entropy / d hidden [N, H], empty unless asked for
    kept: torch.Tensor  # D of the first kept gradient rows, rows padded to 128 bytes
    kept_factor: torch.Tensor  # [N]: d logprob / d (h W^T) = kept_factor D
    target_weight: torch.Tensor  # [N]: and at the target, where D leaves it out


def unit_dtype(compute: torch.dtype) -> torch.dtype:
    """Products with D before its scale would outgrow fp16."""
    return torch.float32 if compute == torch.float16 else compute


def blank_forward(
    hidden_NH: torch.Tensor, vocabulary: int, outputs: tuple[str, ...], *, unit: bool, entropy_grad: bool, keep: int
) -> Forward:
    """Zeros of the right shapes: rows that nobody asks for stay so."""
    compute, (count, width) = hidden_NH.dtype, hidden_NH.shape
    wide = accumulator(compute)
    stored = unit_dtype(compute)

    def asked(name: str, dtype: torch.dtype = wide) -> torch.Tensor:
        return hidden_NH.new_zeros(count if name in outputs else 0, dtype=dtype)

    return Forward(
        hidden_NH.new_zeros(count, dtype=wide),
        asked("entropy"),
        asked("is_top1", torch.bool),
        asked("mean_logits"),
        asked("log_sum_sq_probs"),
        hidden_NH.new_zeros(count if unit else 0, width, dtype=stored),
        hidden_NH.new_zeros(count if unit else 0, dtype=wide),
        hidden_NH.new_zeros(count if unit and entropy_grad else 0, width, dtype=stored),
        hidden_NH.new_empty(torch.sym_min(max(keep, 0), count), padded(vocabulary, compute)),
        hidden_NH.new_zeros(count if keep >= 0 else 0, dtype=wide),
        hidden_NH.new_zeros(count if keep >= 0 else 0, dtype=wide),
    )


Index = torch.Tensor | slice


def _spans(rows_of: torch.Tensor | None, start: int, stop: int, size: int) -> Iterator[tuple[int, int, Index]]:
    """(start, stop, rows of the call) of each chunk of `rows_of` (None: every row)."""
    for first in range(start, stop, size):
        last = min(first + size, stop)
        yield first, last, slice(first, last) if rows_of is None else rows_of[first:last]


def forward(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    plan: Plan,
    *,
    grad_rows: torch.Tensor | None,  # rows whose gradient is made, if one is; None: every row
    plain_rows: torch.Tensor | None,  # live rows without one
    unit: bool,
    entropy_grad: bool,
    keep: int,  # rows whose D may be kept; -1: the head does not train
) -> Forward:
    result = blank_forward(hidden_NH, plan.vocabulary, plan.outputs, unit=unit, entropy_grad=entropy_grad, keep=keep)
    count = len(hidden_NH) if grad_rows is None else len(grad_rows)
    keep = min(max(keep, 0), count)
    result.kept[:, plan.vocabulary :].zero_()  # padding that a kernel may read
    stacked = rows.raw_room(hidden_NH, len(hidden_NH), plan.wide).zero_()
    unit_scale, kept_scale = torch.zeros_like(stacked[:2])  # 0 stays where no gradient is made
    size = plan.chunk_rows(count, keep, unit or keep > 0, entropy_grad)
    dense = sparse.Dense(size)
    space: torch.Tensor | None = None
    wanted = [(span, True) for span in (*_spans(grad_rows, 0, keep, size), *_spans(grad_rows, keep, count, size))]
    if plain_rows is not None:
        wanted += [(span, False) for span in _spans(plain_rows, 0, len(plain_rows), size)]
    for (first, last, at), with_grad in wanted:
        is_kept = with_grad and first < keep
        with_grad = is_kept or (with_grad and unit)
        into = result.kept[first:last, : plan.vocabulary] if is_kept else None
        if into is not None and into.dtype == plan.wide and not entropy_grad:
            logits, into = into, None
        else:
            if space is None:
                space = room(hidden_NH, min(size, len(hidden_NH)), plan.vocabulary, plan.wide)
            logits = space[: last - first]
        hidden, targets = hidden_NH[at], targets_N[at]
        if with_grad and unit and not is_kept and plan.tolerance:
            raw, product = sparse.unit_product(hidden, targets, at, plan, logits, dense)
            stacked[:, at] = torch.stack(raw)
            result.unit[at], unit_scale[at] = product.to(result.unit.dtype), 1.0
            dense.flush(result.unit, plan, all_=False)
            continue
        chunk = run_chunk(
            hidden,
            targets,
            at,
            plan,
            logits,
            grad=with_grad,
            entropy_grad=with_grad and unit and entropy_grad,
            into=into,
        )
        stacked[:, at] = torch.stack(chunk.raw)
        if with_grad:
            _store_grads(result, at, chunk, targets, plan, (first, last) if is_kept else None, unit_scale, kept_scale)
    dense.flush(result.unit, plan, all_=True)
    _finish(result, rows.raw_of(stacked), targets_N, plan, unit_scale, kept_scale)
    return result


def _store_grads(
    result: Forward,
    at: Index,
    chunk: Chunk,
    targets_n,
    plan: Plan,
    kept: tuple[int, int] | None,
    unit_scale,
    kept_scale,
) -> None:
    raw = chunk.raw
    if len(result.unit):
        result.unit[at] = _summed(chunk.product(targets_n, plan), plan).to(result.unit.dtype)
        unit_scale[at] = torch.ones_like(raw.scale) if plan.target_apart else raw.scale
    if chunk.entropy_matrix is not None:
        result.entropy_unit[at] = _entropy_product(chunk, at, plan).to(result.entropy_unit.dtype)
    if kept is not None:
        matrix, kept_scale[at] = _storable(chunk, plan)
        place = result.kept[kept[0] : kept[1], : plan.vocabulary]
        if matrix.data_ptr() != place.data_ptr():
            place.copy_(matrix)


def _storable(chunk: Chunk, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(D, its scale) as it can stand in the compute dtype: in fp16 p 2^15, which a kernel has written so already."""
    assert chunk.matrix is not None
    if plan.compute != torch.float16 or chunk.matrix.dtype == plan.compute:
        return chunk.matrix, chunk.raw.scale
    whole = chunk.raw.sum() / FP16_SCALE
    return chunk.matrix * (chunk.raw.scale / whole)[:, None], whole


def _summed(product_nH: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Over the shards, in the accumulator's precision."""
    if plan.shard is not None:
        plan.shard.sum(product_nH)
    return product_nH


def _finish(result: Forward, raw: Raw, targets_N: torch.Tensor, plan: Plan, unit_scale, kept_scale) -> None:
    """Log-probs, statistics and factors of all rows from their raw statistics."""

    def store(out: torch.Tensor, values: torch.Tensor) -> None:
        out.copy_(rows.settled(values, targets_N, plan.whole_vocabulary, plan.ignore_index))

    store(result.logprobs, raw.logprobs())
    for name in plan.outputs:
        store(getattr(result, name), raw.result(name))
    factor = _factor(raw, slice(None), plan)
    if len(result.factor):
        store(result.factor, (factor * unit_scale).masked_fill(unit_scale == 0, 0))  # 0 even in a row of NaN
    if len(result.kept_factor):
        store(result.kept_factor, (factor * kept_scale).masked_fill(kept_scale == 0, 0))
        store(
            result.target_weight, plan.shaping.row_scale(slice(None), plan.wide) * (raw.others / raw.sum() * raw.factor)
        )


def _factor(raw: Raw, at: Index, plan: Plan) -> torch.Tensor:
    """-c / S [n]."""
    return -(plan.shaping.row_scale(at, plan.wide) / raw.sum())


def _recomputed(
    hidden_NH, targets_N, plan: Plan, grad_rows: torch.Tensor | None, start: int, kept: int, *, entropy: bool
) -> Iterator[tuple[Index, Chunk]]:
    """Chunks of the gradient rows from `start` on, with their D (or E) made again."""
    count = len(hidden_NH) if grad_rows is None else len(grad_rows)
    size = plan.chunk_rows(count - start, kept, not entropy, entropy)
    space = room(hidden_NH, max(0, min(size, count - start)), plan.vocabulary, plan.wide)
    for first, last, at in _spans(grad_rows, start, count, size):
        logits = space[: last - first]
        yield at, run_chunk(hidden_NH[at], targets_N[at], at, plan, logits, grad=not entropy, entropy_grad=entropy)


def entropy_unit_grad(hidden_NH, targets_N, plan: Plan, grad_rows: torch.Tensor | None) -> torch.Tensor:
    """d entropy / d hidden [N, H], recomputed: the lazy mode's 4NHV."""
    out = torch.zeros_like(hidden_NH, dtype=unit_dtype(plan.compute))
    for at, chunk in _recomputed(hidden_NH, targets_N, plan, grad_rows, 0, 0, entropy=True):
        out[at] = _entropy_product(chunk, at, plan).to(out.dtype)
    return out


def _entropy_product(chunk: Chunk, at: Index, plan: Plan) -> torch.Tensor:
    """d entropy / d hidden of a chunk, [n, H]."""
    assert chunk.entropy_matrix is not None
    product = back_project(chunk.entropy_matrix, plan.weight, plan.compute)
    return _summed(product * entropy_factor(chunk, at, plan)[:, None], plan)


def entropy_factor(chunk: Chunk, at: Index, plan: Plan) -> torch.Tensor:
    """[n]: d entropy / d (h W^T) = factor E."""
    assert chunk.entropy_scale is not None
    return _factor(chunk.raw, at, plan) * chunk.entropy_scale


def head_grads(
    hidden_NH: torch.Tensor,
    targets_N: torch.Tensor,
    plan: Plan,
    *,
    grad_rows: torch.Tensor | None,  # in the order in which they were kept
    kept: torch.Tensor,
    kept_factor_N: torch.Tensor,
    target_weight_N: torch.Tensor,
    grad_logprobs_N: torch.Tensor,  # 0 in ignored rows
    grad_entropy_N: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dW = D^T (k g X) and db: X's rows are scaled, never D; fp32 accumulation; kept rows are not recomputed."""
    compute, wide = plan.compute, plan.wide
    grad_weight = hidden_NH.new_empty(plan.weight.shape, dtype=wide)
    grad_bias = None if plan.shaping.bias is None else hidden_NH.new_empty(plan.vocabulary, 1, dtype=wide)
    unit: torch.Tensor | float = 1.0
    if compute == torch.float16 and len(hidden_NH):  # what arrives may leave its range: the largest is divided out
        arrived = grad_logprobs_N[None] if grad_entropy_N is None else torch.stack((grad_logprobs_N, grad_entropy_N))
        largest = (arrived if grad_rows is None else arrived[:, grad_rows]).abs().flatten()
        unit = torch.cat((largest, largest.new_full((1,), 1e-30))).amax() / FP16_SCALE
    fresh = True

    def accumulate(matrix_nV: torch.Tensor, at: Index, coefficient_n: torch.Tensor) -> None:
        nonlocal fresh
        coefficient_n = (coefficient_n / unit)[:, None]
        add_outer(grad_weight, matrix_nV, hidden_NH[at].to(wide) * coefficient_n, compute, fresh=fresh)
        if grad_bias is not None:
            add_outer(grad_bias, matrix_nV, coefficient_n, compute, fresh=fresh)
        fresh = False

    count = len(hidden_NH) if grad_rows is None else len(grad_rows)
    held = min(len(kept), count)
    if held:
        at = slice(0, held) if grad_rows is None else grad_rows[:held]
        accumulate(kept[:held, : plan.vocabulary], at, grad_logprobs_N[at] * kept_factor_N[at])
    for at, chunk in _recomputed(hidden_NH, targets_N, plan, grad_rows, held, held, entropy=False):
        matrix, scale = _storable(chunk, plan)
        accumulate(matrix, at, grad_logprobs_N[at] * (_factor(chunk.raw, at, plan) * scale))
    if grad_entropy_N is not None:
        for at, chunk in _recomputed(hidden_NH, targets_N, plan, grad_rows, 0, held, entropy=True):
            assert chunk.entropy_matrix is not None
            accumulate(chunk.entropy_matrix, at, grad_entropy_N[at] * entropy_factor(chunk, at, plan))
    for grad in (grad_weight, grad_bias):
        if grad is not None and fresh:
            grad.zero_()
        elif grad is not None and isinstance(unit, torch.Tensor):
            grad.mul_(unit)
    if plan.target_apart:
        _add_targets(grad_weight, grad_bias, hidden_NH, targets_N, grad_logprobs_N * target_weight_N, plan, grad_rows)
    return grad_weight, None if grad_bias is None else grad_bias.squeeze(1)


def _add_targets(grad_weight, grad_bias, hidden_NH, targets_N, coefficient_N, plan: Plan, grad_rows) -> None:
    """The target's terms of dW and db; index_put adds in a fixed order, index_add on a GPU does not."""
    at = slice(None) if grad_rows is None else grad_rows
    targets = plan.here(targets_N[at])
    here = (targets >= 0) & (targets < plan.vocabulary)
    index = (targets.clamp(0, plan.vocabulary - 1),)
    coefficient = coefficient_N[at].where(here, 0)
    grad_weight.index_put_(index, hidden_NH[at].to(plan.wide) * coefficient[:, None], accumulate=True)
    if grad_bias is not None:
        grad_bias.index_put_(index, coefficient[:, None], accumulate=True)
