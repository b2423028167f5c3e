"""The registered ops behind policy_loss, and their autograd function."""

from __future__ import annotations

import torch

from r1v2_fast.ops import _backend, _policy_loss_torch
from r1v2_fast.ops._once import differentiable_once
from r1v2_fast.ops._policy_loss_settings import METRICS, Numbers, Words

_SCHEMA = (
    "(Tensor logprobs, Tensor old, Tensor advantages, Tensor? mask, Tensor? offsets, Tensor? reference, "
    "Tensor? importance, Tensor? rollout, Tensor? behaviour, Tensor? token_weights, Tensor? entropy, Tensor? normalizer, "
    "Tensor? entropy_normalizer, float[] numbers, str[] words) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define("r1v2_fast::policy_loss", _SCHEMA)
torch.library.define("r1v2_fast::policy_loss_triton", _SCHEMA)


@torch.library.impl("r1v2_fast::policy_loss", "default")
def _torch_impl(logprobs, *arguments):
    numbers, words = Numbers(*arguments[-2]), Words(*arguments[-1])
    wide = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    parts = _policy_loss_torch.run(logprobs, *arguments[:-2], numbers=numbers, words=words)
    loss, grad, entropy_grad, metrics = (part.to(wide) for part in parts)
    return loss, grad, entropy_grad, metrics, logprobs.new_ones(2, dtype=wide)


@torch.library.impl("r1v2_fast::policy_loss_triton", "default")
def _triton_impl(logprobs, *arguments):
    from r1v2_fast.kernels import policy_loss as kernel  # Triton is imported when a kernel is wanted, not before

    numbers, words = Numbers(*arguments[-2]), Words(*arguments[-1])
    tensors = [None if tensor is None else tensor.contiguous() for tensor in (logprobs, *arguments[:-2])]
    with _backend.on_device_of(logprobs):
        return kernel.launch(*tensors, numbers=numbers, words=words)


@torch.library.register_fake("r1v2_fast::policy_loss")
@torch.library.register_fake("r1v2_fast::policy_loss_triton")
def _fake(logprobs, *arguments):
    entropy = arguments[9]
    wide = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    empty = lambda *shape: logprobs.new_empty(shape, dtype=wide)  # noqa: E731
    n = logprobs.numel()
    return empty(), empty(n), empty(0 if entropy is None else n), empty(len(METRICS)), empty(2)


_torch_op = torch.ops.r1v2_fast.policy_loss.default
_triton_op = torch.ops.r1v2_fast.policy_loss_triton.default


def loss_and_metrics(
    backend: str, logprobs, old, advantages, mask, offsets, reference, importance, rollout, behaviour, token_weights,
    entropy, normalizer, entropy_normalizer, numbers: Numbers, words: Words,
):  # fmt: skip
    """The loss, differentiable in log-probs and entropies, and every metric by name."""
    constants = (
        old, advantages, mask, offsets, reference, importance, rollout, behaviour, token_weights, normalizer,
        entropy_normalizer,
    )  # fmt: skip
    there = [None if tensor is None else tensor.detach().to(logprobs.device) for tensor in constants]
    loss, metrics = _PolicyLoss.apply(logprobs, entropy, backend, list(numbers), list(words), *there)
    return loss, dict(zip(METRICS, metrics.unbind(0), strict=True))


class _PolicyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, entropy, backend, numbers, words, *tensors):
        op = _triton_op if backend == "triton" else _torch_op
        arguments = (*tensors[:-2], entropy, *tensors[-2:], numbers, words)
        loss, grad, entropy_grad, metrics, scales = op(logprobs, *arguments)
        ctx.save_for_backward(grad, entropy_grad, scales)
        ctx.shape, ctx.dtypes = logprobs.shape, (logprobs.dtype, None if entropy is None else entropy.dtype)
        # a divisor that only the whole batch tells is still to be applied
        ctx.divided = (True, True) if backend == "torch" else (words[-2] == "yes", words[-1] == "yes")
        ctx.mark_non_differentiable(metrics)
        return loss, metrics

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, grad_metrics):
        grad, entropy_grad, scales = ctx.saved_tensors
        found: list[torch.Tensor | None] = [None, None]
        for place, values in enumerate((grad, entropy_grad)):
            if ctx.needs_input_grad[place]:
                scale = grad_loss if ctx.divided[place] else grad_loss * scales[place]
                # rounded to 16 bits behind the product, in its launch: loss scaling is there for what fp16 cannot hold
                scaled = torch.mul(values, scale, out=values.new_empty(values.shape, dtype=ctx.dtypes[place]))
                found[place] = scaled.view(ctx.shape)
        return *found, *(None,) * (len(ctx.needs_input_grad) - 2)
