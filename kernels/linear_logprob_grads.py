"""Elementwise over logits whose row statistics are known: the entropy's matrix, and the gradient in the logits themselves.

n rows, V vocabulary. One read and one write a logit, over the logits where they are the caller's to give.
"""

import torch
import triton
import triton.language as tl

from . import _launch
from ._logits import logits_of
from .linear_logprob import STORED

FP16_SCALE = 2.0**11  # of E in fp16: |E| stays below 23 for any vocabulary that fits


@triton.jit
def entropy_kernel(
    logits,  # [n, V] rows `stride` apart
    temperatures,  # [n] fp32, or unused
    bias,  # [V], or unused
    blocked,  # [V] bool, or unused
    top,  # [n] fp32: m of this shard
    shift,  # [n] fp32: log p + entropy = z - m + shift
    matrix,  # [n, V] STORED rows `matrix_stride` apart, out: E = exp(z - m) (log p + entropy) f
    V,
    width,
    stride,
    matrix_stride,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_BLOCKED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    FACTOR: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PER_TOKEN:
        temperature = tl.load(temperatures + row)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z, f = logits_of(
        logits + row * stride, bias, blocked, ids, V, width, logit_scale, softcap, temperature,
        HAS_BIAS, HAS_BLOCKED, HAS_SCALE, HAS_SOFTCAP, HAS_TEMPERATURE,
    )  # fmt: skip
    distance = tl.where(z > -float("inf"), z - tl.load(top + row), 0.0)
    e = tl.where(z > -float("inf"), tl.exp(distance) * (distance + tl.load(shift + row)), 0.0)
    if HAS_SOFTCAP:
        e *= f
    tl.store(matrix + row * matrix_stride + ids, (e * FACTOR).to(STORED), mask=ids < V)


@triton.jit
def logits_grad_kernel(
    logits,  # [n, V] rows `stride` apart
    temperatures,  # [n] fp32, or unused
    bias,
    blocked,  # [V] bool, or unused
    targets,  # [n] int64
    known,  # [6, n] fp32: m, S, S - exp(z_t - m), mean of z - m, and the gradients that arrived in logprob and entropy
    grad,  # [n, V] STORED rows `grad_stride` apart, out; may be the logits
    n,
    V,
    width,
    stride,
    grad_stride,
    logit_scale,
    softcap,
    temperature,
    HAS_BIAS: tl.constexpr,
    HAS_BLOCKED: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_TEMPERATURE: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    ENTROPY: tl.constexpr,
    STORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if PER_TOKEN:
        temperature = tl.load(temperatures + row)
    ids = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    z, f = logits_of(
        logits + row * stride, bias, blocked, ids, V, width, logit_scale, softcap, temperature,
        HAS_BIAS, HAS_BLOCKED, HAS_SCALE, HAS_SOFTCAP, HAS_TEMPERATURE,
    )  # fmt: skip
    known += row
    top, whole, rest = tl.load(known), tl.load(known + n), tl.load(known + 2 * n)
    g = tl.load(known + 4 * n)
    p = tl.exp(z - top) / whole
    total = tl.where(ids == tl.load(targets + row), rest / whole, -p) * g  # d logp_t / d z_v = 1[v = t] - p_v
    if ENTROPY:  # d entropy / d z_v = -p_v (log p_v + entropy)
        distance = tl.where(p > 0.0, z - top, 0.0)
        total -= p * (distance - tl.load(known + 3 * n)) * tl.load(known + 5 * n)
    if HAS_SOFTCAP:
        total *= f
    if HAS_TEMPERATURE:
        total = total / temperature
    silent = g == 0.0
    if ENTROPY:
        silent = silent & (tl.load(known + 5 * n) == 0.0)
    total = tl.where(silent, 0.0, total)  # an ignored row may hold anything
    tl.store(grad + row * grad_stride + ids, total.to(STORED), mask=ids < V)


def _grid(rows: int, V: int, block: int) -> tuple[int, int]:
    return rows, triton.cdiv(V, block)


def launch_entropy(head: dict, top_n: torch.Tensor, shift_n: torch.Tensor, matrix_nV: torch.Tensor) -> float:
    """Writes E times the factor that it returns."""
    factor = FP16_SCALE if matrix_nV.dtype == torch.float16 else 1.0
    block, warps = _tile(head)
    if len(matrix_nV):
        entropy_kernel[_grid(len(matrix_nV), head["V"], block)](
            **head, top=top_n, shift=shift_n, matrix=matrix_nV, matrix_stride=matrix_nV.stride(0), FACTOR=factor,
            STORED=STORED[matrix_nV.dtype], BLOCK=block, num_warps=warps,
        )  # fmt: skip
    return factor


def launch_logits_grad(
    head: dict, targets_n: torch.Tensor, known: torch.Tensor, grad_nV: torch.Tensor, *, entropy: bool
) -> None:
    block, warps = _tile(head)
    assert targets_n.is_contiguous() and known.is_contiguous()
    if len(grad_nV):
        logits_grad_kernel[_grid(len(grad_nV), head["V"], block)](
            **head, targets=targets_n, known=known, grad=grad_nV, n=known.stride(0), grad_stride=grad_nV.stride(0),
            ENTROPY=entropy, STORED=STORED[grad_nV.dtype], BLOCK=block, num_warps=warps,
        )  # fmt: skip


def _tile(head: dict) -> tuple[int, int]:
    chosen = _launch.parameters("linear_logprob", head["logits"].device, head["V"])
    return chosen["BLOCK"], chosen["num_warps"]
