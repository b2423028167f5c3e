"""MPO over packed pairs: three terms and the gradient made together, one scalar a sequence spread over its tokens.

P pairs, N tokens of P chosen sequences and then their P rejected ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from r1v2_fast.ops import _backend
from r1v2_fast.ops._once import differentiable_once

_backend.register("mpo_loss")


class MPOLoss(NamedTuple):
    loss: torch.Tensor
    preference: torch.Tensor
    quality: torch.Tensor
    generation: torch.Tensor
    chosen_rewards: torch.Tensor  # [P]
    rejected_rewards: torch.Tensor  # [P]


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

    shapes          logprobs, ref_logprobs [N]; offsets [2P + 1], chosen sequences first; rewards [P]
    dtypes          fp16, bf16, fp32 -> fp32; fp64 -> fp64; log-probs in nat
    normalizer      pairs (default P); generation_normalizer: chosen sequences or tokens, by `generation`
    delta           a float, or the device tensor that a RewardShift keeps; a constant
    differentiable  loss in logprobs; the other fields are metrics
    raises          ValueError on wrong shapes or names, offsets of an odd number of sequences or (on the CPU) an empty
                    sequence; RuntimeError where the backend cannot run
    source          Skywork R1V2 (2504.16656) eq. 2 to 5; InternVL2-MPO (2411.10442)
    """
    if logprobs.dim() != 1 or ref_logprobs.shape != logprobs.shape:
        raise ValueError(f"expected packed [N] log-probs, got {tuple(logprobs.shape)} and {tuple(ref_logprobs.shape)}")
    if offsets.dim() != 1 or len(offsets) < 3 or len(offsets) % 2 == 0:
        raise ValueError(f"offsets must be [2P + 1] with P >= 1, got {tuple(offsets.shape)}")
    pairs = (len(offsets) - 1) // 2
    if generation not in ("sequence", "token"):
        raise ValueError(f"generation must be sequence or token, got {generation!r}")
    if pair_weights is not None and pair_weights.shape != (pairs,):
        raise ValueError(f"pair_weights must be [{pairs}], got {tuple(pair_weights.shape)}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {label_smoothing}")
    if offsets.device.type == "cpu" and not torch.compiler.is_compiling():
        if int(offsets[0]) != 0 or int(offsets[-1]) != len(logprobs):
            raise ValueError(f"offsets must run from 0 to N = {len(logprobs)}, got {offsets.tolist()}")
        if bool((offsets.diff() <= 0).any()):
            raise ValueError(f"sequence {int((offsets.diff() <= 0).nonzero()[0])} has no tokens; pairs need both sides")
    _backend.pick("mpo_loss", backend, logprobs)
    wide = torch.float64 if logprobs.dtype == torch.float64 else torch.float32

    def scalar(value) -> torch.Tensor | None:
        return None if value is None else torch.as_tensor(value, dtype=wide, device=logprobs.device).detach()

    return MPOLoss(
        *_MPOLoss.apply(
            logprobs.to(wide),
            ref_logprobs.detach().to(wide),
            offsets.to(logprobs.device),
            scalar(delta),
            None if pair_weights is None else pair_weights.detach().to(logprobs.device, wide),
            scalar(normalizer),
            scalar(generation_normalizer),
            beta,
            list(weights),
            label_smoothing,
            generation == "sequence",
        )
    )


