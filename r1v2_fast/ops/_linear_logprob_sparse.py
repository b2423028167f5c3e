"""The row-sparse hidden gradient: of D W only the rows of W that hold all but `tolerance` of a row's probability.

n rows, H hidden, V vocabulary (of this shard), K kept entries of a row. What is dropped weighs at most tolerance, so
d logprob / d hidden errs by at most tolerance |logit_scale / temperature| max_v |W_v|. The target's term is always kept.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from r1v2_fast.ops._linear_logprob_matmul import back_project, project
from r1v2_fast.ops._linear_logprob_pass import (
    Plan,
    add_target,
    candidates,
    fused_rows,
    run_chunk,
    triton_head,
    triton_rows,
)
from r1v2_fast.ops._linear_logprob_rows import Raw

FOLD = 16  # rows of the view in which the largest entries are looked for
FEW, MANY = 64, 2048  # entries looked for, first and then; a row that needs more is multiplied densely


class Dense:
    """Rows of D that keep too many entries, collected over chunks: one matmul of many rows beats many of a few."""

    def __init__(self, most: int) -> None:
        self.most = most  # rows held at a time
        self.held: list[tuple[torch.Tensor, ...]] = []

    def add(self, rows_m: torch.Tensor, matrix_mV, own_m, targets_m) -> None:
        self.held.append((rows_m, matrix_mV, own_m, targets_m))

    def flush(self, unit_NH: torch.Tensor, plan: Plan, *, all_: bool) -> None:
        """D W of the held rows into `unit_NH`, if there are many or if they are all."""
        if not self.held or not (all_ or sum(len(held[0]) for held in self.held) >= self.most):
            return
        at, matrix, own, targets = (torch.cat(parts) for parts in zip(*self.held, strict=True))
        product = add_target(back_project(matrix, plan.weight, plan.compute), own, targets, plan)
        unit_NH[at] = product.to(unit_NH.dtype)
        self.held.clear()


def unit_product(hidden_nH, targets_n, at, plan: Plan, logits_nV, dense: Dense) -> tuple[Raw, torch.Tensor]:
    """(statistics, D scale W [n, H] within the tolerance, summed over the shards), but for rows given to `dense`."""
    if plan.fused:
        raw, product = _fused(hidden_nH, targets_n, at, plan, logits_nV)
    else:
        chunk = run_chunk(hidden_nH, targets_n, at, plan, logits_nV, grad=True)
        assert chunk.matrix is not None
        raw, (product, left) = chunk.raw, _torch(chunk.matrix, chunk.raw, plan)
        if plan.shard is not None:  # another shard has other rows left: all join one sum
            product[left] = back_project(chunk.matrix[left], plan.weight, plan.compute)
            product.mul_(raw.scale[:, None])
        elif len(left):
            dense.add(_among(at, left), chunk.matrix[left], raw.at_target()[left], targets_n[left])
        add_target(product, raw.at_target(), plan.here(targets_n), plan)
    if plan.shard is not None:
        plan.shard.sum(product)
    return raw, product


def _among(at: torch.Tensor | slice, rows_m: torch.Tensor) -> torch.Tensor:
    """Rows of the call, from rows of a chunk."""
    return at[rows_m] if isinstance(at, torch.Tensor) else rows_m + at.start


def _budget(plan: Plan) -> float:
    """Mass that this shard may drop."""
    return plan.tolerance if plan.shard is None else plan.tolerance / plan.shard.group.size()


def _torch(matrix_nV: torch.Tensor, raw: Raw, plan: Plan) -> tuple[torch.Tensor, torch.Tensor]:
    """(D W [n, H] within the budget, the rows left to a dense matmul); the matrix is 0 at the targets."""
    scale = raw.scale / raw.sum()  # p f = D scale
    exact = plan.shaping.softcap is None and plan.shard is None
    mass = raw.others / raw.sum() if exact else matrix_nV.sum(1) * scale
    # sums round: what they may have lost counts as dropped
    budget = _budget(plan) - 32 * torch.finfo(mass.dtype).eps * mass
    # K entries hold at most sqrt(K sum of squares): a row that is flat beyond that is not searched
    needed = ((mass - budget).clamp(min=0) / scale).square() / torch.linalg.vector_norm(matrix_nV, dim=1).square()
    product = matrix_nV.new_zeros(len(matrix_nV), plan.weight.shape[1], dtype=plan.wide)
    left = torch.ones_like(mass, dtype=torch.bool)
    for most in (FEW, min(MANY, plan.vocabulary // 128)):
        at = (left & (needed <= most)).nonzero().squeeze(1)
        if not FEW <= most < plan.vocabulary or not len(at):
            continue
        values, ids = _largest(matrix_nV, at, most)
        short = mass[at, None] - (values * scale[at, None]).cumsum(1) > budget[at, None]
        wanted = torch.cat((torch.ones_like(short[:, :1]), short[:, :-1]), 1)  # up to the first that suffices
        done = ~short[:, -1]
        product[at[done]] = _gathered(values[done], ids[done], wanted[done], plan)
        left[at[done]] = False
    return product, left.nonzero().squeeze(1)


def _largest(matrix_nV: torch.Tensor, at_m: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """topk(most) of some rows, and faster: the largest entries of a row seen as [FOLD, V / FOLD] lie in the `most` columns
    whose maxima are largest."""
    vocabulary = matrix_nV.shape[1]
    width = vocabulary // FOLD
    if most * 4 > width:
        return matrix_nV[at_m].topk(most, dim=1)
    maxima = matrix_nV[:, : width * FOLD].unflatten(1, (FOLD, width)).amax(1)
    columns = maxima[at_m].topk(most, dim=1).indices
    ids = (columns[:, None] + width * torch.arange(FOLD, device=columns.device)[:, None]).flatten(1)
    tail = torch.arange(width * FOLD, vocabulary, device=columns.device).expand(len(ids), -1)
    ids = torch.cat((ids, tail), 1)
    values, where = matrix_nV[at_m[:, None], ids].topk(most, dim=1)
    return values, ids.gather(1, where)


def _gathered(values_mK: torch.Tensor, ids_mK: torch.Tensor, wanted_mK: torch.Tensor, plan: Plan) -> torch.Tensor:
    """Sum of value W[id] over the wanted entries, in the accumulator's precision."""
    counts, flat = wanted_mK.sum(1), ids_mK[wanted_mK]
    weight, wide = plan.weight, plan.wide
    if not weight.dtype == plan.compute == wide:
        used, flat = flat.unique(return_inverse=True)
        weight = weight[used].to(plan.compute).to(wide)
    return F.embedding_bag(flat, weight, counts.cumsum(0) - counts, mode="sum", per_sample_weights=values_mK[wanted_mK])


