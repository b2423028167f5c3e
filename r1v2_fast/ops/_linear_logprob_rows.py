"""The row pass on torch, and what turns its raw statistics into log-probs: shared with the Triton kernel and by shards.

n rows of a chunk, V vocabulary (of this shard). z the logits after scale, softcap and temperature, t the target,
c = logit_scale / temperature, f = 1 - (s / softcap)^2, m the row's maximum, S = sum of exp(z - m), p = exp(z - m) / S.

    d logprob / d hidden = -(c scale / S) (D W)    D scale = exp(z - m) f, and at the target -(S - exp(z_t - m)) f_t
    d entropy / d hidden = -(c / S) (E W)          E = exp(z - m) (log p + entropy) f

Dividing a row of D W by S is cheaper than dividing V of its terms, and lets D be written before S is known.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch

OUTPUTS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")


@dataclass(frozen=True)
class Shaping:
    """From matmul to z: bias, scale, softcap, temperature, and ids of probability 0."""

    bias: torch.Tensor | None  # [V]
    temperature: torch.Tensor | float  # [N], or one for all
    logit_scale: float
    softcap: float | None
    blocked: torch.Tensor | None  # [V] bool

    def temperature_of(self, rows: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor | float:
        """[n, 1], or a float."""
        t = self.temperature
        return t[rows].to(dtype)[:, None] if isinstance(t, torch.Tensor) else t

    def row_scale(self, rows: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor | float:
        """c = logit_scale / temperature, [n] or a float."""
        t = self.temperature
        return self.logit_scale / (t[rows].to(dtype) if isinstance(t, torch.Tensor) else t)


class Raw(NamedTuple):
    """Rows of one tensor [10, n]; what was not asked for is 0."""

    top: torch.Tensor  # m
    others: torch.Tensor  # sum over v != t of exp(z - m)
    target: torch.Tensor  # z_t, -inf where this shard has no such id
    factor: torch.Tensor  # f_t
    scale: torch.Tensor  # exp(z - m) f = D scale
    weighted: torch.Tensor  # sum over v != t of exp(z - m) (z - m)
    squares: torch.Tensor  # sum over v != t of exp(z - m)^2
    total: torch.Tensor  # sum of z over allowed ids
    allowed: torch.Tensor  # how many these are
    beaten: torch.Tensor  # above 0 where an id other than t is the first maximum

    def exponential(self) -> torch.Tensor:
        """exp(z_t - m), 1 exactly where the target is the maximum."""
        return (self.target - self.top).exp()

    def sum(self) -> torch.Tensor:
        """S."""
        return self.others + self.exponential()

    def at_target(self) -> torch.Tensor:
        """D scale at the target. 1 - p_t is a sum of the others: subtracting loses everything near p_t = 1."""
        return -self.others * self.factor

    def log_sum(self) -> torch.Tensor:
        """log S; the sum of the others keeps its relative precision where the target dominates."""
        return torch.where(self.target == self.top, self.others.log1p(), self.sum().log())

    def logprobs(self) -> torch.Tensor:
        return (self.target - self.top) - self.log_sum()

    def mean_distance(self) -> torch.Tensor:
        """Mean of z - m under p: log p + entropy = z - m - this, with no logarithm to round."""
        distance = (self.target - self.top).clamp(min=torch.finfo(self.top.dtype).min)
        return (self.weighted + self.exponential() * distance) / self.sum()

    def entropy(self) -> torch.Tensor:
        return self.log_sum() - self.mean_distance()

    def result(self, name: str) -> torch.Tensor:
        """[n], one of OUTPUTS or "logprobs"."""
        if name == "is_top1":
            return self.beaten == 0
        if name == "mean_logits":
            return self.total / self.allowed
        if name == "log_sum_sq_probs":
            return (self.squares + self.exponential().square()).log() - 2 * self.log_sum()
        return self.logprobs() if name == "logprobs" else self.entropy()


def raw_room(like: torch.Tensor, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """[10, n], uninitialised."""
    return like.new_empty(len(Raw._fields), rows, dtype=dtype)


def raw_of(stacked: torch.Tensor) -> Raw:
    return Raw(*stacked.unbind(0))


def settled(values_N: torch.Tensor, targets_N: torch.Tensor, vocabulary: int, ignore_index: int) -> torch.Tensor:
    """0 in ignored rows, NaN where a target is outside the vocabulary (on a CPU that raised already)."""
    dead = targets_N == ignore_index
    if values_N.is_floating_point():
        values_N = values_N.masked_fill(~dead & ((targets_N < 0) | (targets_N >= vocabulary)), torch.nan)
    return values_N.masked_fill(dead, 0)


class Rows(NamedTuple):
    raw: Raw
    matrix: torch.Tensor | None  # exp(z - m) f [n, V] over the logits, 0 at the target
    entropy_terms: torch.Tensor | None  # exp(z - m) (z - m), 0 at the target
    damping: torch.Tensor | None  # f [n, V], with a softcap


@functools.cache
def _first_exp() -> None:
    """PyTorch's first parallel exp of a process, after a matmul, may err by 1e-4 in one thread's first row (4 of 24
    processes, torch 2.13, 2026-11-24); after one exp on one thread none did."""
    torch.zeros(1).exp_()


def shape_logits(
    z_nV: torch.Tensor, shaping: Shaping, rows: torch.Tensor | slice, *, damping: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(z in place of the matmul h W^T, f if asked for and there is a softcap)."""
    if z_nV.device.type == "cpu":
        _first_exp()
    factor = None
    if shaping.bias is not None:
        z_nV.add_(shaping.bias)
    if shaping.logit_scale != 1.0:
        z_nV.mul_(shaping.logit_scale)
    if shaping.softcap is not None:
        z_nV.div_(shaping.softcap).tanh_()
        if damping:
            factor = 1 - z_nV.square()
        z_nV.mul_(shaping.softcap)
    temperature = shaping.temperature_of(rows, z_nV.dtype)
    if isinstance(temperature, torch.Tensor) or temperature != 1.0:
        z_nV.div_(temperature)
    return z_nV, factor


