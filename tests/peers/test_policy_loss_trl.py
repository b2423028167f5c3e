"""policy_loss against TRL's own GRPOTrainer: its loss, the gradient by its autograd, the metrics it logs.

B sequences, T padded length. The trainer is the real class without its __init__; only the model's forward and the
generation are replaced, by leaf tensors.
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from r1v2_fast.ops import policy_loss

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::FutureWarning")]  # of transformers, in GRPOConfig
pytest.importorskip("trl")
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")
UNCLIPPED = ("cispo", "sapo", "vespo")  # for which TRL ignores delta
LEVELS = ("token", "sequence")
LENGTHS = (7, 4, 1, 5, 6, 3, 2)
B, T = len(LENGTHS), max(LENGTHS)
L_MAX, ACCUMULATION, PER_GENERATION = 9, 3, 2
TAU = (1.0, 1.25)  # TRL keeps temperatures in fp32, which 1.05 is not exact in
ACCELERATOR = SimpleNamespace(
    gather=lambda x: x, reduce=lambda x, reduction: x, pad_across_processes=lambda x, **_: x,
    num_processes=1, process_index=0, sync_gradients=True, device=torch.device("cpu"),
)  # fmt: skip


class Trainer(GRPOTrainer):
    def __init__(self, loss_type="grpo", level="token", top_entropy_quantile=1.0, vllm=None, **config):
        self.args = args = GRPOConfig(
            output_dir="unused", use_cpu=True, bf16=False, report_to=[], num_generations=B, sapo_temperature_pos=TAU[0],
            per_device_train_batch_size=B, gradient_accumulation_steps=PER_GENERATION, loss_type=loss_type,
            epsilon=0.2, epsilon_high=1.3 if loss_type == "cispo" else 0.28, sapo_temperature_neg=TAU[1],
            importance_sampling_level=level, max_completion_length=L_MAX,
            **{"beta": 0.0, "use_bias_correction_kl": False} | config,
        )  # fmt: skip
        for name in ("loss_type", "importance_sampling_level", "beta", "off_policy_mask_threshold", "entropy_coef"):
            setattr(self, name, getattr(args, name))
        self.max_completion_length, self.top_entropy_quantile = L_MAX, top_entropy_quantile
        self.epsilon_low, self.epsilon_high = args.epsilon, args.epsilon_high
        self.current_gradient_accumulation_steps = ACCUMULATION
        self.accelerator, self.model = ACCELERATOR, SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self.aux_loss_enabled = self.use_adaptive_entropy = False
        self._entropy_bonus_enabled = args.entropy_coef != 0
        self.use_vllm = self.vllm_importance_sampling_correction = vllm is not None
        self._metrics = {"train": defaultdict(list)}
        if isinstance(vllm, dict):  # generation as well
            self.vllm_importance_sampling_mode = vllm["mode"]
            self.vllm_importance_sampling_clip_max, self.vllm_importance_sampling_clip_min = vllm["max"], vllm["min"]

    def _get_per_token_logps_and_entropies(self, *_, **__):
        return self.logps, self.entropies, None

    def loss(self, logps, entropies, inputs):
        """loss, gradients in logps and entropies, metrics"""
        self.logps, self.entropies = leaves = [x.clone().requires_grad_() for x in (logps, entropies)]
        loss = self._compute_loss(None, inputs)
        return [loss.detach(), *gradients(loss, leaves)], {k: v[-1] for k, v in self._metrics["train"].items()}


def gradients(loss, leaves):
    return torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)


def batch(dtype=torch.float64, holes=True, empty=None):
    g = torch.Generator().manual_seed(5)
    draw = lambda scale: torch.randn(B, T, generator=g, dtype=torch.float64) * scale  # noqa: E731
    mask = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long()
    if holes:
        mask[0, 2] = mask[0, 3] = mask[3, 0] = 0
    if empty is not None:
        mask[empty] = 0
    logps = -draw(1.0).abs() - 0.05
    old = logps + draw(0.3) + torch.tensor([0.4, -0.4, 0.0, 0.5, -0.5, -0.7, 0.1])[:, None]
    x = {
        "logps": logps, "old": old, "ref": logps + draw(0.3), "entropy": draw(1.0).abs(),
        "advantages": torch.tensor([-1.0, 1.5, 2.0, -0.5, 0.8, -1.2, 0.0]), "ratio": draw(0.3).exp(),
    }  # fmt: skip
    return {name: value.to(dtype) for name, value in x.items()} | {"mask": mask}


def given(x, **more):
    empty = torch.zeros(B, 0, dtype=torch.long)
    return {
        "prompt_ids": empty, "prompt_mask": empty, "completion_ids": torch.zeros_like(x["mask"]),
        "completion_mask": x["mask"], "advantages": x["advantages"], "old_per_token_logps": x["old"],
        "ref_per_token_logps": x["ref"], "num_items_in_batch": torch.tensor(40.0),
    } | more  # fmt: skip


def ours_for(trainer, x):
    """The arguments of policy_loss that reproduce this trainer."""
    args, loss_type = trainer.args, trainer.loss_type
    normalizer = {
        "bnpo": x["mask"].sum().item() * ACCUMULATION,
        "dr_grpo": B * L_MAX * ACCUMULATION,
        **dict.fromkeys(("grpo", "sapo", "luspo"), B * ACCUMULATION),
        **dict.fromkeys(("dapo", "cispo", "vespo"), 40.0 * ACCUMULATION / PER_GENERATION),
    }[loss_type]
    with_kl = {"ref_logprobs": x["ref"], "kl_coef": args.beta, "kl_importance": args.use_bias_correction_kl}
    return {
        "kind": loss_type, "ratio_level": args.importance_sampling_level, "normalizer": normalizer,
        "clip_low": args.epsilon, "clip_high": args.epsilon_high, "log_ratio_clamp": None,
        "sapo_tau": TAU, "off_policy_threshold": args.off_policy_mask_threshold, "entropy_coef": args.entropy_coef,
        "entropy_normalizer": x["mask"].sum().item() * ACCUMULATION,
    } | (with_kl if args.beta else {}) | ({"ratio_cap": args.delta} if loss_type not in UNCLIPPED else {})  # fmt: skip


def run_ours(x, *, packed=False, **settings):
    """loss, gradients in logps and entropies, metrics"""
    per_token = {
        "logprobs": x["logps"].clone().requires_grad_(), "old_logprobs": x["old"],
        "entropy": x["entropy"].clone().requires_grad_(), "advantages": x["advantages"],
    } | settings  # fmt: skip
    leaves = [per_token["logprobs"], per_token["entropy"]]
    layout = {"mask": x["mask"]}
    if packed:
        keep = x["mask"].bool()
        shaped = lambda v: isinstance(v, torch.Tensor) and v.shape == keep.shape  # noqa: E731
        per_token = {name: value[keep] if shaped(value) else value for name, value in per_token.items()}
        layout = {"offsets": torch.cat([torch.zeros(1, dtype=torch.long), keep.sum(1).cumsum(0)])}
    loss, metrics = policy_loss(**per_token, **layout)
    return [loss.detach(), *gradients(loss, leaves)], metrics


def assert_parity(ours, theirs, dtype):
    bound = 1e-5 if dtype == torch.float32 else 1e-10
    for name, a, b in zip(("loss", "gradient", "entropy's gradient"), ours, theirs, strict=True):
        assert a.dtype == b.dtype == dtype
        error, largest = (a - b).abs().max().item(), b.abs().max().item()
        assert error <= bound * largest, f"{name}: {error:.2e} of {largest:.2e}"


def assert_same_metrics(ours, theirs, needed=("entropy",), without=()):
    shared = ours.keys() & theirs.keys() - set(without)
    assert shared >= set(needed), f"{needed} expected, shared {shared}"
    for name in shared:
        assert ours[name].item() == pytest.approx(theirs[name], rel=1e-5, abs=1e-7), name


def reported_by_trl(loss_type, beta):
    names = {"entropy"} | ({"kl"} if beta else set())
    names |= {"cispo": {"cispo_clip_ratio"}, "vespo": {"vespo/phi_seq_mean"}, "sapo": set()}.get(
        loss_type,
        {f"clip_ratio/{name}" for name in ("low_mean", "high_mean", "region_mean", "low_min", "high_max")},
    )
    return names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("delta", [None, 1.5])
@pytest.mark.parametrize("kl", [{}, {"beta": 0.04}, {"beta": 0.04, "use_bias_correction_kl": True}], ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_every_loss_type_agrees_in_value_gradient_and_metrics(loss_type, level, kl, delta, dtype):
    x = batch(dtype)
    trainer = Trainer(loss_type, level, delta=delta, **kl)
    theirs, their_metrics = trainer.loss(x["logps"], x["entropy"], given(x))
    for packed in (False, True):
        ours, metrics = run_ours(x, packed=packed, **ours_for(trainer, x))
        assert_parity(ours, theirs, dtype)
        assert_same_metrics(metrics, their_metrics, reported_by_trl(loss_type, kl.get("beta")))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_without_old_log_probs_both_are_on_policy(loss_type, level):
    x = batch()
    trainer = Trainer(loss_type, level, beta=0.04, use_bias_correction_kl=True)
    theirs, their_metrics = trainer.loss(x["logps"], x["entropy"], given(x, old_per_token_logps=None))
    ours, metrics = run_ours(x | {"old": x["logps"]}, **ours_for(trainer, x))
    assert_parity(ours, theirs, torch.float64)
    assert_same_metrics(metrics, their_metrics, reported_by_trl(loss_type, 0.04))


@pytest.mark.parametrize("level", LEVELS)
def test_the_batch_clips_on_both_sides_and_delta_bites(level):
    x = batch()
    (plain, *_), metrics = Trainer("grpo", level).loss(x["logps"], x["entropy"], given(x))
    (capped, *_), _ = Trainer("grpo", level, delta=1.5).loss(x["logps"], x["entropy"], given(x))
    assert metrics["clip_ratio/low_mean"] > 0 and metrics["clip_ratio/high_mean"] > 0 and capped < plain


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_fully_masked_row_changes_nothing_but_the_mean_over_rows(loss_type, level):
    x = batch(empty=2)
    trainer = Trainer(loss_type, level, beta=0.04)
    theirs, their_metrics = trainer.loss(x["logps"], x["entropy"], given(x))
    ours, metrics = run_ours(x, **ours_for(trainer, x))
    assert_parity(ours, theirs, torch.float64)
    if level == "token" and loss_type != "vespo":
        assert_same_metrics(metrics, their_metrics)


@pytest.mark.parametrize("ratio", [0.75, 1.2, 1.6])
@pytest.mark.parametrize("delta", [0.7, 1.1])
def test_two_sided_clipping_agrees_even_inside_the_clip_range(delta, ratio):
    x = batch()
    x["old"] = x["logps"] - math.log(ratio)
    trainer = Trainer("grpo", delta=delta)
    ours, _ = run_ours(x, **ours_for(trainer, x))
    assert_parity(ours, trainer.loss(x["logps"], x["entropy"], given(x))[0], torch.float64)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_advantages_of_each_token_agree(loss_type, level):
    x = batch()
    x["advantages"] = x["advantages"][:, None] * x["ratio"] * torch.where(x["entropy"] > 1.2, -1.0, 1.0)
    trainer = Trainer(loss_type, level, beta=0.04, use_bias_correction_kl=True)
    ours, _ = run_ours(x, **ours_for(trainer, x))
    assert_parity(ours, trainer.loss(x["logps"], x["entropy"], given(x))[0], torch.float64)


@pytest.mark.parametrize("threshold", [0.05, 0.35])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_off_policy_mask_agrees(loss_type, threshold):
    x = batch()
    trainer = Trainer(loss_type, off_policy_mask_threshold=threshold, beta=0.04)
    theirs, their_metrics = trainer.loss(x["logps"], x["entropy"], given(x))
    ours, metrics = run_ours(x, **ours_for(trainer, x))
    assert_parity(ours, theirs, torch.float64)
    assert_same_metrics(metrics, their_metrics, reported_by_trl(loss_type, 0.04))
    assert metrics["off_policy_mask/dropped"] == pytest.approx((2 if threshold == 0.05 else 1) / B)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "luspo"])
def test_the_entropy_bonus_agrees(loss_type):
    x = batch()
    trainer = Trainer(loss_type, entropy_coef=0.02, beta=0.04)
    theirs, their_metrics = trainer.loss(x["logps"], x["entropy"], given(x))
    ours, metrics = run_ours(x, **ours_for(trainer, x))
    assert theirs[2].abs().max() > 0
    assert_parity(ours, theirs, torch.float64)
    assert_same_metrics(metrics, their_metrics)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_the_top_entropy_quantile_is_our_token_weights(loss_type):
    x = batch()
    trainer = Trainer(loss_type, top_entropy_quantile=0.4, beta=0.04)
    weights = trainer.get_high_entropy_mask(x["entropy"], x["mask"], 0.6)
    theirs, their_metrics = trainer.loss(x["logps"], x["entropy"], given(x))
    ours, metrics = run_ours(x, token_weights=weights, **ours_for(trainer, x))
    assert_parity(ours, theirs, torch.float64)
    assert_same_metrics(metrics, their_metrics, reported_by_trl(loss_type, 0.04))


def test_with_a_quantile_the_entropy_bonus_acts_on_the_chosen_tokens_alone():
    x = batch()
    trainer = Trainer(top_entropy_quantile=0.4, entropy_coef=0.02)
    weights = trainer.get_high_entropy_mask(x["entropy"], x["mask"], 0.6).double()
    theirs, _ = trainer.loss(x["logps"], x["entropy"], given(x))
    leaves = [x[name].clone().requires_grad_() for name in ("logps", "entropy")]
    settings = ours_for(trainer, x) | {"entropy_normalizer": weights.sum().item() * ACCUMULATION}
    loss, _ = policy_loss(
        leaves[0], x["old"], x["advantages"], mask=x["mask"], entropy=leaves[1] * weights, token_weights=weights,
        **settings,
    )  # fmt: skip
    assert_parity([loss.detach(), *gradients(loss, leaves)], theirs, torch.float64)


@pytest.mark.parametrize("each", ["token", "sequence"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_vllm_ratio_is_our_importance_weights(loss_type, level, each):
    x = batch()
    ratio = x["ratio"][:, :1] if each == "sequence" else x["ratio"].where(x["mask"].bool(), 1)
    trainer = Trainer(loss_type, level, vllm="ratio", beta=0.04)
    theirs, their_metrics = trainer.loss(x["logps"], x["entropy"], given(x, importance_sampling_ratio=ratio))
    for packed in (False, True):
        ours, metrics = run_ours(x, packed=packed, importance_weights=ratio, **ours_for(trainer, x))
        assert_parity(ours, theirs, torch.float64)
        assert_same_metrics(metrics, their_metrics, reported_by_trl(loss_type, 0.04))


MODES = {"token_truncate": 1.3, "token_mask": 1.3, "sequence_truncate": 1.2, "sequence_mask": 1.2}


def generated(mode, x, loss_type="grpo", clip_min=0.8, clip_max=None, unscored=True, **config):
    """The trainer and the inputs that its own generation step makes of what vLLM sampled."""
    sampled = (x["old"] + (x["ratio"].log() * 0.7)).float()
    if unscored:
        sampled[1, 1] = math.nan
    lists = lambda values: [row[:n].tolist() for row, n in zip(values, LENGTHS, strict=True)]  # noqa: E731
    trainer = Trainer(loss_type, vllm={"mode": mode, "min": clip_min, "max": clip_max or MODES[mode]}, **config)
    trainer.__dict__ |= {
        "environment_factories": None, "environments": None, "tools": None, "pad_to_multiple_of": None,
        "_tokenizer": SimpleNamespace(pad_token_id=0), "num_iterations": 1, "num_generations": B, "ref_model": None,
        "multi_objective_aggregation": "sum_then_normalize", "scale_rewards": "group", "reward_func_names": ["given"],
        "reward_weights": torch.ones(1), "mask_truncated_completions": False, "logps": x["old"], "entropies": None,
        "_logs": defaultdict(list, rewards=defaultdict(list)), "_pending_extra_logs": {}, "_pending_metrics": {},
    }  # fmt: skip
    tokens = [[1] * n for n in LENGTHS]
    scored = [[None if math.isnan(v) else v for v in row] for row in lists(sampled)]
    trainer._generate = lambda _: ([[1]] * B, tokens, lists(x["mask"]), ["text"] * B, scored, {}, None, None)
    trainer._calculate_rewards = lambda *_: x["advantages"][:, None]
    inputs = trainer._generate_and_score_completions([{"prompt": "text"}] * B)
    assert torch.equal(inputs["completion_mask"] * inputs["tool_mask"], x["mask"])
    x = x | {"advantages": inputs["advantages"], "old": inputs["old_per_token_logps"]}
    inputs |= {"num_items_in_batch": torch.tensor(40.0)}
    rollout = {
        "rollout_logprobs": sampled.to(x["logps"].dtype), "rollout_mode": mode, "rollout_cap": clip_max or MODES[mode],
        "rollout_min": clip_min,
    }  # fmt: skip
    return trainer, inputs, x, rollout


@pytest.mark.parametrize("threshold", [None, 0.1])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
@pytest.mark.parametrize("mode", MODES)
def test_rollout_log_probs_agree_in_every_mode(mode, loss_type, threshold):
    if loss_type == "vespo" and mode.startswith("sequence"):
        pytest.skip("TRL's __init__ refuses vespo with a sequence's ratio")
    trainer, inputs, x, rollout = generated(mode, batch(), loss_type, off_policy_mask_threshold=threshold)
    theirs, their_metrics = trainer.loss(x["logps"], x["entropy"], inputs)
    ours, metrics = run_ours(x, **rollout, **ours_for(trainer, x))
    assert_parity(ours, theirs, torch.float64)
    needed = {f"sampling/importance_sampling_ratio/{name}" for name in ("min", "mean", "max")}
    needed |= {f"sampling/sampling_logp_difference/{name}" for name in ("mean", "max")}
    assert_same_metrics(metrics, their_metrics, needed)
    assert metrics["sampling/importance_sampling_ratio/min"] == (0.8 if mode.endswith("truncate") else 0)
    assert threshold is None or metrics["off_policy_mask/dropped"] > 0


# Where TRL and we differ.


def test_padding_in_a_vllm_ratio_enters_trls_vespo_and_not_ours():
    # One real token and one of padding, pi = pi_old, ratio 1/2 on both. w is the product over the sequence: 1/2. TRL sums
    # the log over padding too, w = 1/4. Its own generation writes 1 there unless the ratio's bounds exclude 1.
    one = torch.zeros(1, 2, dtype=torch.float64)
    x = {"logps": one - 1, "old": one - 1, "ref": one, "entropy": one, "advantages": torch.ones(1, dtype=torch.float64)}
    x["mask"] = torch.tensor([[1, 0]])
    trainer = Trainer("vespo", vllm="ratio")
    inputs = given(x, importance_sampling_ratio=one + 0.5) | {"prompt_ids": one[:, :0], "prompt_mask": one[:, :0]}
    _, theirs = trainer.loss(x["logps"], x["entropy"], inputs)
    _, ours = run_ours(x, importance_weights=one + 0.5, **ours_for(trainer, x))
    phi = lambda w: math.exp(3) * w**2 * math.exp(-3 * w)  # noqa: E731
    assert theirs["vespo/phi_seq_mean"] == pytest.approx(phi(0.25))
    assert ours["vespo/phi_seq_mean"].item() == pytest.approx(phi(0.5))


def test_a_cap_below_one_makes_trls_generation_write_that_into_the_padding():
    trainer, inputs, x, rollout = generated("token_truncate", batch(), "vespo", 0.1, 0.9, unscored=False)
    ours, _ = run_ours(x, **rollout, **ours_for(trainer, x))
    theirs, _ = trainer.loss(x["logps"], x["entropy"], inputs)
    assert (ours[1] - theirs[1]).abs().max() > 0.1 * theirs[1].abs().max()
    inputs["importance_sampling_ratio"][x["mask"] == 0] = 1
    assert_parity(ours, trainer.loss(x["logps"], x["entropy"], inputs)[0], torch.float64)


@pytest.mark.parametrize("name", ["cispo_clip_ratio", "vespo/phi_seq_mean", "clip_ratio/region_mean"])
def test_trl_counts_a_fully_masked_row_in_means_over_sequences_and_we_do_not(name):
    x, loss_type = batch(empty=2), {"cispo_clip_ratio": "cispo", "vespo/phi_seq_mean": "vespo"}.get(name, "grpo")
    trainer = Trainer(loss_type, "sequence")
    _, theirs = trainer.loss(x["logps"], x["entropy"], given(x))
    _, ours = run_ours(x, **ours_for(trainer, x))
    of_the_empty_row = 1 if loss_type == "vespo" else 0  # phi(1) = 1, and a ratio of 1 is not clipped
    assert ours[name].item() * (B - 1) + of_the_empty_row == pytest.approx(theirs[name] * B)


def test_trl_means_a_sequence_ratios_clips_over_tokens_when_advantages_are_per_token_and_we_over_sequences():
    x = batch(holes=False)
    x["advantages"] = x["advantages"][:, None].expand(B, T)
    trainer = Trainer("grpo", "sequence")
    _, theirs = trainer.loss(x["logps"], x["entropy"], given(x))
    _, ours = run_ours(x, **ours_for(trainer, x))
    clipped = LENGTHS[0] + LENGTHS[3]  # the tokens of rows 0 and 3
    assert theirs["clip_ratio/low_mean"] == pytest.approx(clipped / sum(LENGTHS))
    assert ours["clip_ratio/low_mean"].item() == pytest.approx(2 / B)


def test_trl_sees_no_high_clip_above_a_delta_below_the_clip_range_and_we_do():
    x = batch()
    trainer = Trainer("grpo", delta=1.1)
    _, theirs = trainer.loss(x["logps"], x["entropy"], given(x))
    _, ours = run_ours(x, **ours_for(trainer, x))
    assert theirs["clip_ratio/high_mean"] == 0 < ours["clip_ratio/high_mean"]
