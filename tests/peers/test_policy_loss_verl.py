"""policy_loss against verl's registered policy losses, its aggregation modes, its KL and its entropy term.

B sequences, T padded length.
"""

import math

import pytest
import torch

from r1v2_fast.ops import policy_loss

pytestmark = pytest.mark.peers
core = pytest.importorskip("verl.trainer.ppo.core_algos")
from verl.workers.config import ActorConfig  # noqa: E402

LENGTHS = (7, 4, 1, 5, 6, 3, 2)
B, T = len(LENGTHS), max(LENGTHS)
LOW, HIGH = 0.2, 0.28
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")
OWN_MODE = {"sapo": "seq-mean-token-mean", "geo_mean": "seq-mean-token-mean"}  # whatever loss_agg_mode says
GLOBAL = {"dp_size": 2, "batch_num_tokens": 50, "global_batch_size": 10, "loss_scale_factor": 9}
OURS = {
    "vanilla": {"kind": "grpo", "clip_low": LOW, "clip_high": HIGH, "dual_clip": 3.0},
    "gspo": {"kind": "gspo", "clip_low": LOW, "clip_high": HIGH, "log_ratio_clamp": 10.0},
    "geo_mean": {"kind": "gmpo", "gmpo_clamp": (LOW, HIGH), "log_ratio_clamp": None},
    "sapo": {"kind": "sapo", "sapo_tau": (1.0, 1.05)},
    "cispo": {"kind": "cispo", "cispo_low": LOW, "clip_high": HIGH},
    "dppo_tv": {"kind": "dppo_tv", "clip_low": LOW, "clip_high": HIGH, "ratio_cap": 3.0},
}
REPORTED = {
    "vanilla": {"pg_clipfrac": "clip_ratio/region_mean", "pg_clipfrac_lower": "clip_ratio/dual_mean"},
    "cispo": {"pg_clipfrac": "cispo_clip_ratio"},
    "dppo_tv": {"pg_clipfrac": "clip_ratio/region_mean"},
}
SETTINGS = [(loss, mode) for loss in OURS for mode in MODES if mode == OWN_MODE.get(loss, mode)]


def batch(dtype=torch.float64, empty=None):
    g = torch.Generator().manual_seed(5)
    draw = lambda scale: torch.randn(B, T, generator=g, dtype=torch.float64) * scale  # noqa: E731
    mask = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    mask[0, 2] = mask[0, 3] = mask[3, 0] = False
    if empty is not None:
        mask[empty] = False
    logps = -draw(1.0).abs() - 0.05
    shift = torch.tensor([0.4, -0.4, 0.0, 0.5, -0.5, -1.3, 0.1])[:, None]  # row 5: beyond the dual clip of 3
    x = {
        "logps": logps, "old": logps + draw(0.3) + shift, "ref": logps + draw(0.3), "entropy": draw(1.0).abs(),
        "advantages": torch.tensor([-1.0, 1.5, 2.0, -0.5, 0.8, -1.2, 0.0]), "ratio": draw(0.3).exp(),
    }  # fmt: skip
    return {name: value.to(dtype) for name, value in x.items()} | {"mask": mask}


def config(around=None, **settings):
    return ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, global_batch_info=around or {},
        **{"clip_ratio_low": LOW, "clip_ratio_high": HIGH} | settings,
    )  # fmt: skip


def run_verl(x, loss, mode, *, weights=None, kl=None, entropy=False, around=None, **settings):
    """[loss, gradients in logps and entropies], metrics; the KL and entropy terms as verl's ppo_loss adds them"""
    leaves = [x[name].clone().requires_grad_() for name in ("logps", "entropy")]
    given = {"loss_mask": x["mask"], "loss_agg_mode": mode, **(around or {})}
    value, metrics = core.get_policy_loss_fn(loss)(
        old_log_prob=x["old"], log_prob=leaves[0], advantages=x["advantages"][:, None].expand(B, T),
        response_mask=x["mask"], loss_agg_mode=mode, config=config(around, **settings), rollout_is_weights=weights,
    )  # fmt: skip
    if kl:
        value = value + 0.04 * core.agg_loss(core.kl_penalty_forward(leaves[0], x["ref"], kl), **given)
    if entropy:
        value = value - 0.02 * core.agg_loss(leaves[1], **given)
    return [value.detach(), *gradients(value, leaves)], metrics