class RewardShift:
    """BCO's delta: the running mean of implicit rewards, kept on the device.

    Read `delta` once per optimizer step and call `update` after it. Every reward counts once, over all ranks.
    `update_first=True` counts as TRL <= 0.28 does, one per call whatever its size; to reproduce it, call `update` with
    the rewards of the whole batch before reading `delta` for that batch's loss.
    """

    def __init__(self, *, update_first: bool = False):
        self.update_first = update_first
        self.delta = torch.zeros((), dtype=torch.float32)
        self.count = torch.zeros((), dtype=torch.float64)

    @torch.no_grad()
    def update(self, chosen_rewards: torch.Tensor, rejected_rewards: torch.Tensor) -> None:
        """mean <- mean + (batch mean - mean) n / (count + n); sums are all-reduced where ranks are."""
        rewards = torch.cat([chosen_rewards, rejected_rewards]).detach().double()
        total = torch.stack([rewards.sum(), rewards.new_tensor(float(len(rewards)))])
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        added = torch.ones_like(total[1]) if self.update_first else total[1]
        count = self.count.to(total.device) + added
        mean = self.delta.to(total.device).double()
        step = (total[0] / total[1] - mean) * added / count
        self.delta, self.count = (mean + step).to(torch.float32), count

    def state_dict(self) -> dict[str, Any]:
        return {"delta": self.delta.item(), "count": self.count.item(), "update_first": self.update_first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.delta = torch.tensor(state["delta"], dtype=torch.float32)
        self.count = torch.tensor(state["count"], dtype=torch.float64)
        self.update_first = state["update_first"]


torch.library.define(
    "r1v2_fast::mpo_loss",
    "(Tensor logprobs, Tensor reference, Tensor offsets, Tensor delta, Tensor? pair_weights, Tensor? normalizer, "
    "Tensor? generation_normalizer, float beta, float[] weights, float label_smoothing, bool per_sequence) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


@torch.library.impl("r1v2_fast::mpo_loss", "default")
def _impl(
    logprobs, reference, offsets, delta, pair_weights, normalizer, generation_normalizer, beta, weights, smoothing,
    per_sequence,
):  # fmt: skip
    pairs = (len(offsets) - 1) // 2
    places = torch.arange(len(logprobs), device=logprobs.device)
    rows = torch.searchsorted(offsets[1:].contiguous(), places, right=True).clamp(max=2 * pairs - 1)

    def sums(values):
        return values.new_zeros(2 * pairs).index_add(0, rows, values)

    wide = logprobs.dtype  # fp64 inside: index_add adds one by one, and what follows has one entry a pair
    logprobs, reference, delta = logprobs.double(), reference.double(), delta.double()
    lengths = offsets.diff().double()
    chosen, rejected = (beta * sums(logprobs - reference)).split(pairs)
    w = torch.ones_like(chosen) if pair_weights is None else pair_weights.double()
    over_pairs = torch.full_like(delta, pairs) if normalizer is None else normalizer.double()
    default = torch.full_like(delta, pairs) if per_sequence else lengths[:pairs].sum()
    over_generated = default if generation_normalizer is None else generation_normalizer.double()
    gap = chosen - rejected
    preference = -(w * ((1 - smoothing) * F.logsigmoid(gap) + smoothing * F.logsigmoid(-gap))).sum() / over_pairs
    quality = -(w * (F.logsigmoid(chosen - delta) + F.logsigmoid(delta - rejected))).sum() / over_pairs
    share = w / lengths[:pairs].clamp(min=1) if per_sequence else w
    generated = -(share * sums(logprobs)[:pairs]).sum() / over_generated
    w1, w2, w3 = weights
    # d/d gap of the preference term, d/d r of the quality terms, then r's slope beta
    pull = w1 * w * (smoothing * gap.sigmoid() - (1 - smoothing) * (-gap).sigmoid()) / over_pairs
    chosen_slope = beta * (pull - w2 * w * (delta - chosen).sigmoid() / over_pairs) - w3 * share / over_generated
    rejected_slope = beta * (w2 * w * (rejected - delta).sigmoid() / over_pairs - pull)
    grad = torch.cat([chosen_slope, rejected_slope])[rows]
    loss = w1 * preference + w2 * quality + w3 * generated
    # copies: an op must not return two views of one tensor
    return tuple(value.to(wide, copy=True) for value in (loss, preference, quality, generated, chosen, rejected, grad))


@torch.library.register_fake("r1v2_fast::mpo_loss")
def _fake(logprobs, reference, offsets, *arguments):
    pairs = (len(offsets) - 1) // 2
    scalars = [logprobs.new_empty(()) for _ in range(4)]
    return (*scalars, logprobs.new_empty(pairs), logprobs.new_empty(pairs), logprobs.new_empty(logprobs.shape))


_op = torch.ops.r1v2_fast.mpo_loss.default


class _MPOLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logprobs, *arguments):
        loss, *metrics, grad = _op(logprobs, *arguments)
        ctx.save_for_backward(grad)
        ctx.mark_non_differentiable(*metrics)
        return loss, *metrics

    @staticmethod
    @differentiable_once
    def backward(ctx, grad_loss, *unused):
        (grad,) = ctx.saved_tensors
        return grad * grad_loss, *(None,) * 10
