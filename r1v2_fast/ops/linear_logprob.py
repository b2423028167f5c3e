"""Per-token log-probs under a linear head, with the hidden gradient made in the forward.

N tokens, H hidden size, V vocabulary. This file validates and picks a backend; `_linear_logprob_autograd` goes on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist

from r1v2_fast.ops import _backend
from r1v2_fast.ops import _linear_logprob_native as native
from r1v2_fast.ops._linear_logprob_autograd import LinearLogProb
from r1v2_fast.ops._linear_logprob_logits import from_logits
from r1v2_fast.ops._linear_logprob_rows import OUTPUTS

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

_backend.register("linear_logprob", ("triton", _backend.triton_why_not), ("cuda", native.why_not))


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
    grad_tolerance: float = 0.0,
    process_group: dist.ProcessGroup | None = None,
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
    workspace_bytes memory for a logits tile and kept probabilities, which take up to three quarters; None: 1 GiB of
                    logits and a quarter of free device memory (CPU: 16 MiB and 1 GiB)
    grad_tolerance  tau above 0: per row the largest p are kept until what is dropped weighs at most tau; the error of
                    d logprob / d hidden is at most tau |logit_scale / temperature| max_v |W_v|. Rows that keep too many, and
                    rows kept for a head that trains, are exact. In the hidden gradient of log-probs alone
    process_group   weight, bias are this rank's equal shard [V / ranks, ...] in the order of ranks; targets and forbidden
                    count the whole vocabulary; every other argument, and the loss, must be the same on all ranks
    differentiable  logprobs and entropy, with any upstream gradient, in hidden, weight and bias
    FLOPs           no gradient 2NHV; frozen head 4NHV; trainable head 6NHV while the kept probabilities fit, up to 8
    host syncs      none; one for needs_grad on the device, one a chunk for grad_tolerance; both refuse graph capture
    DTensor         a sharded weight is gathered; its gradient is averaged over the mesh
    raises          ValueError on wrong shapes, dtypes, names, or (on the CPU) targets outside the vocabulary or
                    forbidden; RuntimeError where the backend cannot run
    backend         "triton": one read of the logits in bf16, two in fp16 and fp32; "cuda": one read in each, on sm_90 and
                    newer up to V = 262,144, beside the same Triton kernels; "auto": the faster one where `bench tune` has run
    source          d logprob_t / d h = logit_scale / T sum_v (1hot - p)_v (1 - (s_v / softcap)^2) W_v holds under any loss
    """
    if process_group is not None and type(weight).__name__ == "DTensor":
        raise ValueError(
            "process_group takes this rank's shard of the weight as a plain tensor, got a DTensor; pass .to_local()"
        )
    weight = _gathered(weight)
    bias = None if bias is None else _gathered(bias)
    _check(hidden, weight, targets, bias, temperature, softcap, forbidden, needs_grad, outputs, ignore_index)
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise ValueError(f"process_group must be a torch.distributed.ProcessGroup, got {type(process_group).__name__}")
    if entropy_grad not in (True, False, None):
        raise ValueError(f"entropy_grad must be True, False or None, got {entropy_grad!r}")
    entropy_grad = None if entropy_grad is None else bool(entropy_grad)
    if not grad_tolerance >= 0:
        raise ValueError(f"grad_tolerance must be 0 or above, got {grad_tolerance}")
    if workspace_bytes is not None and workspace_bytes < 1:
        raise ValueError(f"workspace_bytes must be above 0, got {workspace_bytes}")
    if "entropy" not in outputs:
        entropy_grad = False
    elif entropy_grad is None and torch.compiler.is_compiling():
        raise ValueError("entropy_grad must be True or False under torch.compile, got None (recompute when it arrives)")
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(hidden.device.type):  # autocast leaves fp64 alone
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    chosen = _backend.pick("linear_logprob", backend, hidden, lacks=("triton", _triton_lacks(hidden)))
    if (backend, chosen) == ("auto", "triton"):
        chosen = "auto"  # between two row kernels, by what was measured: see _linear_logprob_native
    if needs_grad is not None and needs_grad.device.type != "cpu":
        if not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "needs_grad on the device costs a sync, which CUDA graph capture forbids; pass it on the CPU"
            )
        needs_grad = needs_grad.cpu()  # the one sync
    shape = targets.shape
    per_token = isinstance(temperature, torch.Tensor)
    results = LinearLogProb.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        bias,
        targets.reshape(-1).contiguous(),
        temperature.expand(shape).reshape(-1) if isinstance(temperature, torch.Tensor) else None,
        1.0 if per_token else float(temperature),
        float(logit_scale),
        None if softcap is None else float(softcap),
        ignore_index,
        forbidden,
        None if needs_grad is None else needs_grad.reshape(-1),
        workspace_bytes,
        "" if process_group is None else process_group.group_name,
        chosen,
        tuple(name for name in OUTPUTS if name in outputs),
        entropy_grad,
        float(grad_tolerance),
        torch.is_grad_enabled(),
    )
    logprobs, *extras = (result.reshape(shape) if result is not None else None for result in results)
    assert logprobs is not None
    return LogProbs(logprobs, *extras)