def run_ours(x, loss, mode, *, weights=None, kl=None, entropy=False, around=None, packed=False, **settings):
    """[loss, gradients in logps and entropies], metrics"""
    leaves, keep = [x[name].clone().requires_grad_() for name in ("logps", "entropy")], x["mask"]
    lengths, rows = keep.sum(1), (keep.sum(1) > 0).sum().item()
    around = around or {"dp_size": 1, "batch_num_tokens": keep.sum().item(), "global_batch_size": rows}
    divisor = {
        "token-mean": around["batch_num_tokens"],
        "token-sum": 1,
        "seq-mean-token-sum-norm": around["global_batch_size"] * around.get("loss_scale_factor", T),
    }.get(mode, around["global_batch_size"]) / around["dp_size"]
    arguments = {"normalizer": divisor, "entropy_normalizer": divisor, "importance_weights": weights}
    if loss == "geo_mean":  # a mean over all rows, and one weight for each
        arguments["normalizer"] = B
        if weights is not None:
            arguments["importance_weights"] = ((weights.log() * keep).sum(1) / lengths.clamp(min=1)).exp()
    if kl:
        arguments |= {"ref_logprobs": x["ref"], "kl_coef": 0.04, "kl_kind": kl}
    if entropy:
        share = 1 / lengths.clamp(min=1)[:, None] if mode == "seq-mean-token-mean" else 1.0
        arguments |= {"entropy": leaves[1] * share, "entropy_coef": 0.02}
    arguments |= {"logprobs": leaves[0], "old_logprobs": x["old"], "advantages": x["advantages"]}
    layout = {"mask": keep}
    if packed:
        shaped = lambda v: isinstance(v, torch.Tensor) and v.shape == keep.shape  # noqa: E731
        arguments = {name: value[keep] if shaped(value) else value for name, value in arguments.items()}
        layout = {"offsets": torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])}
    value, metrics = policy_loss(
        aggregate=mode.replace("-", "_"), **arguments, **layout, **OURS[loss] | settings
    )  # fmt: skip
    return [value.detach(), *gradients(value, leaves)], metrics


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def assert_parity(ours, theirs, mode):
    # verl divides by T_i + 1e-8 where it means over a sequence: no fp64 parity there
    exact = 1e-7 if mode == "seq-mean-token-mean" else 1e-10
    for name, a, b in zip(("loss", "gradient", "entropy's gradient"), ours, theirs, strict=True):
        assert a.dtype == b.dtype
        error, largest = (a - b).abs().max().item(), b.abs().max().item()
        bound = 1e-5 if a.dtype == torch.float32 else exact
        assert error <= bound * largest, f"{name}: {error:.2e} of {largest:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["unweighted", "rollout_is_weights"])
