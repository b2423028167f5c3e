"""policy_loss over splits of a batch, and at the ends of its ranges."""

import itertools

import pytest
import torch

from r1v2_fast.ops._policy_loss_settings import KINDS, ROLLOUT_MODES
from r1v2_fast.ops.policy_loss import policy_loss
from r1v2_fast.testing.accuracy import assert_as_accurate
from r1v2_fast.testing.responses import SETTINGS, Responses, ours, responses

LENGTHS = (3, 1, 5, 0, 4, 2)


def part(batch, first, last):
    """Sequences first to last of a batch."""
    start, end = int(batch.offsets[first]), int(batch.offsets[last])
    tokens, sequences = batch[:9], batch[9:11]
    offsets = batch.offsets[first : last + 1] - start
    return Responses(*(x[start:end] for x in tokens), *(x[first:last] for x in sequences), offsets)


@pytest.mark.parametrize("splits", [(0, 1, 3, 6), (0, 5, 6), tuple(range(7))], ids=str)
@pytest.mark.parametrize("name", ["plain", "per token", "sequence mask", "everything", "everything, per token"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_split_into_micro_batches_gives_the_same_loss_and_gradient(kind, name, splits):
    batch = responses(LENGTHS, seed=2)
    chosen = SETTINGS[name] | {"normalizer": 7.0, "entropy_normalizer": 9.0}
    whole = ours(batch, kind, chosen)[0]
    parts = [ours(part(batch, a, b), kind, chosen)[0] for a, b in itertools.pairwise(splits)]
    assert_as_accurate(sum(found[0] for found in parts), whole[0], whole[0])
    for i in (1, 2):
        assert_as_accurate(torch.cat([found[i] for found in parts]), whole[i], whole[i])


def test_without_normalizers_a_split_is_another_loss():
    """The bug that the argument is there for: a mean of means weighs short micro-batches up."""
    batch = responses(LENGTHS, seed=2)
    whole = ours(batch, "dapo", {})[0]
    parts = [ours(part(batch, a, b), "dapo", {})[0] for a, b in ((0, 2), (2, 6))]
    mean_of_means = torch.cat([found[1] for found in parts]) / 2
    assert (mean_of_means - whole[1]).abs().max() > 0.1 * whole[1].abs().max()


def extreme(lengths, *, advantage, seed=0):
    """Log-ratios, and those to reference, sampler and behaviour, of +-100 nat."""
    g = torch.Generator().manual_seed(seed)
    n, sign = sum(lengths), lambda size: torch.randint(0, 2, (size,), generator=g) * 2.0 - 1
    old = torch.full((n,), -110.0)
    likes = {name: old + 100 * sign(n) for name in ("ref_logprobs", "rollout_logprobs", "behaviour_logprobs")}
    lengths = torch.as_tensor(lengths)
    return old + 100 * sign(n), {
        "old_logprobs": old,
        "advantages": advantage * sign(len(lengths)),
        "offsets": torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        "entropy": torch.zeros(n),
        "kl_coef": 0.1,
        "kl_importance": True,
        "dual_clip": 3.0,
        "off_policy_threshold": 1.0,
        "entropy_coef": 0.1,
        "normalizer": 10.0,
        **likes,
    }


def allowed(kind, arguments):
    if KINDS[kind].family != "clip":
        arguments.pop("dual_clip")
    return arguments | ({"clip_high": 5.0} if kind == "cispo" else {})


@pytest.mark.parametrize("mode", ROLLOUT_MODES)
@pytest.mark.parametrize("advantage", [0.0, 1e6])
@pytest.mark.parametrize("kind", KINDS)
def test_log_ratios_of_100_stay_finite(kind, advantage, mode):
    logprobs, arguments = extreme((1, 1, 7, 0, 40), advantage=advantage)
    logprobs.requires_grad_()
    out = policy_loss(logprobs, **allowed(kind, arguments), kind=kind, rollout_mode=mode)
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    assert out.loss.isfinite() and grad.isfinite().all()
    assert all(value.isfinite() for value in out.metrics.values())


@pytest.mark.parametrize("lengths", [(131_072, 1, 131_072), (1,) * 1_000_000], ids=["131,072 tokens", "10^6 sequences"])
@pytest.mark.parametrize("kind", ["grpo", "gspo", "gmpo", "vespo"])
def test_very_long_and_very_many_sequences_stay_finite(kind, lengths):
    logprobs, arguments = extreme(lengths, advantage=1e6)
    logprobs.requires_grad_()
    out = policy_loss(logprobs, **allowed(kind, arguments), kind=kind, rollout_mode="sequence_truncate")
    (grad,) = torch.autograd.grad(out.loss, logprobs)
    assert out.loss.isfinite() and grad.isfinite().all()
    assert out.metrics["entropy"] == 0 and out.metrics["ratio/mean"].isfinite()


def test_without_a_clamp_a_ratio_becomes_infinite_as_in_trl():
    logprobs = torch.tensor([0.0], requires_grad=True)
    arguments = {"advantages": torch.tensor([-1.0]), "offsets": torch.tensor([0, 1])}
    clamped = policy_loss(logprobs, torch.tensor([-100.0]), **arguments)
    assert clamped.loss.item() == pytest.approx(torch.tensor(20.0).exp().item(), rel=1e-6)
    out = policy_loss(logprobs, torch.tensor([-100.0]), **arguments, log_ratio_clamp=None)
    assert out.loss == torch.inf
