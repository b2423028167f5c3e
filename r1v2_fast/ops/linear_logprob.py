"""Per-token log-probs under a linear head, with the hidden gradient made in the forward.

N tokens, H hidden size, V vocabulary. The registered ops work on flattened [N, H] inputs; the autograd function
outside them scales rows by what arrives.
"""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import torch

from r1v2_fast.ops import _backend
from r1v2_fast.ops import _linear_logprob_chunks as chunks
from r1v2_fast.ops._linear_logprob_logits import from_logits

OUTPUTS = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_backend.register("linear_logprob")


class LogProbs(NamedTuple):
    logprobs: torch.Tensor
    entropy: torch.Tensor | None = None
    is_top1: torch.Tensor | None = None
    mean_logits: torch.Tensor | None = None
    log_sum_sq_probs: torch.Tensor | None = None


def linear_logprobs(
    hidden: torch.Tensor,  # [..., H]
    weight: torch.Tensor,  # [V, H]
    targets: torch.Tensor,  # [...] int64
    *,
    bias: torch.Tensor | None = None,  # [V]
    temperature: float | torch.Tensor = 1.0,  # or [...] per token
    logit_scale: float = 1.0,
    softcap: float | None = None,
    ignore_index: int = -100,
    forbidden: torch.Tensor | None = None,  # int64 ids
    needs_grad: torch.Tensor | None = None,  # [...] bool
    outputs: tuple[str, ...] = (),
    entropy_grad: bool | None = None,
    workspace_bytes: int | None = None,
    backend: str = "auto",
) -> LogProbs:
    """logprob_t = z[t, target] - logsumexp(z[t]), z = softcap_(logit_scale (h W^T + b)) / temperature.

    shapes          hidden [..., H], weight [V, H], targets and every output [...]
    dtypes          bf16, fp16, fp32 -> fp32; fp64 -> fp64; the weight is cast to hidden's dtype (autocast's if enabled);
                    entropies and log-probs in nat
    outputs         of "entropy", "is_top1" (the target is the first maximum), "mean_logits" (mean of z over allowed
                    ids), "log_sum_sq_probs"; fields not asked for are None
    ignore_index    rows with this target give 0 and no gradient
    forbidden       ids of probability 0, out of every statistic
    needs_grad      False promises a zero gradient whatever arrives: 2NHV FLOPs instead of 4 for such rows
    entropy_grad    True: made in the forward; False: detached; None: recomputed when a gradient arrives (eager only)
    workspace_bytes memory for a logits tile and kept probabilities; None: 1 GiB tile and a quarter of free device
                    memory (CPU: 16 MiB and 1 GiB)
    differentiable  logprobs and entropy, with any upstream gradient, in hidden, weight and bias
    FLOPs           no gradient 2NHV; frozen head 4NHV; trainable head 6NHV while the kept probabilities fit, up to 8
    raises          ValueError on wrong shapes, dtypes, names, or (on the CPU) targets outside the vocabulary or
                    forbidden; RuntimeError where the backend cannot run
    source          d logprob_t / d h = logit_scale / T sum_v (1hot - p)_v (1 - (s_v / softcap)^2) W_v holds under any loss
    """
    _check(hidden, weight, targets, bias, temperature, forbidden, needs_grad, outputs)
    _backend.pick("linear_logprob", backend, hidden)
    if "entropy" not in outputs:
        entropy_grad = False
    elif entropy_grad is None and torch.compiler.is_compiling():
        raise ValueError("entropy_grad must be True or False under torch.compile, got None (recompute when it arrives)")
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    shape = targets.shape
    per_token = isinstance(temperature, torch.Tensor)
    results = _LinearLogProb.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1),
        temperature.expand(shape).reshape(-1) if isinstance(temperature, torch.Tensor) else None,
        1.0 if per_token else float(temperature),
        float(logit_scale),
        None if softcap is None else float(softcap),
        ignore_index,
        forbidden,
        None if needs_grad is None else needs_grad.reshape(-1),
        tuple(name for name in OUTPUTS if name in outputs),
        entropy_grad,
        workspace_bytes,
        torch.is_grad_enabled(),
    )
    logprobs, *extras = (result.reshape(shape) if result is not None else None for result in results)
    assert logprobs is not None
    return LogProbs(logprobs, *extras)