def row_pass(
    z_nV: torch.Tensor,  # h W^T, overwritten
    targets_n: torch.Tensor,  # ids of this shard; others are elsewhere
    shaping: Shaping,
    rows: torch.Tensor | slice,  # for the temperature
    outputs: tuple[str, ...],
    *,
    grad: bool,
    entropy_grad: bool = False,
) -> Rows:
    z, damping = shape_logits(z_nV, shaping, rows, damping=grad or entropy_grad)
    zeros = z.new_zeros(len(z))
    here = (targets_n >= 0) & (targets_n < z.shape[1])
    index = targets_n.clamp(0, z.shape[1] - 1)[:, None]
    total = allowed = beaten = weighted = squares = zeros
    if "mean_logits" in outputs:
        total = (z if shaping.blocked is None else z.masked_fill(shaping.blocked, 0)).sum(1)
        allowed = zeros + (z.shape[1] if shaping.blocked is None else (~shaping.blocked).sum())
    if shaping.blocked is not None:
        z.masked_fill_(shaping.blocked, -torch.inf)
    top = z.amax(1).clamp_(min=torch.finfo(z.dtype).min)  # a shard may hold forbidden ids alone
    at_target = z.gather(1, index)
    target = at_target.squeeze(1).where(here, -torch.inf)
    if "is_top1" in outputs:
        ids = torch.arange(z.shape[1], device=z.device)
        beaten = ((z > at_target) | ((z == at_target) & (ids < index))).any(1).to(z.dtype)
    factor = zeros + 1 if damping is None else damping.gather(1, index).squeeze(1)
    distance = z.sub_(top[:, None])
    terms = None
    if "entropy" in outputs or entropy_grad:
        terms = distance.clamp(min=torch.finfo(z.dtype).min)  # 0 times -inf would be NaN
    e = distance.exp_()
    e.scatter_(1, index, e.gather(1, index).masked_fill_(here[:, None], 0))
    others = e.sum(1)
    if terms is not None:
        weighted = terms.mul_(e).sum(1)
    if "log_sum_sq_probs" in outputs:
        squares = torch.linalg.vector_norm(e, dim=1).square()  # vecdot would hold e^2
    raw = Raw(top, others, target, factor, zeros + 1, weighted, squares, total, allowed, beaten)
    if not (grad or entropy_grad):
        return Rows(raw, None, None, None)
    return Rows(raw, e, terms if entropy_grad else None, damping)


def gradient_matrix(part: Rows) -> torch.Tensor:
    """D but for its target column, over the logits' memory."""
    assert part.matrix is not None
    return part.matrix if part.damping is None else part.matrix.mul_(part.damping)


def entropy_matrix(part: Rows, whole: Raw, targets_n: torch.Tensor) -> torch.Tensor:
    """E over the terms' memory; `whole` are the statistics of all shards. To be called before `gradient_matrix`."""
    assert part.matrix is not None and part.entropy_terms is not None
    shift = (part.raw.top - whole.top) - whole.mean_distance()
    matrix = part.entropy_terms.addcmul_(part.matrix, shift[:, None])
    distance = part.raw.target - part.raw.top
    own = torch.where(distance == -torch.inf, 0, distance.exp() * (distance + shift))
    place(matrix, targets_n, own)
    if part.damping is not None:
        matrix.mul_(part.damping)
    return matrix


def place(matrix_nV: torch.Tensor, targets_n: torch.Tensor, values_n: torch.Tensor) -> None:
    """matrix[i, targets[i]] = values[i] where this shard has the target."""
    here = (targets_n >= 0) & (targets_n < matrix_nV.shape[1])
    index = targets_n.clamp(0, matrix_nV.shape[1] - 1)[:, None]
    own = matrix_nV.gather(1, index).squeeze(1)
    matrix_nV.scatter_(1, index, values_n.to(own.dtype).where(here, own)[:, None])
