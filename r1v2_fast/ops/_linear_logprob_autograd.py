"""The registered ops behind `linear_logprobs`, and the autograd function that scales rows by what arrives.

One registered boundary a call, on flattened [N, H] inputs: what runs inside is opaque to a compiler, its shapes are not.
"""

from __future__ import annotations

import torch

from r1v2_fast.ops import _linear_logprob_chunks as chunks
from r1v2_fast.ops import _linear_logprob_native as native
from r1v2_fast.ops._backend import on_device_of
from r1v2_fast.ops._linear_logprob_matmul import accumulator, exact
from r1v2_fast.ops._linear_logprob_pass import Plan, kept_rows
from r1v2_fast.ops._linear_logprob_rows import OUTPUTS, Shaping
from r1v2_fast.ops._linear_logprob_shard import shard_of
from r1v2_fast.ops._once import differentiable_once

_SHARED = (
    "Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? temperature_N, float temperature, "
    "float logit_scale, float? softcap, int ignore_index, Tensor? forbidden, Tensor? needs_grad, int? workspace, "
    "str group, str backend"
)
torch.library.define(
    "r1v2_fast::linear_logprob_forward",
    f"({_SHARED}, str[] outputs, bool unit, bool entropy_grad, int keep, float tolerance) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("r1v2_fast::linear_logprob_entropy_grad", f"({_SHARED}) -> Tensor")
torch.library.define(
    "r1v2_fast::linear_logprob_head_grads",
    f"({_SHARED}, Tensor kept, Tensor kept_factor, Tensor target_weight, Tensor grad_logprobs, Tensor? grad_entropy) "
    "-> (Tensor, Tensor)",
)


def blocked_ids(forbidden: torch.Tensor | None, vocabulary: int, first: int) -> torch.Tensor | None:
    """[V] bool of the ids from `first` on; an id that is not among them is another shard's."""
    if forbidden is None:
        return None
    ids = forbidden - first
    ids = ids.where((ids >= 0) & (ids < vocabulary), vocabulary)
    return torch.zeros(vocabulary + 1, dtype=torch.bool, device=ids.device).index_fill_(0, ids, True)[:vocabulary]


def check_targets(targets_N: torch.Tensor, forbidden: torch.Tensor | None, vocabulary: int, ignore_index: int) -> None:
    """Values are looked at where that costs no sync."""
    if targets_N.device.type != "cpu":
        return
    live = targets_N != ignore_index
    bad = live & ((targets_N < 0) | (targets_N >= vocabulary))
    if bad.any():
        row = int(bad.nonzero()[0])
        raise ValueError(f"targets must lie in [0, {vocabulary}), got {int(targets_N[row])} at token {row}")
    if forbidden is None:
        return
    if len(outside := forbidden[(forbidden < 0) | (forbidden >= vocabulary)]):
        raise ValueError(f"forbidden ids must lie in [0, {vocabulary}), got {outside.tolist()}")
    if (hit := live & torch.isin(targets_N, forbidden)).any():
        row = int(hit.nonzero()[0])
        raise ValueError(f"target {int(targets_N[row])} at token {row} is forbidden: its log-prob would be -inf")


def _cleaned(hidden, temperature_N, targets, ignore_index: int):
    """Ignored rows go along on a GPU, where leaving them out would sync: what they hold must not reach a sum."""
    if hidden.device.type == "cpu":
        return hidden, temperature_N
    dead = targets == ignore_index
    if temperature_N is not None:
        temperature_N = temperature_N.masked_fill(dead, 1.0)
    return hidden.masked_fill(dead[:, None], 0), temperature_N


def _prepared(
    hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, workspace,
    group, backend, outputs=(), tolerance=0.0,
) -> tuple[torch.Tensor, Plan]:  # fmt: skip
    """(hidden, the plan), fit for ignored rows to go along."""
    hidden, temperature_N = _cleaned(hidden, temperature_N, targets, ignore_index)
    shard = shard_of(group, len(weight))
    return hidden, Plan(
        weight,
        Shaping(
            None if bias is None else bias.contiguous(),
            temperature if temperature_N is None else temperature_N,
            logit_scale,
            softcap,
            blocked_ids(forbidden, len(weight), 0 if shard is None else shard.first),
        ),
        hidden.dtype,
        tuple(outputs),
        native.resolved(backend, hidden, len(weight)),
        shard,
        workspace,
        ignore_index,
        tolerance,
    )


_captured: list[torch.Tensor] = []  # what a CUDA graph reads when it is replayed


def _upload(index: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device without a sync."""
    if device.type == "cpu":
        return index
    index = index.pin_memory()
    if torch.cuda.is_current_stream_capturing():
        _captured.append(index)
    return index.to(device, non_blocking=True)


def _split_rows(targets_N, needs_grad_N, ignore_index: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(rows with a gradient, None for all; live rows without). On a GPU ignored rows stay in: leaving them out syncs."""
    device = targets_N.device
    live = targets_N != ignore_index if device.type == "cpu" else None
    if needs_grad_N is None:
        return (None if live is None or live.all() else live.nonzero().squeeze(1)), None
    wanted, rest = needs_grad_N, ~needs_grad_N
    if live is not None:
        wanted, rest = wanted & live, rest & live
    return _upload(wanted.nonzero().squeeze(1), device), _upload(rest.nonzero().squeeze(1), device)


@torch.library.impl("r1v2_fast::linear_logprob_forward", "default")
def _forward_impl(
    hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, needs_grad,
    workspace, group, backend, outputs, unit, entropy_grad, keep, tolerance,
):  # fmt: skip
    hidden, plan = _prepared(
        hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, workspace,
        group, backend, outputs, tolerance,
    )  # fmt: skip
    check_targets(targets, forbidden, plan.whole_vocabulary, ignore_index)
    if tolerance and hidden.is_cuda and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("grad_tolerance costs a sync, which CUDA graph capture forbids; use grad_tolerance=0")
    grad_rows, plain_rows = _split_rows(targets, needs_grad if unit or keep >= 0 else None, ignore_index)
    with exact(hidden.device.type), on_device_of(hidden):
        return tuple(
            chunks.forward(
                hidden, targets, plan, grad_rows=grad_rows, plain_rows=plain_rows, unit=unit, entropy_grad=entropy_grad, keep=keep
            )
        )  # fmt: skip


@torch.library.register_fake("r1v2_fast::linear_logprob_forward")
def _forward_fake(
    hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, needs_grad,
    workspace, group, backend, outputs, unit, entropy_grad, keep, tolerance,
):  # fmt: skip
    return tuple(
        chunks.blank_forward(hidden, len(weight), tuple(outputs), unit=unit, entropy_grad=entropy_grad, keep=keep)
    )


@torch.library.impl("r1v2_fast::linear_logprob_entropy_grad", "default")
def _entropy_grad_impl(
    hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, needs_grad,
    workspace, group, backend,
):  # fmt: skip
    hidden, plan = _prepared(
        hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, workspace,
        group, backend,
    )  # fmt: skip
    rows, _ = _split_rows(targets, needs_grad, ignore_index)
    with exact(hidden.device.type), on_device_of(hidden):
        return chunks.entropy_unit_grad(hidden, targets, plan, rows)


@torch.library.register_fake("r1v2_fast::linear_logprob_entropy_grad")
def _entropy_grad_fake(hidden, *arguments):
    return hidden.new_empty(hidden.shape, dtype=chunks.unit_dtype(hidden.dtype))


@torch.library.impl("r1v2_fast::linear_logprob_head_grads", "default")
def _head_grads_impl(
    hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, needs_grad,
    workspace, group, backend, kept, kept_factor, target_weight, grad_logprobs, grad_entropy,
):  # fmt: skip
    hidden, plan = _prepared(
        hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, workspace,
        group, backend,
    )  # fmt: skip
    rows, _ = _split_rows(targets, needs_grad, ignore_index)
    live = targets != ignore_index
    with exact(hidden.device.type), on_device_of(hidden):
        grad_weight, grad_bias = chunks.head_grads(
            hidden,
            targets,
            plan,
            grad_rows=rows,
            kept=kept,
            kept_factor_N=kept_factor,
            target_weight_N=target_weight,
            grad_logprobs_N=grad_logprobs.where(live, 0),
            grad_entropy_N=None if grad_entropy is None else grad_entropy.where(live, 0),
        )
    return grad_weight, hidden.new_empty(0, dtype=grad_weight.dtype) if grad_bias is None else grad_bias


@torch.library.register_fake("r1v2_fast::linear_logprob_head_grads")
def _head_grads_fake(hidden, weight, bias, *arguments):
    wide = accumulator(hidden.dtype)
    return hidden.new_empty(weight.shape, dtype=wide), hidden.new_empty(0 if bias is None else len(weight), dtype=wide)


_forward = torch.ops.r1v2_fast.linear_logprob_forward.default
_entropy_unit_grad = torch.ops.r1v2_fast.linear_logprob_entropy_grad.default
_head_grads = torch.ops.r1v2_fast.linear_logprob_head_grads.default


class LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden,
        needs_grad, workspace, group, backend, outputs, entropy_grad, tolerance, grad_enabled,
    ):  # fmt: skip
        unit = grad_enabled and ctx.needs_input_grad[0]
        trains_head = grad_enabled and (ctx.needs_input_grad[1] or ctx.needs_input_grad[2])
        keep = kept_rows(len(weight), hidden.dtype, workspace, hidden.device) if trains_head else -1
        shared = (
            temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden, needs_grad, workspace, group, backend,
        )  # fmt: skip
        logprobs, entropy, is_top1, mean_logits, log_sum_sq_probs, *made = _forward(
            hidden, weight, bias, targets, *shared, list(outputs), unit, entropy_grad is True, keep, tolerance
        )
        ctx.shared, ctx.entropy_grad, ctx.trains_head = shared[1:5] + shared[7:], entropy_grad, trains_head
        ctx.set_materialize_grads(False)
        ctx.hidden_dtype = hidden.dtype
        again = (hidden, weight, bias, targets, temperature_N, forbidden, needs_grad)
        if not (trains_head or (entropy_grad is None and unit)):  # nothing is recomputed
            again = (None,) * 7
        ctx.save_for_backward(*again, *made)
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
    @differentiable_once
    def backward(ctx, grad_logprobs, grad_entropy, *unused):
        (
            hidden, weight, bias, targets, temperature_N, forbidden, needs_grad,
            unit, factor, entropy_unit, kept, kept_factor, target_weight,
        ) = ctx.saved_tensors  # fmt: skip
        nothing = (None,) * 15
        if ctx.entropy_grad is False:
            grad_entropy = None
        if grad_logprobs is None and grad_entropy is None:
            return None, None, None, *nothing
        temperature, logit_scale, softcap, ignore_index, workspace, group, backend = ctx.shared
        shared = (
            hidden, weight, bias, targets, temperature_N, temperature, logit_scale, softcap, ignore_index, forbidden,
            needs_grad, workspace, group, backend,
        )  # fmt: skip
        grad_hidden = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            silent = factor == 0  # such rows have no gradient, whatever arrives
            if grad_entropy is None:
                scale = (grad_logprobs * factor).masked_fill(silent, 0)
                grad_hidden = torch.empty_like(unit, dtype=ctx.hidden_dtype)
                torch.mul(unit, scale[:, None], out=grad_hidden)  # in one pass, without an fp32 copy
            else:
                if ctx.entropy_grad is None:
                    entropy_unit = _entropy_unit_grad(*shared)
                total = entropy_unit * grad_entropy.masked_fill(silent, 0)[:, None]
                if grad_logprobs is not None:
                    total = total + unit * (grad_logprobs * factor).masked_fill(silent, 0)[:, None]
                grad_hidden = total.to(ctx.hidden_dtype)
        if ctx.trains_head:
            if grad_logprobs is None:
                grad_logprobs = torch.zeros_like(grad_entropy)
            grad_weight, grad_bias = _head_grads(*shared, kept, kept_factor, target_weight, grad_logprobs, grad_entropy)
            grad_weight = grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None
            grad_bias = grad_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None
        return grad_hidden, grad_weight, grad_bias, *nothing