@pytest.mark.parametrize("around", [None, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize(("loss", "mode"), SETTINGS)
def test_every_loss_agrees_in_every_aggregation(loss, mode, around, weighted, dtype):
    x = batch(dtype)
    weights = x["ratio"] if weighted else None
    theirs, their_metrics = run_verl(x, loss, mode, weights=weights, around=around)
    for packed in (False, True):
        ours, metrics = run_ours(x, loss, mode, weights=weights, around=around, packed=packed)
        assert_parity(ours, theirs, mode)
        for name, our_name in REPORTED.get(loss, {}).items():
            assert metrics[our_name].item() == pytest.approx(their_metrics["actor/" + name], rel=1e-5)
            assert metrics[our_name] > 0


@pytest.mark.parametrize(("loss", "mode"), SETTINGS)
def test_a_fully_masked_row_agrees(loss, mode):
    x = batch(empty=2)
    assert_parity(run_ours(x, loss, mode)[0], run_verl(x, loss, mode)[0], mode)


@pytest.mark.parametrize(("loss", "mode"), [s for s in SETTINGS if s[0] not in ("gspo", "geo_mean")])
def test_log_ratios_beyond_the_bound_agree(loss, mode):
    x = batch()
    x["old"][1, 1] -= 25
    x["old"][0, 1] += 25
    assert_parity(run_ours(x, loss, mode)[0], run_verl(x, loss, mode)[0], mode)


@pytest.mark.parametrize("around", [None, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
@pytest.mark.parametrize("mode", MODES)
def test_kl_and_entropy_terms_agree_in_every_aggregation(mode, kl, around):
    x = batch(empty=2)
    terms = {"kl": kl, "entropy": True, "around": around}
    theirs, _ = run_verl(x, "vanilla", mode, **terms)
    assert theirs[2].abs().max() > 0
    assert_parity(run_ours(x, "vanilla", mode, **terms)[0], theirs, mode)


@pytest.mark.parametrize("clip_ratio_c", [1.5, 5.0])
def test_verls_clip_ratio_c_is_our_dual_clip(clip_ratio_c):
    x = batch()
    ours, metrics = run_ours(x, "vanilla", "token-mean", dual_clip=clip_ratio_c)
    theirs, their_metrics = run_verl(x, "vanilla", "token-mean", clip_ratio_c=clip_ratio_c)
    assert_parity(ours, theirs, "token-mean")
    assert metrics["clip_ratio/dual_mean"].item() == pytest.approx(their_metrics["actor/pg_clipfrac_lower"])


# Where verl and we differ.


def one_token(loss, log_ratio, advantage, logp=-1.0, **settings):
    """verl's loss and gradient for one token, and ours."""
    mask = torch.ones(1, 1, dtype=torch.bool)
    old, scale = torch.full((1, 1), logp - log_ratio, dtype=torch.float64), torch.full((1, 1), advantage).double()
    results = []
    for run in (
        lambda leaf: core.get_policy_loss_fn(loss)(old, leaf, scale, mask, "token-mean", config())[0],
        lambda leaf: policy_loss(leaf, old, scale, mask=mask, **OURS[loss] | settings).loss,
    ):
        leaf = torch.full((1, 1), logp, dtype=torch.float64, requires_grad=True)
        value = run(leaf)
        results.append((value.item(), torch.autograd.grad(value, leaf)[0].item()))
    return results


def test_verls_gspo_bounds_the_log_ratio_above_by_10_and_we_by_20():
    # rho = e^12, A = -1: the loss is rho. log_ratio_clamp=10 reproduces it, and bounds below by -10 as well.
    assert one_token("gspo", 12.0, -1.0, log_ratio_clamp=20.0) == [
        pytest.approx((math.exp(10), 0)), pytest.approx((math.exp(12), math.exp(12)))
    ]  # fmt: skip
    theirs, ours = one_token("gspo", 12.0, -1.0)
    assert ours == pytest.approx(theirs)


def test_verls_dppo_never_reaches_its_default_truncation_of_20():
    # It asks the config for clip_ratio_c or else 20; ActorConfig always has one, the dual clip's 3. rho = e^2 = 7.4.
    theirs, ours = one_token("dppo_tv", 2.0, -1.0, ratio_cap=None)
    assert theirs[1] == pytest.approx(3.0)
    assert ours[1] == pytest.approx(math.exp(2))


def test_verls_k3_stops_at_10_with_no_gradient_and_ours_goes_on():
    # ref - logp = 3: e^3 - 3 - 1 = 16.1 with slope 1 - e^3. A token 2.62 nat or more below the reference is let go by verl.
    leaf = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    ref = torch.full((1, 1), 3.0, dtype=torch.float64)
    theirs = core.kl_penalty_forward(leaf, ref, "k3").sum()
    assert theirs.item() == 10 and torch.autograd.grad(theirs, leaf)[0].item() == 0
    ours = policy_loss(leaf, leaf.detach(), ref[0] * 0, mask=ref > 0, ref_logprobs=ref, kl_coef=1.0).loss
    assert ours.item() == pytest.approx(math.exp(3) - 4)
    assert torch.autograd.grad(ours, leaf)[0].item() == pytest.approx(1 - math.exp(3))


@pytest.mark.parametrize("kl", ["k1", "k2"])
def test_verls_k1_and_k2_have_no_bound_and_ours_only_with_log_ratio_clamp_none(kl):
    logp, far = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), -25.0, dtype=torch.float64)
    theirs = core.kl_penalty_forward(logp, far, kl).item()
    run = lambda bound: policy_loss(  # noqa: E731
        logp, logp, logp[0], mask=far < 0, ref_logprobs=far, kl_coef=1.0, kl_kind=kl, log_ratio_clamp=bound
    ).loss.item()
    assert run(None) == theirs == {"k1": 25, "k2": 312.5}[kl]
    assert run(20.0) == {"k1": 20, "k2": 200}[kl]


def test_verls_geo_mean_counts_fully_masked_rows_in_its_mean_and_we_do_not():
    x = batch(empty=2)
    theirs, _ = run_verl(x, "geo_mean", "seq-mean-token-mean")
    ours = policy_loss(x["logps"], x["old"], x["advantages"], mask=x["mask"], **OURS["geo_mean"]).loss
    assert ours.item() * (B - 1) / B == pytest.approx(theirs[0].item())


@pytest.mark.parametrize(("loss", "times"), [("vanilla", 1), ("sapo", 1), ("geo_mean", 2)])
def test_verls_geo_mean_grows_with_the_number_of_micro_batches(loss, times):
    # verl adds the gradients of micro-batches and leaves the division to agg_loss, told the global batch size; geo_mean
    # means over its own rows instead. Two equal micro-batches of one row: twice the loss.
    row = torch.zeros(1, 1, dtype=torch.float64)
    run = lambda rows: core.get_policy_loss_fn(loss)(  # noqa: E731
        row.expand(rows, 1), row.expand(rows, 1) + 0.1, row.expand(rows, 1) + 1, row.expand(rows, 1) == 0,
        "seq-mean-token-mean", config({"dp_size": 1, "batch_num_tokens": 2, "global_batch_size": 2}),
    )[0].item()  # fmt: skip
    assert run(1) + run(1) == pytest.approx(times * run(2), rel=1e-6)


def test_verls_geo_mean_reports_ratios_as_clipped_that_it_does_not_clip():
    # A > 0 and a log-ratio below the range: the minimum keeps it as it is, the gradient flows, yet clipfrac is 1.
    row = torch.zeros(1, 1, dtype=torch.float64)
    leaf = (row - 0.5).requires_grad_()
    loss, metrics = core.get_policy_loss_fn("geo_mean")(row, leaf, row + 1, row == 0, "token-mean", config())
    assert torch.autograd.grad(loss, leaf)[0].item() == pytest.approx(-math.exp(-0.5))
    assert metrics["actor/pg_clipfrac"] == pytest.approx(1)
    ours = policy_loss(row - 0.5, row, row[0] + 1, mask=row == 0, **OURS["geo_mean"]).metrics
    assert ours["clip_ratio/region_mean"] == 0


def test_seq_mean_token_sum_norm_divides_by_rows_with_a_token_in_verl_and_by_all_rows_here():
    x = batch(empty=2)
    theirs, _ = run_verl(x, "vanilla", "seq-mean-token-sum-norm")
    ours = policy_loss(
        x["logps"], x["old"], x["advantages"], mask=x["mask"], aggregate="seq_mean_token_sum_norm", **OURS["vanilla"]
    ).loss
    assert ours.item() * B / (B - 1) == pytest.approx(theirs[0].item())


def test_verl_means_gspos_clips_over_tokens_and_we_over_sequences():
    x = batch()
    _, theirs = run_verl(x, "gspo", "seq-mean-token-mean")
    _, ours = run_ours(x, "gspo", "seq-mean-token-mean")
    lengths = x["mask"].sum(1)
    ratio = (((x["logps"] - x["old"]) * x["mask"]).sum(1) / lengths).exp()
    clipped = ((ratio < 1 - LOW) & (x["advantages"] < 0)) | ((ratio > 1 + HIGH) & (x["advantages"] > 0))
    assert theirs["actor/pg_clipfrac"] == pytest.approx(((clipped * lengths).sum() / lengths.sum()).item())
    assert ours["clip_ratio/region_mean"].item() == pytest.approx(clipped.double().mean().item())
