"""mpo_loss against TRL's DPOTrainer and Liger's DPO loss as they are, and InternVL's MPO written out.

P pairs, T padded length, N tokens. Parity: max|a - b| <= 1e-5 max|b|, in fp64 1e-10.
"""

import pytest
import torch
import torch.nn.functional as F

from bench.peers_losses import trl_dpo
from r1v2_fast.ops import RewardShift, mpo_loss

pytestmark = pytest.mark.peers

LENGTHS = torch.tensor([3, 7, 1, 5, 2, 6, 4, 1])  # P chosen sequences, then their rejected ones
P, T = len(LENGTHS) // 2, int(LENGTHS.max())
OFFSETS = F.pad(LENGTHS.cumsum(0), (1, 0))
MASK = torch.arange(T) < LENGTHS[:, None]
MPO = (0.8, 0.2, 1.0)


def batch(dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    logprobs = -torch.rand(int(OFFSETS[-1]), generator=g, dtype=torch.float64)
    return logprobs.to(dtype), (logprobs + torch.randn(len(logprobs), generator=g, dtype=torch.float64)).to(dtype)


def padded(values):
    return values.new_zeros(MASK.shape).masked_scatter(MASK, values)


def assert_parity(ours, peer):
    bound = 1e-10 if peer[0].dtype == torch.float64 else 1e-5
    for value, theirs in zip(ours, peer, strict=True):
        assert (value - theirs).abs().max() <= bound * theirs.abs().max()


def ours(logprobs, ref, **options):
    leaf = logprobs.clone().requires_grad_()
    out = mpo_loss(leaf, ref, OFFSETS, **options)
    return out, [out.loss.detach(), torch.autograd.grad(out.loss, leaf)[0]]


def trl(logprobs, ref, types, weights, *, rows=slice(None), squares=None, **options):
    """[loss, gradient] and what is logged, by DPOTrainer's own code."""
    pytest.importorskip("trl")
    leaf = logprobs.clone().requires_grad_()
    squares = None if squares is None else padded(squares)[rows]
    sides = padded(leaf)[rows], padded(ref)[rows], MASK[rows]
    loss, logged = trl_dpo(*sides, types, weights, log_sum_sq_probs=squares, **options)
    return [loss.detach(), torch.autograd.grad(loss, leaf)[0]], logged


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_trl_mpo_is_generation_by_token_with_no_shift(dtype, beta):
    logprobs, ref = batch(dtype)
    theirs, logged = trl(logprobs, ref, ["sigmoid", "bco_pair", "sft"], list(MPO), beta=beta)
    out, found = ours(logprobs, ref, beta=beta, generation="token")
    assert_parity(found, theirs)
    metrics = {
        "rewards/chosen": out.chosen_rewards.mean(), "rewards/rejected": out.rejected_rewards.mean(),
        "rewards/accuracies": out.accuracy, "rewards/margins": out.margin,
    }  # fmt: skip
    for name, value in metrics.items():
        assert value.item() == pytest.approx(logged[name], rel=1e-5)


def test_trl_terms_one_at_a_time():
    logprobs, ref = batch(torch.float64)
    out, _ = ours(logprobs, ref, generation="token")
    for kind, value in (("sigmoid", out.preference), ("bco_pair", out.quality), ("sft", out.generation)):
        assert_parity([value], trl(logprobs, ref, [kind], [1.0])[0][:1])


def test_trl_smooths_labels_in_aot_whose_sort_does_nothing_to_one_pair():
    """Its "sigmoid" ignores label_smoothing, and "robust" is another loss."""
    logprobs, ref = batch(torch.float64)
    assert_parity(*(trl(logprobs, ref, ["sigmoid"], [1.0], label_smoothing=e)[0] for e in (0.0, 0.2)))
    pairs = [trl(logprobs, ref, ["aot"], [1.0], label_smoothing=0.2, rows=slice(p, None, P))[0] for p in range(P)]
    loss, grad = (torch.stack(values).mean(0) for values in zip(*pairs, strict=True))
    assert_parity(ours(logprobs, ref, weights=(1, 0, 0), label_smoothing=0.2)[1], [loss, grad])


def test_trl_wpo_weights_are_pair_weights():
    logprobs, ref = batch(torch.float64)
    squares = 0.5 * logprobs
    sequences = ((padded(logprobs) - padded(squares)).sum(1) / LENGTHS).exp()
    pair_weights = sequences[:P] * sequences[P:]
    theirs, _ = trl(logprobs, ref, ["sigmoid", "bco_pair"], [0.8, 0.2], squares=squares)
    assert_parity(ours(logprobs, ref, weights=(0.8, 0.2, 0), pair_weights=pair_weights)[1], theirs)
    # TRL's bug: "sft" is an expanded scalar, and the weights multiply it in place
    with pytest.raises(RuntimeError, match="more than one element of the written-to tensor"):
        trl(logprobs, ref, ["sft"], [1.0], squares=squares)


class RunningMoments:
    """TRL <= 0.28's, as bco_pair used it: one number a call, Welford's update, the mean a Python float."""

    def __init__(self):
        self.mean, self.count = 0.0, 1e-24

    def update(self, value):
        total = self.count + 1
        self.mean += ((value.float() - self.mean) / total).item()
        self.count = total


def internvl(logprobs, ref, delta):
    """Sums over the response; two preference losses, weighted and averaged over pairs; NLL over all chosen tokens."""
    leaf = logprobs.clone().requires_grad_()
    policy, reference = padded(leaf).sum(1), padded(ref).sum(1)
    r_c, r_r = (0.1 * (policy - reference)).chunk(2)
    if callable(delta):
        delta = delta(r_c.detach(), r_r.detach())
    dpo = -F.logsigmoid(r_c - r_r)
    bco = -F.logsigmoid(r_c - delta) - F.logsigmoid(-(r_r - delta))
    nll = -padded(leaf)[:P][MASK[:P]].mean()
    loss = (0.8 * dpo + 0.2 * bco).mean() + 1.0 * nll
    return [loss.detach(), torch.autograd.grad(loss, leaf)[0]]


def steps(dtype, count=6):
    """Batches whose rewards are large and of one sign, so that the shift moves and matters."""
    for step in range(count):
        logprobs, ref = batch(dtype, seed=step)
        yield logprobs, ref - 3.0 - step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_internvl_mpo_with_the_shift_of_the_steps_before(dtype):
    shift, past, seen = RewardShift(), [], []
    for logprobs, ref in steps(dtype):
        delta = torch.cat(past).double().mean() if past else torch.zeros((), dtype=torch.float64)
        out, found = ours(logprobs, ref, generation="token", delta=shift.delta)
        assert_parity(found, internvl(logprobs, ref, delta.to(dtype)))
        shift.update(out.chosen_rewards, out.rejected_rewards)
        past += [out.chosen_rewards, out.rejected_rewards]
        seen.append(shift.delta.item())
    assert len(set(seen)) == len(seen) and min(seen) > 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_internvl_mpo_with_the_batch_in_its_own_shift_as_trl_counted_up_to_0_28(dtype):
    shift, running, seen = RewardShift(update_first=True), RunningMoments(), []

    def trl_delta(chosen, rejected):
        running.update(torch.cat((chosen, rejected)).mean())
        return running.mean

    for logprobs, ref in steps(dtype):
        with torch.no_grad():
            rewards = mpo_loss(logprobs, ref, OFFSETS)
        shift.update(rewards.chosen_rewards, rewards.rejected_rewards)
        theirs = internvl(logprobs, ref, trl_delta)
        assert shift.delta.item() == pytest.approx(running.mean, rel=1e-6)  # RunningMoments is fp32 throughout
        delta = running.mean if dtype == torch.float64 else shift.delta
        assert_parity(ours(logprobs, ref, generation="token", delta=delta)[1], theirs)
        seen.append(running.mean)
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("nll", [0.0, 1.0])
@pytest.mark.parametrize(("kind", "weights"), [("sigmoid", (1, 0)), ("bco_pair", (0, 1))])
def test_liger_one_preference_loss_at_a_time_and_the_nll_by_token(kind, weights, nll):
    """Gradients of its fused head; log-probs in fp32, whatever comes in."""
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(2 * P, T, 8, generator=g), torch.randn(11, 8, generator=g)
    ref_hidden, ref_weight = hidden + 0.3 * torch.randn(hidden.shape, generator=g), weight + 0.1
    targets = torch.randint(11, MASK.shape, generator=g).masked_fill(~MASK, -100)
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight)]

    liger = chunked_loss.LigerFusedLinearDPOLoss(
        beta=0.3, alpha=nll, compute_nll_loss=nll > 0, compiled=False, loss_type=kind, chunk_size=2
    )
    theirs, (*_, chosen, rejected) = liger(weight, hidden, targets, ref_input=ref_hidden, ref_weight=ref_weight)

    def packed(states, head):
        return (states @ head.T)[MASK].log_softmax(1).gather(1, targets[MASK][:, None]).squeeze(1)

    ref = packed(ref_hidden, ref_weight).detach()
    out = mpo_loss(packed(hidden, weight), ref, OFFSETS, beta=0.3, weights=(*weights, nll), generation="token")
    assert_parity([out.chosen_rewards, out.rejected_rewards], [chosen, rejected])
    found, known = (torch.autograd.grad(loss, leaves) for loss in (out.loss, theirs))
    assert_parity([out.loss, *found], [theirs, *known])
