"""Gradients that are not differentiable themselves say so, instead of leaving a term out of a second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def differentiable_once(backward: Callable) -> Callable:
    """For `autograd.Function.backward`: run it without a graph; differentiating its results raises RuntimeError.

    `torch.autograd.function.once_differentiable` raises only if what arrived requires a gradient: under
    `create_graph=True` after a sum nothing does, and the term would be missing in silence.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            results = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return results
        refuse = torch._C._functions.DelayedError(b"r1v2_fast: this gradient is not differentiable twice", len(results))
        aliases = [None if result is None else result.detach().requires_grad_() for result in results]
        return refuse(*aliases)  # type: ignore[arg-type]

    return wrapper
