"""MPO over packed pairs: three terms, metrics and the gradient made together, one scalar a sequence spread over its tokens.

P pairs, N tokens of P chosen sequences and then their P rejected ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from r1v2_fast.ops import _backend
from r1v2_fast.ops._number import checked, split
from r1v2_fast.ops._once import differentiable_once
from r1v2_fast.ops._packed import bounds_of, repeats_of, spread

_backend.register("mpo_loss", ("triton", _backend.triton_why_not))


class MPOLoss(NamedTuple):
    loss: torch.Tensor
    preference: torch.Tensor
    quality: torch.Tensor
    generation: torch.Tensor
    chosen_rewards: torch.Tensor  # [P]
    rejected_rewards: torch.Tensor  # [P]
    accuracy: torch.Tensor
    margin: torch.Tensor


class Numbers(NamedTuple):
    """What a tensor may stand in for is read from the tensor then; generation_normalizer NaN: the chosen tokens."""

    beta: float
    preference: float
    quality: float
    generation: float
    label_smoothing: float
    delta: float
    normalizer: float
    generation_normalizer: float


def mpo_loss(
    logprobs: torch.Tensor,  # [N]
    ref_logprobs: torch.Tensor,  # [N]
    offsets: torch.Tensor,  # [2P + 1]
    *,
    beta: float = 0.1,
    weights: tuple[float, float, float] = (0.8, 0.2, 1.0),
    delta: float | torch.Tensor = 0.0,
    label_smoothing: float = 0.0,
    pair_weights: torch.Tensor | None = None,  # [P]
    generation: str = "sequence",
    normalizer: float | torch.Tensor | None = None,
    generation_normalizer: float | torch.Tensor | None = None,
    backend: str = "auto",
) -> MPOLoss:
    """w1 preference + w2 quality + w3 generation, implicit rewards r = beta (log pi(y) - log pi_ref(y)).

    preference  -(1 - e) log sigmoid(r_c - r_r) - e log sigmoid(r_r - r_c), e = label_smoothing   (DPO, cDPO)
    quality     -log sigmoid(r_c - delta) - log sigmoid(-(r_r - delta))                           (BCO)
    generation  -log pi(y_c) / |y_c| per sequence, or -log pi(y_c) over all chosen tokens         (SFT)

    shapes          logprobs, ref_logprobs [N]; offsets [2P + 1] int32 or int64, chosen sequences first; rewards [P]
    dtypes          fp16, bf16, fp32 -> fp32; fp64 -> fp64; the gradient as logprobs; log-probs and rewards in nat
    pair_weights    multiply all three terms of a pair, and no divisor
    normalizer      replaces the number of pairs, P; generation_normalizer that of chosen sequences, P, or of chosen tokens,
                    by `generation`. Given both, any split of a batch into calls gives the same gradient
    delta           a constant; with the normalizers, a float or a tensor of one number, such as a RewardShift keeps:
                    one on the device of logprobs is read there
    accuracy        the share of this call's pairs with r_c > r_r; margin the mean of r_c - r_r: both unweighted
    differentiable  loss in logprobs, once; the other fields are metrics
    backend         "triton": one launch, and one in the backward; "torch": every case. fp64 inside, both
    raises          ValueError on wrong shapes, names or numbers, offsets of an odd number of sequences or (on the CPU) an
                    empty sequence; RuntimeError where the backend cannot run: Triton has no fp64 log-probs. On a GPU
                    offsets are not looked at: bounded to [0, N], tokens of no sequence get gradient 0
    source          Skywork R1V2 (2504.16656) eq. 2 to 5; InternVL2-MPO (2411.10442)
    """
    if logprobs.dim() != 1 or ref_logprobs.shape != logprobs.shape:
        raise ValueError(f"expected packed [N] log-probs, got {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)}")
    if not (logprobs.is_floating_point() and ref_logprobs.is_floating_point()):
        raise ValueError(f"log-probs must be floats, got {logprobs.dtype} and {ref_logprobs.dtype}")
    pairs = _pairs(offsets, len(logprobs))
    if generation not in ("sequence", "token"):
        raise ValueError(f"generation must be sequence or token, got {generation!r}")
    if pair_weights is not None and pair_weights.shape != (pairs,):
        raise ValueError(f"pair_weights must be [{pairs}], got {tuple(pair_weights.shape)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if len(weights) != 3:
        raise ValueError(f"weights must be those of preference, quality and generation, got {weights}")
    per_sequence = generation == "sequence"
    if not beta > 0 or not all(weight >= 0 for weight in weights):
        raise ValueError(f"beta must be above 0 and weights 0 or more, got {beta} and {weights}")
    device = logprobs.device
    shift, shift_number = split(checked("delta", delta, device), 0.0)
    over_pairs, pairs_number = split(checked("normalizer", normalizer, device, above=0), float(pairs))
    over_generated, generated_number = split(
        checked("generation_normalizer", generation_normalizer, device, above=0),
        float(pairs) if per_sequence else math.nan,
    )
    numbers = Numbers(beta, *weights, label_smoothing, shift_number, pairs_number, generated_number)
    constants = (ref_logprobs, offsets, pair_weights, shift, over_pairs, over_generated)
    there = [None if tensor is None else tensor.detach().to(logprobs.device) for tensor in constants]
    lacking = "its results are fp32 and the log-probs are fp64" if logprobs.dtype == torch.float64 else None
    chosen = _backend.pick("mpo_loss", backend, logprobs, lacks=("triton", lacking))
    loss, metrics, rewards = _MPOLoss.apply(logprobs, chosen, *there, list(numbers), per_sequence)
    preference, quality, generated, accuracy, margin = metrics.unbind()
    chosen_rewards, rejected_rewards = rewards.split(pairs)
    return MPOLoss(loss, preference, quality, generated, chosen_rewards, rejected_rewards, accuracy, margin)


def _pairs(offsets: torch.Tensor, count: int) -> int:
    """Their number; raises ValueError on what offsets must not be."""
    if offsets.dim() != 1 or len(offsets) < 3 or len(offsets) % 2 == 0 or offsets.is_floating_point():
        raise ValueError(f"offsets must be ints [2P + 1] with P >= 1, got {offsets.dtype} {tuple(offsets.shape)}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(offsets[0]) != 0 or int(offsets[-1]) != count:
            raise ValueError(f"offsets must run from 0 to N = {count}, got {int(offsets[0])} to {int(offsets[-1])}")
        if bool((empty := offsets.diff() <= 0).any()):
            raise ValueError(f"sequence {int(empty.nonzero()[0])} has no tokens; pairs need both sides")
    return (len(offsets) - 1) // 2


_SCHEMA = (
    "(Tensor logprobs, Tensor reference, Tensor offsets, Tensor? pair_weights, Tensor? delta, Tensor? normalizer, "
    "Tensor? generation_normalizer, float[] numbers, bool per_sequence) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define("r1v2_fast::mpo_loss", _SCHEMA)
torch.library.define("r1v2_fast::mpo_loss_triton", _SCHEMA)


@torch.library.impl("r1v2_fast::mpo_loss_triton", "default")
def _triton_impl(logprobs, *arguments):
    from r1v2_fast.kernels import mpo_loss as kernel  # Triton is imported when a kernel is wanted, not before

    with _backend.on_device_of(logprobs):
        return kernel.launch(logprobs, *arguments)


@torch.library.impl("r1v2_fast::mpo_loss", "default")
def _torch_impl(
    logprobs, reference, offsets, pair_weights, delta, normalizer, generation_normalizer, numbers, per_sequence
):
    """fp64 inside: sums cancel, and what follows them has one entry a pair."""
    count, pairs, given = len(logprobs), (len(offsets) - 1) // 2, Numbers(*numbers)
    bounds = bounds_of(offsets, count)
    chosen_lengths = bounds[: pairs + 1].diff().double()

    def scalar(tensor, number):
        return number if tensor is None else tensor.reshape(()).double()

    over_pairs = scalar(normalizer, given.normalizer)
    over_generated = scalar(generation_normalizer, given.generation_normalizer)
    if generation_normalizer is None and math.isnan(over_generated):
        over_generated = chosen_lengths.sum().clamp(min=1)
    weight = 1.0 if pair_weights is None else pair_weights.double()
    share = weight / chosen_lengths.clamp(min=1) if per_sequence else weight

    own = logprobs.double()
    rewards = given.beta * torch.segment_reduce(own - reference.double(), "sum", offsets=bounds)
    generation = -(share * torch.segment_reduce(own, "sum", offsets=bounds[: pairs + 1])).sum() / over_generated
    chosen, rejected = rewards.split(pairs)
    gap, delta = chosen - rejected, scalar(delta, given.delta)
    margins = torch.stack([gap, -gap, chosen - delta, delta - rejected])
    won, lost, high, low = (-F.logsigmoid(margins) * weight).sum(1) / over_pairs
    preference = (1 - given.label_smoothing) * won + given.label_smoothing * lost
    loss = given.preference * preference + given.quality * (high + low) + given.generation * generation
    metrics = torch.stack([preference, high + low, generation, (gap > 0).double().mean(), gap.mean()])

    # d/dx -log sigmoid(x) = -sigmoid(-x); then r's slope beta
    won, lost, high, low = (-margins).sigmoid() * weight * (given.beta / over_pairs)
    pull = given.preference * ((1 - given.label_smoothing) * won - given.label_smoothing * lost)
    slope = -pull - given.quality * high - given.generation * (share / over_generated)
    slopes = torch.cat([slope, pull + given.quality * low])
    wide = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    grad = spread(slopes.to(wide), repeats_of(bounds, count), count)
    return loss.to(wide), metrics.to(wide), rewards.to(wide), grad


@torch.library.register_fake("r1v2_fast::mpo_loss_triton")
@torch.library.register_fake("r1v2_fast::mpo_loss")
def _fake(logprobs, reference, offsets, *arguments):
    wide = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    return tuple(logprobs.new_empty(shape, dtype=wide) for shape in ((), (5,), (offsets.shape[0] - 1,), logprobs.shape))


_torch_op = torch.ops.r1v2_fast.mpo_loss.default
_triton_op = torch.ops.r1v2_fast.mpo_loss_triton.default


class _MPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, backend, *arguments):
        loss, metrics, rewards, grad = (_triton_op if backend == "triton" else _torch_op)(logprobs, *arguments)
        ctx.save_for_backward(grad)
        ctx.dtype = logprobs.dtype
        ctx.mark_non_differentiable(metrics, rewards)
        return loss, metrics, rewards

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, *unused):
        (grad,) = ctx.saved_tensors
        # rounded to 16 bits behind the product, in its launch: loss scaling is there for what fp16 cannot hold
        scaled = torch.mul(grad, grad_loss, out=grad.new_empty(grad.shape, dtype=ctx.dtype))
        return scaled, *(None,) * (len(ctx.needs_input_grad) - 1)
