"""linear_logprobs and policy_loss against Liger's LigerFusedLinearGRPOLoss: loss, gradients in hidden and head, metrics.

B sequences, T padded length, H hidden size, V vocabulary. Liger computes in fp32 whatever comes in.
"""

import math

import pytest
import torch

from r1v2_fast.ops import linear_logprobs, policy_loss

pytestmark = pytest.mark.peers
liger = pytest.importorskip("liger_kernel.chunked_loss")

LENGTHS = (7, 4, 1, 5, 6, 3, 2)
B, T, H, V, L_MAX, ITEMS = len(LENGTHS), max(LENGTHS), 16, 29, 9, 40
# Liger refuses a sequence's ratio for the other three
SETTINGS = [(t, "token") for t in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")]
SETTINGS += [(t, "sequence") for t in ("grpo", "dr_grpo", "dapo", "bnpo", "luspo")]
KL = ({}, {"beta": 0.04}, {"beta": 0.04, "use_bias_correction_kl": True})


def batch(padded=True, holes=True, empty=None):
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape, scale=1.0: torch.randn(*shape, generator=g) * scale  # noqa: E731
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long() if padded else torch.ones(B, T, dtype=torch.long)
    if holes:
        mask[0, 2] = mask[0, 3] = mask[3, 0] = 0
    if empty is not None:
        mask[empty] = 0
    x = {
        "hidden": draw(B, T, H), "weight": draw(V, H, scale=0.3), "bias": draw(V, scale=0.3), "mask": mask,
        "targets": torch.randint(V, (B, T), generator=g), "ratio": draw(B, T, scale=0.3).exp(),
        "advantages": torch.tensor([-1.0, 1.5, 2.0, -0.5, 0.8, -1.2, 0.0]),
    }  # fmt: skip
    logps = linear_logprobs(x["hidden"], x["weight"], x["targets"]).logprobs
    shift = torch.tensor([0.4, -0.4, 0.0, 0.5, -0.5, -0.7, 0.1])[:, None]
    return x | {"old": logps + shift + draw(B, T, scale=0.3), "ref": logps + draw(B, T, scale=0.3)}


def leaves_of(x, bias):
    return [x[name].clone().requires_grad_() for name in ("hidden", "weight", *(["bias"] if bias else []))]


def run_liger(x, loss_type, level, *, beta=0.0, ratio=None, bias=False, on_policy=False, items=ITEMS, **settings):
    """[loss, gradients in hidden, weight and bias], (KL's mean, share of tokens clipped)"""
    leaves = leaves_of(x, bias)
    loss, metrics = liger.LigerFusedLinearGRPOLoss(
        beta=beta, compiled=False, use_ref_model=beta != 0, epsilon_low=0.2, loss_type=loss_type,
        epsilon_high=1.3 if loss_type == "cispo" else 0.28, max_completion_length=L_MAX,
        importance_sampling_level=level, **settings,
    )(
        leaves[0], leaves[1], x["targets"], x["mask"], x["advantages"], bias=leaves[2] if bias else None,
        ref_per_token_logps=x["ref"] if beta else None, old_per_token_logps=None if on_policy else x["old"],
        vllm_is_ratio=ratio, num_items_in_batch=items,
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, leaves)], [m.item() for m in metrics]


def run_ours(
    x, loss_type, level, *, beta=0.0, use_bias_correction_kl=False, ratio=None, bias=False, on_policy=False, delta=None,
    temperature=1.0, items=ITEMS, packed=False, **settings,
):  # fmt: skip
    """[loss, gradients in hidden, weight and bias], metrics"""
    leaves, keep = leaves_of(x, bias), x["mask"].bool()
    logps = linear_logprobs(
        leaves[0], leaves[1], x["targets"], bias=leaves[2] if bias else None, temperature=temperature
    ).logprobs
    normalizer = {
        "bnpo": None,
        "dr_grpo": B * L_MAX,
        **dict.fromkeys(("grpo", "sapo", "luspo"), B),
        **dict.fromkeys(("dapo", "cispo", "vespo"), items),
    }[loss_type]
    cut = lambda v: v[keep] if packed and v is not None and v.shape == keep.shape else v  # noqa: E731
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), keep.sum(1).cumsum(0)])
    cap = None if loss_type in ("cispo", "sapo", "vespo") else delta  # which ignore it
    loss, metrics = policy_loss(
        cut(logps), cut(logps.detach() if on_policy else x["old"]), x["advantages"], kind=loss_type, ratio_level=level,
        clip_high=1.3 if loss_type == "cispo" else 0.28, ratio_cap=cap, log_ratio_clamp=None, normalizer=normalizer,
        ref_logprobs=cut(x["ref"]) if beta else None, kl_coef=beta, kl_importance=use_bias_correction_kl,
        importance_weights=cut(ratio), **settings, **({"offsets": offsets} if packed else {"mask": x["mask"]}),
    )  # fmt: skip
    return [loss.detach(), *torch.autograd.grad(loss, leaves)], metrics


