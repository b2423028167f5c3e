"""Log-probs from logits that the caller holds: one read forward; one read and one write backward.

N rows, V vocabulary. On torch rows are widened chunk by chunk, so that half logits never stand in fp32 whole.
"""

from __future__ import annotations

import torch

from r1v2_fast.ops import _linear_logprob_rows as rows
from r1v2_fast.ops._backend import on_device_of
from r1v2_fast.ops._linear_logprob_autograd import blocked_ids, check_targets
from r1v2_fast.ops._linear_logprob_matmul import accumulator
from r1v2_fast.ops._linear_logprob_pass import TILE_BYTES, triton_head, triton_rows
from r1v2_fast.ops._linear_logprob_rows import OUTPUTS, Shaping
from r1v2_fast.ops._once import differentiable_once

CPU_TILE_BYTES = 2 << 20  # no matmul here that wants many rows: what stays in a core's cache is faster

_SHARED = (
    "Tensor targets, Tensor? temperature_N, float temperature, float? softcap, Tensor? forbidden, int ignore_index, "
    "str backend"
)
_KNOWN = "Tensor known, Tensor? grad_logprobs, Tensor? grad_entropy"
torch.library.define(
    "r1v2_fast::logits_logprob_forward",
    f"(Tensor logits, {_SHARED}, str[] outputs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define("r1v2_fast::logits_logprob_backward", f"(Tensor logits, {_SHARED}, {_KNOWN}) -> Tensor")
torch.library.define("r1v2_fast::logits_logprob_backward_", f"(Tensor(a!) logits, {_SHARED}, {_KNOWN}) -> ()")


def _shaping(logits, temperature_N, temperature, softcap, forbidden) -> Shaping:
    blocked = blocked_ids(forbidden, logits.shape[1], 0)
    return Shaping(None, temperature if temperature_N is None else temperature_N, 1.0, softcap, blocked)


def _chunks(logits: torch.Tensor):
    tile = CPU_TILE_BYTES if logits.device.type == "cpu" else TILE_BYTES
    size = max(1, tile // (logits.shape[1] * accumulator(logits.dtype).itemsize))
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _blank(logits: torch.Tensor, outputs: list[str]) -> list[torch.Tensor]:
    """Log-probs, OUTPUTS, and for the backward m, S, S - exp(z_t - m) and the mean of z - m, [4, N]."""
    wide, count = accumulator(logits.dtype), len(logits)
    extras = [
        logits.new_empty(count if name in outputs else 0, dtype=torch.bool if name == "is_top1" else wide)
        for name in OUTPUTS
    ]
    return [logits.new_empty(count, dtype=wide), *extras, logits.new_empty(4, count, dtype=wide)]


@torch.library.impl("r1v2_fast::logits_logprob_forward", "default")
def _forward_impl(logits, targets, temperature_N, temperature, softcap, forbidden, ignore_index, backend, outputs):
    check_targets(targets, forbidden, logits.shape[1], ignore_index)
    shaping = _shaping(logits, temperature_N, temperature, softcap, forbidden)
    if backend == "triton":
        with on_device_of(logits):
            raw = triton_rows(triton_head(logits, shaping, slice(None)), targets, tuple(outputs))
    else:
        stacked = rows.raw_room(logits, len(logits), accumulator(logits.dtype))
        for at in _chunks(logits):
            wide = logits[at].to(stacked.dtype, copy=True)
            part = rows.row_pass(wide, targets[at], shaping, at, tuple(outputs), grad=False)
            stacked[:, at] = torch.stack(part.raw)
        raw = rows.raw_of(stacked)
    results = _blank(logits, outputs)
    for name, result in zip(("logprobs", *OUTPUTS), results[:5], strict=True):
        if name == "logprobs" or name in outputs:
            result.copy_(rows.settled(raw.result(name), targets, logits.shape[1], ignore_index))
    torch.stack((raw.top, raw.sum(), raw.others, raw.mean_distance()), out=results[5])
    return tuple(results)


@torch.library.register_fake("r1v2_fast::logits_logprob_forward")
def _forward_fake(logits, targets, temperature_N, temperature, softcap, forbidden, ignore_index, backend, outputs):
    return tuple(_blank(logits, outputs))


def _write_grad(
    out, logits, targets, temperature_N, temperature, softcap, forbidden, ignore_index, backend, known, grad_logprobs,
    grad_entropy,
):  # fmt: skip
    """d loss / d logits into `out`, which may be the logits."""
    shaping = _shaping(logits, temperature_N, temperature, softcap, forbidden)
    dead = targets == ignore_index
    arrived = [
        torch.zeros_like(known[0]) if grad is None else grad.to(known.dtype).masked_fill(dead, 0)
        for grad in (grad_logprobs, grad_entropy)
    ]
    if backend == "triton":
        from r1v2_fast.kernels import linear_logprob_grads as kernel

        known = torch.cat((known, torch.stack(arrived)))
        head = triton_head(logits, shaping, slice(None))
        with on_device_of(logits):
            kernel.launch_logits_grad(head, targets, known, out, entropy=grad_entropy is not None)
        return
    top, whole, others, mean_distance = known
    for at in _chunks(logits):
        z, damping = rows.shape_logits(logits[at].to(known.dtype, copy=True), shaping, at, damping=True)
        if shaping.blocked is not None:
            z.masked_fill_(shaping.blocked, -torch.inf)
        distance = z.sub_(top[at, None])
        p = distance.exp().div_(whole[at, None])
        g, h = (grad[at, None] for grad in arrived)
        total = p * -g
        rows.place(total, targets[at], (others[at] / whole[at]) * g.squeeze(1))
        if grad_entropy is not None:  # d entropy / d z = -p (log p + entropy)
            distance.clamp_(min=torch.finfo(p.dtype).min / 2).sub_(mean_distance[at, None])  # p is 0 there, not NaN
            total -= distance.mul_(p).mul_(h)
        if damping is not None:
            total *= damping
        temperature = shaping.temperature_of(at, total.dtype)
        if isinstance(temperature, torch.Tensor) or temperature != 1.0:
            total /= temperature
        out[at] = total.masked_fill_(dead[at, None], 0).to(out.dtype)


@torch.library.impl("r1v2_fast::logits_logprob_backward", "default")
def _backward_impl(logits, *arguments):
    out = torch.empty_like(logits)
    _write_grad(out, logits, *arguments)
    return out


@torch.library.register_fake("r1v2_fast::logits_logprob_backward")
def _backward_fake(logits, *arguments):
    return torch.empty_like(logits)


@torch.library.impl("r1v2_fast::logits_logprob_backward_", "default")
def _backward_inplace_impl(logits, *arguments):
    _write_grad(logits, logits, *arguments)
    torch.autograd.graph.increment_version(logits)  # autograd does not see a kernel write


@torch.library.register_fake("r1v2_fast::logits_logprob_backward_")
def _backward_inplace_fake(*arguments):
    return None


_forward = torch.ops.r1v2_fast.logits_logprob_forward.default
_backward = torch.ops.r1v2_fast.logits_logprob_backward.default
_backward_inplace = torch.ops.r1v2_fast.logits_logprob_backward_.default


class _LogitsLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, logits, targets, temperature_N, temperature, softcap, forbidden, ignore_index, backend, outputs, entropy_grad,
        inplace,
    ):  # fmt: skip
        shared = (temperature_N, temperature, softcap, forbidden, ignore_index, backend)
        logprobs, entropy, is_top1, mean_logits, log_sum_sq_probs, known = _forward(
            logits, targets, *shared, list(outputs)
        )
        ctx.save_for_backward(logits, targets, temperature_N, forbidden, known)
        ctx.settings = (temperature, softcap, ignore_index, backend, entropy_grad, inplace)
        ctx.set_materialize_grads(False)
        constant = [is_top1, mean_logits, log_sum_sq_probs]
        ctx.mark_non_differentiable(*(constant if entropy_grad else [entropy, *constant]))
        return logprobs, entropy, is_top1, mean_logits, log_sum_sq_probs

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_logprobs, grad_entropy, *unused):
        logits, targets, temperature_N, forbidden, known = ctx.saved_tensors
        temperature, softcap, ignore_index, backend, entropy_grad, inplace = ctx.settings
        if not entropy_grad:
            grad_entropy = None
        nothing = (None,) * 10
        if grad_logprobs is None and grad_entropy is None:
            return None, *nothing
        shared = (targets, temperature_N, temperature, softcap, forbidden, ignore_index, backend, known)
        if not inplace:
            return _backward(logits, *shared, grad_logprobs, grad_entropy), *nothing
        grad = logits.detach()
        _backward_inplace(grad, *shared, grad_logprobs, grad_entropy)
        return grad, *nothing


def from_logits(
    logits, targets, *, temperature, softcap, forbidden, ignore_index, outputs, entropy_grad, inplace_grad, backend
) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
    shape = targets.shape
    per_token = isinstance(temperature, torch.Tensor)
    if inplace_grad and any(size > 1 and step == 0 for size, step in zip(logits.shape, logits.stride(), strict=True)):
        raise ValueError(f"inplace_grad needs logits that do not overlap, got strides {logits.stride()}")
    flat = logits.reshape(-1, logits.shape[-1])
    results = _LogitsLogProb.apply(
        flat if flat.stride(1) == 1 else flat.contiguous(),
        targets.reshape(-1).contiguous(),
        temperature.expand(shape).reshape(-1) if per_token else None,
        1.0 if per_token else float(temperature),
        None if softcap is None else float(softcap),
        forbidden,
        ignore_index,
        backend,
        outputs,
        entropy_grad and "entropy" in outputs,
        inplace_grad,
    )
    extras = [v.reshape(shape) if n in outputs else None for n, v in zip(OUTPUTS, results[1:], strict=True)]
    return results[0].reshape(shape), extras