def logprobs_from_logits(
    logits: torch.Tensor,  # [..., V]
    targets: torch.Tensor,  # [...] int64
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    forbidden: torch.Tensor | None = None,
    ignore_index: int = -100,
    outputs: tuple[str, ...] = (),
    entropy_grad: bool = False,
    inplace_grad: bool = False,
    backend: str = "auto",
) -> LogProbs:
    """The row pass of `linear_logprobs` for callers that hold logits: logprob_t = z[t, target] - logsumexp(z[t]).

    shapes          logits [..., V]; targets and every output [...]
    dtypes          as linear_logprobs; the gradient has the logits' dtype
    inplace_grad    the backward writes the gradient over the logits, which are lost
    differentiable  logprobs, and entropy with entropy_grad=True, in logits
    raises          ValueError as linear_logprobs; RuntimeError where the backend cannot run
    """
    if logits.dim() < 1 or targets.shape != logits.shape[:-1]:
        raise ValueError(f"targets must be logits' {tuple(logits.shape[:-1])}, got {tuple(targets.shape)}")
    _check_values(targets, temperature, forbidden, outputs, logits)
    _backend.pick("linear_logprob", backend, logits)
    wanted = tuple(name for name in OUTPUTS if name in outputs)
    logprobs, extras = from_logits(
        logits,
        targets,
        temperature=temperature,
        softcap=softcap,
        forbidden=forbidden,
        ignore_index=ignore_index,
        outputs=wanted,
        entropy_grad=entropy_grad,
        inplace_grad=inplace_grad,
    )
    return LogProbs(logprobs, *extras)


def _check(hidden, weight, targets, bias, temperature, forbidden, needs_grad, outputs) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden [..., H] and weight [V, H] must agree, got {tuple(hidden.shape)}, {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must be hidden's {tuple(hidden.shape[:-1])}, got {tuple(targets.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [V] = {tuple(weight.shape[:1])}, got {tuple(bias.shape)}")
    if needs_grad is not None and (needs_grad.shape != targets.shape or needs_grad.dtype != torch.bool):
        raise ValueError(
            f"needs_grad must be bool {tuple(targets.shape)}, got {needs_grad.dtype} {tuple(needs_grad.shape)}"
        )
    _check_values(targets, temperature, forbidden, outputs, hidden)


def _check_values(targets, temperature, forbidden, outputs, values) -> None:
    if values.dtype not in DTYPES:
        raise ValueError(f"expected one of {[str(d) for d in DTYPES]}, got {values.dtype}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, got {targets.dtype}")
    if isinstance(temperature, torch.Tensor):
        if torch.broadcast_shapes(temperature.shape, targets.shape) != targets.shape:
            raise ValueError(f"temperature must be a float or {tuple(targets.shape)}, got {tuple(temperature.shape)}")
    elif not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if forbidden is not None and (forbidden.dim() != 1 or forbidden.dtype != torch.int64):
        raise ValueError(f"forbidden must be int64 [F], got {forbidden.dtype} {tuple(forbidden.shape)}")
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise ValueError(f"outputs must be among {OUTPUTS}, got {unknown}")


def check_targets(targets_N: torch.Tensor, forbidden: torch.Tensor | None, vocabulary: int, ignore_index: int) -> None:
    """Values are looked at where that costs no sync."""
    if targets_N.device.type != "cpu":
        return
    live = targets_N != ignore_index
    bad = live & ((targets_N < 0) | (targets_N >= vocabulary))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"targets must lie in [0, {vocabulary}), got {int(targets_N[row])} at token {row}")
    if forbidden is not None and (hit := live & torch.isin(targets_N, forbidden.cpu())).any():
        row = int(hit.nonzero()[0])
        raise ValueError(f"target {int(targets_N[row])} at token {row} is forbidden: its log-prob would be -inf")


