"""Log-probs from logits that the caller holds: one read forward; one read and one write backward.

N rows, V vocabulary; rows are widened chunk by chunk, so half logits never stand in fp32 whole.
"""

from __future__ import annotations

import torch

from r1v2_fast.ops._linear_logprob_chunks import accumulator, chunk_rows
from r1v2_fast.ops._linear_logprob_rows import row_pass

torch.library.define(
    "r1v2_fast::logits_logprob_forward",
    "(Tensor logits, Tensor targets, Tensor? temperature_N, float temperature, float? softcap, Tensor? forbidden, "
    "int ignore_index, str[] outputs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "r1v2_fast::logits_logprob_backward_",
    "(Tensor(a!) logits, Tensor targets, Tensor? temperature_N, float temperature, float? softcap, Tensor? forbidden, "
    "int ignore_index, Tensor? grad_logprobs, Tensor? grad_entropy) -> ()",
)


def _passes(logits, targets, temperature_N, temperature, softcap, forbidden, outputs, grad, entropy_grad):
    """(rows, row pass) over chunks of a widened copy."""
    wide = accumulator(logits.dtype)
    size = chunk_rows(logits.shape[1], wide.itemsize, None, logits.device.type == "cpu")
    for start in range(0, len(logits), size):
        at = slice(start, start + size)
        inverse = 1.0 / temperature if temperature_N is None else temperature_N[at].to(wide).reciprocal()[:, None]
        copied = logits[at].to(wide, copy=True)
        yield at, inverse, row_pass(copied, targets[at], inverse, 1.0, softcap, forbidden, outputs, grad, entropy_grad)


def _zeros(logits: torch.Tensor, outputs: list[str]) -> list[torch.Tensor]:
    wide, rows = accumulator(logits.dtype), len(logits)
    names = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
    dtypes = (wide, torch.bool, wide, wide)
    extras = [logits.new_zeros(rows if n in outputs else 0, dtype=d) for n, d in zip(names, dtypes, strict=True)]
    return [logits.new_zeros(rows, dtype=wide), *extras]


@torch.library.impl("r1v2_fast::logits_logprob_forward", "default")
def _forward_impl(logits, targets, temperature_N, temperature, softcap, forbidden, ignore_index, outputs):
    from r1v2_fast.ops.linear_logprob import check_targets

    check_targets(targets, forbidden, logits.shape[1], ignore_index)
    live = targets != ignore_index
    bounded = targets.clamp(0, logits.shape[1] - 1)
    results = _zeros(logits, outputs)
    settings = (temperature_N, temperature, softcap, forbidden, tuple(outputs), False, False)
    for at, _, rows in _passes(logits, bounded, *settings):
        for result, value in zip(results, rows[:5], strict=True):
            if value is not None:
                result[at] = value
    bad = live & (bounded != targets)
    for result in results:
        if len(result):
            result.masked_fill_(~live, 0)
            result.masked_fill_(bad, torch.nan if result.is_floating_point() else 0)
    return tuple(results)


@torch.library.register_fake("r1v2_fast::logits_logprob_forward")
def _forward_fake(logits, targets, temperature_N, temperature, softcap, forbidden, ignore_index, outputs):
    return tuple(_zeros(logits, outputs))


@torch.library.impl("r1v2_fast::logits_logprob_backward_", "default")
def _backward_impl(
    logits, targets, temperature_N, temperature, softcap, forbidden, ignore_index, grad_logprobs, grad_entropy
):
    live = (targets != ignore_index)[:, None]
    bounded = targets.clamp(0, logits.shape[1] - 1)
    settings = (temperature_N, temperature, softcap, forbidden, (), True, grad_entropy is not None)
    for at, inverse, rows in _passes(logits, bounded, *settings):
        total = rows.kept  # d logprob / d logits = c (a 1hot - K)
        if grad_logprobs is None:
            total = total.zero_()
        else:
            g = grad_logprobs[at].to(total.dtype)
            total.mul_(-g[:, None])
            total.scatter_add_(1, bounded[at][:, None], (g * rows.target_weight)[:, None])
        if grad_entropy is not None:  # d entropy / d logits = -c E
            total.sub_(rows.entropy_kept * grad_entropy[at].to(total.dtype)[:, None])
        logits[at] = (total * inverse).masked_fill_(~live[at], 0).to(logits.dtype)


@torch.library.register_fake("r1v2_fast::logits_logprob_backward_")
def _backward_fake(*arguments):
    return None


_forward = torch.ops.r1v2_fast.logits_logprob_forward.default
_backward = torch.ops.r1v2_fast.logits_logprob_backward_.default


class _LogitsLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        logits,
        targets,
        temperature_N,
        temperature,
        softcap,
        forbidden,
        ignore_index,
        outputs,
        entropy_grad,
        inplace,
    ):
        logprobs, entropy, is_top1, mean_logits, log_sum_sq_probs = _forward(
            logits, targets, temperature_N, temperature, softcap, forbidden, ignore_index, list(outputs)
        )
        ctx.save_for_backward(logits, targets, temperature_N, forbidden)
        ctx.settings = (temperature, softcap, ignore_index, entropy_grad, inplace)
        ctx.set_materialize_grads(False)
        constant = [is_top1, mean_logits, log_sum_sq_probs]
        ctx.mark_non_differentiable(*(constant if entropy_grad else [entropy, *constant]))
        return logprobs, entropy, is_top1, mean_logits, log_sum_sq_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_logprobs, grad_entropy, *unused):
        logits, targets, temperature_N, forbidden = ctx.saved_tensors
        temperature, softcap, ignore_index, entropy_grad, inplace = ctx.settings
        if not entropy_grad:
            grad_entropy = None
        if grad_logprobs is None and grad_entropy is None:
            return (None,) * 10
        grad = logits.detach() if inplace else logits.detach().clone()
        _backward(
            grad, targets, temperature_N, temperature, softcap, forbidden, ignore_index, grad_logprobs, grad_entropy
        )
        return grad, *(None,) * 9


def from_logits(
    logits, targets, *, temperature, softcap, forbidden, ignore_index, outputs, entropy_grad, inplace_grad
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    shape = targets.shape
    per_token = isinstance(temperature, torch.Tensor)
    results = _LogitsLogProb.apply(
        logits.reshape(-1, logits.shape[-1]),
        targets.reshape(-1),
        temperature.expand(shape).reshape(-1) if per_token else None,
        1.0 if per_token else float(temperature),
        softcap,
        forbidden,
        ignore_index,
        outputs,
        entropy_grad and "entropy" in outputs,
        inplace_grad,
    )
    names = ("entropy", "is_top1", "mean_logits", "log_sum_sq_probs")
    extras = [v.reshape(shape) if n in outputs else None for n, v in zip(names, results[1:], strict=True)]
    return results[0].reshape(shape), extras