def assert_parity(ours, theirs):
    for name, a, b in zip(("loss", "hidden", "weight", "bias"), ours, theirs, strict=False):
        error, largest = (a - b).abs().max().item(), b.abs().max().item()
        assert error <= 1e-5 * largest, f"{name}: {error:.2e} of {largest:.2e}"


def skip_unmasked_luspo(loss_type, level, kl, ratio):
    if loss_type == "luspo" and (level == "token" or kl or (ratio is not None and ratio.shape[1] > 1)):
        pytest.skip("Liger's luspo counts padding here: see the tests at the end")


@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("kl", KL, ids=str)
@pytest.mark.parametrize(("loss_type", "level"), SETTINGS)
def test_every_loss_type_agrees_in_loss_gradients_and_metrics(loss_type, level, kl, delta):
    skip_unmasked_luspo(loss_type, level, kl, None)
    x = batch()
    theirs, (*their_kl, clipped) = run_liger(x, loss_type, level, delta=delta, **kl)
    for packed in (False, True):
        ours, metrics = run_ours(x, loss_type, level, delta=delta, packed=packed, **kl)
        assert_parity(ours, theirs)
        if kl:
            assert metrics["kl"].item() == pytest.approx(their_kl[0], rel=1e-5)
        name = {"cispo": "cispo_clip_ratio", "sapo": None, "vespo": None}.get(loss_type, "clip_ratio/region_mean")
        if name and level == "token":
            assert metrics[name].item() == pytest.approx(clipped, rel=1e-5) and clipped > 0


@pytest.mark.parametrize("kl", KL[::2], ids=str)
@pytest.mark.parametrize("each", ["token", "sequence"])
@pytest.mark.parametrize(("loss_type", "level"), SETTINGS)
def test_a_vllm_ratio_is_our_importance_weights(loss_type, level, each, kl):
    x = batch()
    ratio = x["ratio"][:, :1] if each == "sequence" else x["ratio"].where(x["mask"].bool(), 1)
    skip_unmasked_luspo(loss_type, level, kl, ratio)
    ours, _ = run_ours(x, loss_type, level, ratio=ratio, **kl)
    assert_parity(ours, run_liger(x, loss_type, level, ratio=ratio, **kl)[0])


@pytest.mark.parametrize("kl", KL, ids=str)
@pytest.mark.parametrize(("loss_type", "level"), SETTINGS)
def test_a_fully_masked_row_agrees(loss_type, level, kl):
    skip_unmasked_luspo(loss_type, level, kl, None)
    x = batch(empty=2)
    assert_parity(run_ours(x, loss_type, level, **kl)[0], run_liger(x, loss_type, level, **kl)[0])


@pytest.mark.parametrize(("loss_type", "level"), SETTINGS)
def test_without_padding_every_loss_type_agrees_luspo_too(loss_type, level):
    x, kl = batch(padded=False, holes=False), KL[2]
    ours, _ = run_ours(x, loss_type, level, ratio=x["ratio"], **kl)
    assert_parity(ours, run_liger(x, loss_type, level, ratio=x["ratio"], **kl)[0])


@pytest.mark.parametrize("chunk_size", [1, B])
@pytest.mark.parametrize("loss_type", ["grpo", "dapo"])
def test_a_bias_a_temperature_and_no_old_log_probs_agree(loss_type, chunk_size):
    x, settings = batch(), {"bias": True, "temperature": 0.7, "on_policy": True, "beta": 0.04}
    theirs, _ = run_liger(x, loss_type, "token", chunk_size=chunk_size, **settings)
    assert_parity(run_ours(x, loss_type, "token", **settings)[0], theirs)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "vespo"])
def test_without_a_count_of_items_both_divide_by_the_tokens_of_the_call(loss_type):
    x = batch()
    assert_parity(run_ours(x, loss_type, "token", items=None)[0], run_liger(x, loss_type, "token", items=None)[0])