def _split_rows(targets_N, needs_grad_N, ignore_index: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows with a gradient, live rows without). On a GPU ignored rows stay in, zeroed later: leaving them out syncs."""
    on_cpu = targets_N.device.type == "cpu"
    live = targets_N != ignore_index if on_cpu else torch.ones_like(targets_N, dtype=torch.bool)
    everything = torch.arange(len(targets_N), device=targets_N.device)
    nothing = everything[:0]
    if needs_grad_N is None:
        return (live.nonzero().squeeze(1) if on_cpu else everything), nothing
    if not on_cpu and needs_grad_N.device.type != "cpu" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "needs_grad on the device costs a sync, which CUDA graph capture forbids; pass it on the CPU"
        )
    wanted = needs_grad_N.to("cpu") & live.to("cpu") if on_cpu else needs_grad_N.to("cpu")
    rest = ~wanted & live.to("cpu") if on_cpu else ~wanted
    device = targets_N.device
    return wanted.nonzero().squeeze(1).to(device), rest.nonzero().squeeze(1).to(device)


@contextlib.contextmanager
def _exact_matmuls(device_type: str):
    """Autocast off (the op has chosen its dtype), and TF32 off."""
    with torch.autocast(device_type, enabled=False):
        if device_type != "cuda":
            yield
            return
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before


_HEAD = (
    "Tensor? temperature_N, float temperature, float logit_scale, float? softcap, int ignore_index, Tensor? forbidden"
)
torch.library.define(
    "r1v2_fast::linear_logprob_forward",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_HEAD}, Tensor? needs_grad, str[] outputs, "
    "bool unit, bool entropy_grad, int keep, int? workspace) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "r1v2_fast::linear_logprob_entropy_grad",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_HEAD}, Tensor? needs_grad, int? workspace) -> Tensor",
)
torch.library.define(
    "r1v2_fast::linear_logprob_head_grads",
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, {_HEAD}, Tensor? needs_grad, Tensor kept, "
    "Tensor target_weight, Tensor grad_logprobs, Tensor? grad_entropy, int? workspace) -> (Tensor, Tensor)",
)


@torch.library.impl("r1v2_fast::linear_logprob_forward", "default")
def _forward_impl(
    hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden,
    needs_grad, outputs, unit, entropy_grad, keep, workspace,
):  # fmt: skip
    check_targets(targets, forbidden, len(weight), ignore_index)
    head = chunks.Head(
        weight, bias, temperature if temperature_N is None else temperature_N, logit_scale, softcap, forbidden
    )
    grad_rows, plain_rows = _split_rows(targets, needs_grad if unit or keep else None, ignore_index)
    live = targets != ignore_index
    bounded = targets.clamp(0, len(weight) - 1)
    with _exact_matmuls(hidden.device.type):
        result = chunks.forward(
            hidden,
            bounded,
            head,
            grad_rows=grad_rows,
            plain_rows=plain_rows,
            outputs=tuple(outputs),
            unit=unit,
            entropy_grad=entropy_grad,
            keep=keep,
            workspace=workspace,
        )
    if hidden.device.type == "cpu":
        return tuple(result)
    bad = live & (bounded != targets)
    cleaned = []
    for index, value in enumerate(result):
        if index < 5 and len(value):
            value = value.where(live, torch.zeros_like(value))
            value = value.masked_fill(bad, torch.nan) if value.is_floating_point() else value & ~bad
        elif index in (5, 6) and len(value):
            value = value.masked_fill(~live[:, None], 0)
        cleaned.append(value)
    return tuple(cleaned)


@torch.library.register_fake("r1v2_fast::linear_logprob_forward")
def _forward_fake(
    hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden,
    needs_grad, outputs, unit, entropy_grad, keep, workspace,
):  # fmt: skip
    return tuple(
        chunks.blank_forward(hidden, len(weight), tuple(outputs), unit=unit, entropy_grad=entropy_grad, keep=keep)
    )


@torch.library.impl("r1v2_fast::linear_logprob_entropy_grad", "default")
def _entropy_grad_impl(
    hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden,
    needs_grad, workspace,
):  # fmt: skip
    head = chunks.Head(
        weight, bias, temperature if temperature_N is None else temperature_N, logit_scale, softcap, forbidden
    )
    rows, _ = _split_rows(targets, needs_grad, ignore_index)
    with _exact_matmuls(hidden.device.type):
        grad = chunks.entropy_unit_grad(hidden, head, rows, workspace)
    return grad if hidden.device.type == "cpu" else grad.masked_fill((targets == ignore_index)[:, None], 0)


@torch.library.register_fake("r1v2_fast::linear_logprob_entropy_grad")
def _entropy_grad_fake(hidden, *arguments):
    return hidden.new_empty(hidden.shape)


@torch.library.impl("r1v2_fast::linear_logprob_head_grads", "default")
def _head_grads_impl(
    hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden,
    needs_grad, kept, target_weight, grad_logprobs, grad_entropy, workspace,
):  # fmt: skip
    head = chunks.Head(
        weight, bias, temperature if temperature_N is None else temperature_N, logit_scale, softcap, forbidden
    )
    rows, _ = _split_rows(targets, needs_grad, ignore_index)
    live = targets != ignore_index
    with _exact_matmuls(hidden.device.type):
        grad_weight, grad_bias = chunks.head_grads(
            hidden,
            targets.clamp(0, len(weight) - 1),
            head,
            rows=rows,
            kept=kept,
            target_weight_N=target_weight,
            grad_logprobs_N=grad_logprobs.where(live, 0),
            grad_entropy_N=None if grad_entropy is None else grad_entropy.where(live, 0),
            workspace=workspace,
        )
    return grad_weight, hidden.new_empty(0, dtype=grad_weight.dtype) if grad_bias is None else grad_bias


@torch.library.register_fake("r1v2_fast::linear_logprob_head_grads")
def _head_grads_fake(hidden, weight, bias, *arguments):
    wide = chunks.accumulator(hidden.dtype)
    return hidden.new_empty(weight.shape, dtype=wide), hidden.new_empty(0 if bias is None else len(weight), dtype=wide)


_forward = torch.ops.r1v2_fast.linear_logprob_forward.default
_entropy_unit_grad = torch.ops.r1v2_fast.linear_logprob_entropy_grad.default
_head_grads = torch.ops.r1v2_fast.linear_logprob_head_grads.default


class _LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden,
        needs_grad, outputs, entropy_grad, workspace, grad_enabled,
    ):  # fmt: skip
        unit = grad_enabled and ctx.needs_input_grad[0]
        head = grad_enabled and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        keep = min(len(hidden), chunks.kept_rows(len(weight), hidden.dtype, workspace, hidden.device)) if head else 0
        # a head that trains needs K even where none fits, so that `a` is there for the target's rows
        shared = (temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, needs_grad)
        results = _forward(
            hidden,
            weight,
            bias,
            targets,
            *shared,
            list(outputs),
            unit,
            entropy_grad is True,
            max(keep, int(head)),
            workspace,
        )
        logprobs, entropy, is_top1, mean_logits, log_sum_sq_probs, unit_grad, entropy_unit, kept, target_weight = (
            results
        )
        ctx.shared, ctx.entropy_grad, ctx.workspace, ctx.trains_head = shared[1:5], entropy_grad, workspace, head
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            hidden,
            weight,
            bias,
            targets,
            temperature_N,
            forbidden,
            needs_grad,
            unit_grad,
            entropy_unit,
            kept,
            target_weight,
        )
        asked = [
            value if name in outputs else None
            for name, value in zip(OUTPUTS, (entropy, is_top1, mean_logits, log_sum_sq_probs), strict=True)
        ]
        constant = [v for v in asked[1:] if v is not None]
        if asked[0] is not None and entropy_grad is False:
            constant.append(asked[0])
        ctx.mark_non_differentiable(*constant)
        return (logprobs, *asked)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, *unused):
        (
            hidden, weight, bias, targets, temperature_N, forbidden, needs_grad, unit_grad, entropy_unit, kept, target_weight,
        ) = ctx.saved_tensors  # fmt: skip
        nothing = (None,) * 12
        if ctx.entropy_grad is False:
            grad_entropy = None
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, *nothing
        wide = chunks.accumulator(hidden.dtype)
        temperature, logit_scale, softcap, ignore_index = ctx.shared
        shared = (temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, needs_grad)
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            total = None
            if grad_logprobs is not None:
                total = unit_grad.to(wide) * grad_logprobs[:, None]
            if grad_entropy is not None:
                if ctx.entropy_grad is None:
                    entropy_unit = _entropy_unit_grad(hidden, weight, bias, targets, *shared, ctx.workspace)
                extra = entropy_unit.to(wide) * grad_entropy[:, None]
                total = extra if total is None else total + extra
            assert total is not None
            grad_hidden = total.to(hidden.dtype)
        if ctx.trains_head:
            if grad_logprobs is None:
                grad_logprobs = torch.zeros_like(grad_entropy)
            grad_weight, grad_bias = _head_grads(
                hidden, weight, bias, targets, *shared, kept, target_weight, grad_logprobs, grad_entropy, ctx.workspace
            )
            grad_weight = grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
            grad_bias = grad_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight, grad_bias, *nothing
