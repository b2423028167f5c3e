"""Gradients that are not differentiable themselves say so, instead of leaving a term out of a second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def differentiable_once(backward: Callable) -> Callable:
    """For `autograd.Function.backward`: `create_graph=True` raises RuntimeError.

    `torch.autograd.function.once_differentiable` raises only if what arrived requires a gradient: after a sum nothing
    does, and the term would be missing in silence. A node that raises later is no better: autograd walks only to the
    inputs that are asked for, and such a node leads to none.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            raise RuntimeError(
                "r1v2_fast: this gradient is not differentiable twice, but create_graph=True asks for that"
            )
        with torch.no_grad():
            return backward(ctx, *grads)

    return wrapper