def _fused(hidden_nH, targets_n, at, plan: Plan, logits_nV) -> tuple[Raw, torch.Tensor]:
    from r1v2_fast.kernels import linear_logprob as kernel
    from r1v2_fast.kernels import linear_logprob_sparse as sparse

    targets, weight = plan.here(targets_n), plan.weight
    project(hidden_nH, weight, logits_nV)
    head = triton_head(logits_nV, plan.shaping, at, padded=True)
    whole = plan.combined(fused_rows(plan, head, targets, plan.outputs), targets)
    entries = sparse.launch_select(
        head, targets, whole.top.contiguous(), whole.sum(), _budget(plan), candidates(plan.vocabulary)
    )
    product = logits_nV.new_empty(len(logits_nV), weight.shape[1])
    own_value = whole.at_target()
    sparse.launch_gather(entries, targets, whole.sum(), own_value, weight, kernel.STORED[plan.compute], product)
    dense = (entries[2] < 0).nonzero().squeeze(1)  # the sync that a tolerance costs, one a chunk
    if len(dense):
        product[dense] = _dense(logits_nV[dense], targets[dense], at, dense, plan, whole, own_value[dense])
    return whole, product


def _dense(logits_mV, targets_m, at, dense, plan: Plan, whole: Raw, own_value_m: torch.Tensor) -> torch.Tensor:
    """D scale W of the rows that keep too many."""
    matrix = torch.empty_like(logits_mV, dtype=plan.compute)
    own = triton_rows(triton_head(logits_mV, plan.shaping, _among(at, dense)), targets_m, (), matrix, own=False)
    scale = own.scale * (own.top - whole.top[dense]).exp()
    product = back_project(matrix, plan.weight, plan.compute) * scale[:, None]
    return add_target(product, own_value_m, targets_m, plan)