def test_temperatures_and_vespos_numbers_are_ours():
    x = batch()
    theirs, _ = run_liger(x, "sapo", "token", sapo_temperature_pos=0.8, sapo_temperature_neg=1.3)
    assert_parity(run_ours(x, "sapo", "token", sapo_tau=(0.8, 1.3))[0], theirs)
    theirs, _ = run_liger(
        x, "vespo", "token", vespo_k_pos=1.5, vespo_lambda_pos=2.5, vespo_k_neg=1.0, vespo_lambda_neg=0.5
    )
    assert_parity(run_ours(x, "vespo", "token", vespo=(1.5, 2.5, 1.0, 0.5))[0], theirs)


# Where Liger and we differ.


@pytest.mark.parametrize(
    ("level", "settings"),
    [("token", {}), ("sequence", {"beta": 1.0})],
    ids=["token", "sequence with KL"],
)
def test_ligers_luspo_gives_padding_a_gradient_and_ours_does_not(level, settings):
    # per_token_loss * mask.sum(1) over B * T: the mask itself is missing. Right only where all of T is real; it follows what
    # TRL did before https://github.com/huggingface/trl/pull/6654.
    x = batch()
    padding = x["mask"] == 0
    (_, theirs, _), _ = run_liger(x, "luspo", level, **settings)
    (_, ours, _), _ = run_ours(x, "luspo", level, **settings)
    assert ours[padding].abs().max() == 0 and theirs[padding].abs().max() > 0.01 * theirs.abs().max()
    assert (ours - theirs).abs().max() > 0.01 * theirs.abs().max()


def test_ligers_luspo_in_the_simplest_numbers():
    # A = 1; three real tokens with rho = 1 and one of padding with rho = 2, clipped at 1.28. The sum over real tokens is 3,
    # as in TRL 1.16; Liger has 3 real tokens times the mean over all four.
    one = torch.ones(1, 4)
    x = {"hidden": torch.zeros(1, 4, H), "weight": torch.zeros(V, H), "targets": torch.zeros(1, 4, dtype=torch.long)}
    x |= {"mask": torch.tensor([[1, 1, 1, 0]]), "advantages": torch.ones(1), "ref": None}
    x["old"] = -math.log(V) * one - torch.tensor([0, 0, 0, math.log(2)])
    (theirs, *_), _ = run_liger(x, "luspo", "token")
    loss = policy_loss(-math.log(V) * one, x["old"], x["advantages"], mask=x["mask"], kind="luspo", ratio_level="token")
    assert theirs.item() == pytest.approx(-3 * (3 + 1.28) / 4)
    assert loss.loss.item() == pytest.approx(-3)


def test_padding_in_a_vllm_ratio_enters_ligers_vespo_and_not_ours():
    # One real token and one of padding, pi = pi_old, ratio 1/2 on both: w = 1/2. Liger sums the log over padding too: 1/4.
    x = {"hidden": torch.zeros(1, 2, H), "weight": torch.zeros(V, H), "targets": torch.zeros(1, 2, dtype=torch.long)}
    x |= {"mask": torch.tensor([[1, 0]]), "advantages": torch.ones(1), "old": torch.full((1, 2), -math.log(V))}
    half = torch.full((1, 2), 0.5)
    (theirs, *_), _ = run_liger(x, "vespo", "token", ratio=half, items=1)
    ours = policy_loss(x["old"], x["old"], x["advantages"], mask=x["mask"], kind="vespo", importance_weights=half).loss
    phi = lambda w: math.exp(3) * w**2 * math.exp(-3 * w)  # noqa: E731
    assert theirs.item() == pytest.approx(phi(0.25) * math.log(V))
    assert ours.item() == pytest.approx(phi(0.5) * math.log(V))


def test_liger_means_a_sequence_ratios_clips_over_tokens_and_we_over_sequences_as_trl():
    x = batch(holes=False)
    _, (clipped,) = run_liger(x, "grpo", "sequence")
    _, metrics = run_ours(x, "grpo", "sequence")
    logps = linear_logprobs(x["hidden"], x["weight"], x["targets"]).logprobs
    lengths = x["mask"].sum(1)
    ratio = (((logps - x["old"]) * x["mask"]).sum(1) / lengths).exp()
    rows = ((ratio < 0.8) & (x["advantages"] < 0)) | ((ratio > 1.28) & (x["advantages"] > 0))
    assert clipped == pytest.approx(((rows * lengths).sum() / lengths.sum()).item())
    assert metrics["clip_ratio/region_mean"].item() == pytest.approx(rows.double().mean().item())