def _triton_lacks(values: torch.Tensor) -> str | None:
    return "its statistics are fp32, the inputs fp64" if values.dtype == torch.float64 else None


def _gathered(weight: torch.Tensor) -> torch.Tensor:
    """A DTensor's whole weight. Its gradient is averaged over the mesh, as FSDP2 and DDP average."""
    if not (dist.is_available() and type(weight).__name__ == "DTensor"):
        return weight
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(weight, DTensor)
    whole = weight.full_tensor(grad_placements=[Partial()] * weight.device_mesh.ndim)
    return _ScaledGradient.apply(whole, 1 / weight.device_mesh.size())


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, factor):
        ctx.factor = factor
        return values.view_as(values)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.factor, None


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
    if not logits.shape[-1]:
        raise ValueError(f"logits must have a vocabulary, got {tuple(logits.shape)}")
    _check_values(targets, temperature, softcap, forbidden, outputs, logits, ignore_index)
    if backend == "cuda":
        raise RuntimeError(
            "logprobs_from_logits cannot run with backend='cuda': that row kernel reads the padded fp32 rows which "
            "linear_logprobs makes; use backend='triton'"
        )
    chosen = _backend.pick("linear_logprob", backend, logits, lacks=("triton", _triton_lacks(logits)))
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
        backend=chosen,
    )
    return LogProbs(logprobs, *extras)


def _check(hidden, weight, targets, bias, temperature, softcap, forbidden, needs_grad, outputs, ignore_index) -> None:
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
    if not weight.numel():
        raise ValueError(f"weight must not be empty, got {tuple(weight.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and (tensor.dtype not in DTYPES or tensor.device != hidden.device):
            raise ValueError(
                f"{name} must be floating point on hidden's {hidden.device}, got {tensor.dtype} on {tensor.device}"
            )
    _check_values(targets, temperature, softcap, forbidden, outputs, hidden, ignore_index)


def _check_values(targets, temperature, softcap, forbidden, outputs, values, ignore_index) -> None:
    if values.dtype not in DTYPES:
        raise ValueError(f"expected one of {[str(d) for d in DTYPES]}, got {values.dtype}")
    if targets.dtype != torch.int64 or targets.device != values.device:
        raise ValueError(f"targets must be int64 on {values.device}, got {targets.dtype} on {targets.device}")
    if isinstance(temperature, torch.Tensor):
        _check_temperatures(temperature, targets, ignore_index)
    elif not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    if forbidden is not None and not isinstance(forbidden, torch.Tensor):
        raise ValueError(f"forbidden must be an int64 tensor [F], got {type(forbidden).__name__}")
    if forbidden is not None and (forbidden.dim(), forbidden.dtype, forbidden.device) != (
        1,
        torch.int64,
        values.device,
    ):
        found = f"{forbidden.dtype} {tuple(forbidden.shape)} on {forbidden.device}"
        raise ValueError(f"forbidden must be int64 [F] on {values.device}, got {found}")
    if unknown := [name for name in outputs if name not in OUTPUTS]:
        raise ValueError(f"outputs must be among {OUTPUTS}, got {unknown}")


def _check_temperatures(temperature: torch.Tensor, targets: torch.Tensor, ignore_index: int) -> None:
    shape, own = tuple(targets.shape), tuple(temperature.shape)
    fits = len(own) <= len(shape) and all(a in (1, b) for a, b in zip(own[::-1], shape[::-1], strict=False))
    if not fits or temperature.device != targets.device:
        raise ValueError(
            f"temperature must be a float or {shape} on {targets.device}, got {own} on {temperature.device}"
        )
    if temperature.requires_grad:
        raise ValueError("temperature has no gradient here, got one that requires it; detach it")
    if (
        temperature.device.type == "cpu" and not torch.compiler.is_compiling()
    ):  # values are looked at where that costs no sync
        bad = ~(temperature > 0).expand(shape) & (targets != ignore_index)
        if bad.any():
            raise ValueError(f"temperature must be above 0, got {temperature.expand(shape)[bad][0].item()}")
