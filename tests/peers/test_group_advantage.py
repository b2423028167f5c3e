"""group_advantages against verl's estimators and TRL's own GRPOTrainer, whose generation and rewards alone are replaced.

Parity: max|a - b| <= 1e-5 max|b|, in fp64 1e-10. Rewards are multiples of 1/4, whose means over equals are exact: what the
peers make of others is shown at the end.
"""

import itertools
import uuid
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from r1v2_fast.ops import group_advantages
from r1v2_fast.ops.group_advantage import groups_from_ids

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore::FutureWarning")]  # of transformers, in TRL
verl = pytest.importorskip("verl.trainer.ppo.core_algos")
pytest.importorskip("trl")
from trl import GRPOTrainer  # noqa: E402

SIZES = (1, 2, 3, 5, 8, 13, 1, 4)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    """Both peers make some of their constants in the default dtype."""
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def assert_parity(ours, peers, dtype):
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    error = (ours.double() - peers.double()).abs().max().item()
    assert error <= tolerance * peers.abs().max().item(), error


def ragged(components=1, dtype=torch.float32):
    """Rewards in any order and their ids, as verl passes them: groups of one, of equals, and others."""
    ids = np.array([str(uuid.UUID(int=g)) for g, size in enumerate(SIZES) for _ in range(size)], dtype=object)
    shuffled = np.random.default_rng(0).permutation(len(ids))
    values = torch.randint(-8, 9, (len(ids), components), generator=torch.Generator().manual_seed(components)) / 4
    values[3:6] = 0.75
    return values[shuffled].to(dtype), ids[shuffled]


def ours_of(values, ids, **options):
    order, offsets = groups_from_ids(ids)
    advantages = group_advantages(values[order], offsets, **options).advantages
    return torch.empty_like(advantages).scatter(0, order, advantages)


def verls(name, values, ids, **options):
    """Its advantage of responses of one token each."""
    return verl.get_adv_estimator_fn(name)(values.clone(), torch.ones(len(values), 1), ids, **options)[0].squeeze(1)


@pytest.mark.parametrize(
    ("name", "theirs", "options"),
    [
        ("grpo", {}, {"eps": 1e-6, "singleton": "raw"}),
        ("grpo", {"norm_adv_by_std_in_grpo": False}, {"scale": "none", "singleton": "raw"}),
        ("grpo_vectorized", {}, {"eps": 1e-6, "singleton": "raw"}),
        ("grpo_vectorized", {"norm_adv_by_std_in_grpo": False}, {"scale": "none", "singleton": "raw"}),
        ("rloo", {}, {"baseline": "leave_one_out", "scale": "none", "singleton": "raw"}),
        ("rloo_vectorized", {}, {"baseline": "leave_one_out", "scale": "none"}),
    ],
)
def test_verl_agrees_over_groups_of_any_sizes(name, theirs, options, dtype):
    values, ids = ragged(dtype=dtype)
    parity = torch.float32 if name == "grpo_vectorized" else dtype  # it casts to fp32
    assert_parity(ours_of(values, ids, **options), verls(name, values, ids, **theirs), parity)


def verls_gdpo(values, ids, weights):
    keys = [f"reward_{k}" for k in range(values.shape[1])]
    one_token = torch.ones(len(values), 1)
    return verls(
        "gdpo", torch.zeros_like(one_token), ids,
        config={"gdpo_reward_keys": keys, "gdpo_reward_weights": weights.tolist()},
        non_tensor_batch=dict(zip(keys, values.T.numpy(), strict=True)),
        batch={"prompts": one_token, "attention_mask": torch.ones(len(values), 2).long()},
    )  # fmt: skip


def test_verls_gdpo_agrees_where_no_group_is_all_equal():
    values, ids = ragged(3)
    values[ids == ids[values[:, 0] == 0.75][0]] += torch.arange(3.0)[:, None] % 2  # the three equals
    weights = torch.tensor([0.5, 1.0, 2.0])
    ours = ours_of(values, ids, aggregate="gdpo", component_weights=weights, eps=1e-6, singleton="raw")
    assert_parity(ours, verls_gdpo(values, ids, weights), torch.float32)


class Trainer(GRPOTrainer):
    """The real class without its __init__; what `_generate_and_score_completions` asks for beside rewards is empty."""

    def __init__(self, rewards_NR, weights, scale, aggregation, size):
        count, components = rewards_NR.shape
        self.rewards_NR, self.reward_weights = rewards_NR, weights
        self.scale_rewards, self.multi_objective_aggregation, self.num_generations = scale, aggregation, size
        self.accelerator = SimpleNamespace(device=torch.device("cpu"), gather=lambda x: x, process_index=0)
        self.args = SimpleNamespace(
            per_device_train_batch_size=count, gradient_checkpointing_kwargs=None, steps_per_generation=1,
            gradient_accumulation_steps=1,
        )  # fmt: skip
        self.model = SimpleNamespace(training=True, is_gradient_checkpointing=False)
        self._tokenizer = SimpleNamespace(pad_token_id=0)
        self.environment_factories = self.environments = None
        self.mask_truncated_completions = self.use_vllm = self.tools = self.log_multimodal = False
        self.pad_to_multiple_of, self.num_iterations, self.beta = None, 1, 0.0
        self.reward_funcs = self.reward_func_names = [f"reward_{k}" for k in range(components)]
        self._metrics, self._pending_extra_logs, self._pending_metrics = {"train": defaultdict(list)}, {}, {}
        logs = {
            "prompt": [],
            "completion": [],
            "advantages": [],
            "rewards": defaultdict(list),
            "extra": defaultdict(list),
        }
        self._logs = logs

    def _generate(self, prompts):
        one_token = [[1]] * len(prompts)
        return one_token, one_token, None, prompts, None, {}, None, None

    def _calculate_rewards(self, *_):
        return self.rewards_NR


def trls(rewards_NR, weights, *, scale="group", aggregation="sum_then_normalize", size=4):
    trainer = Trainer(rewards_NR, weights, scale, aggregation, size)
    return trainer._generate_and_score_completions([{"prompt": "q"}] * len(rewards_NR))["advantages"]


@pytest.mark.parametrize(
    ("theirs", "options"),
    [
        ({"scale": "group"}, {}),
        ({"scale": "batch"}, {"scale": "batch"}),
        ({"scale": "none"}, {"scale": "none"}),
        ({"aggregation": "normalize_then_sum"}, {"aggregate": "gdpo"}),
    ],
)
def test_trl_agrees_with_components_missing(theirs, options, dtype):
    values = torch.randint(-8, 9, (40, 3), generator=torch.Generator().manual_seed(0)).to(dtype) / 4
    values[4:8] = 0.75
    values[9, 1] = values[10] = values[16:19] = torch.nan
    weights = torch.tensor([0.5, 1.0, 2.0], dtype=dtype)
    ours = group_advantages(values, 4, component_weights=weights, **options).advantages
    assert_parity(ours, trls(values, weights, **theirs), dtype)


def test_verl_gives_equal_rewards_a_tenth_of_a_standard_deviation():
    """The fp32 mean of eight 1.7 is off by an ulp, and 1.2e-7 / (1.3e-7 + 1e-6) is 0.1. Ours: 0."""
    values, ids = torch.full((8, 1), 1.7), np.zeros(8, dtype=int)
    for name in ("grpo", "grpo_vectorized"):
        assert (verls(name, values, ids).abs() > 0.1).all()
    assert (ours_of(values, ids, eps=1e-6, singleton="raw") == 0).all()


def test_gdpo_in_verl_and_trl_whitens_that_noise_to_one():
    """Two groups of equal rewards hold no signal; their rounding errors differ, and become the whole spread. Ours: 0."""
    values, ids = torch.tensor([1.7] * 8 + [0.9] * 8)[:, None], np.repeat([0, 1], 8)
    assert (verls_gdpo(values, ids, torch.ones(1)).abs() > 0.9).all()
    assert (trls(values, torch.ones(1), aggregation="normalize_then_sum", size=8).abs() > 0.8).all()
    assert (ours_of(values, ids, aggregate="gdpo", eps=1e-6, singleton="raw") == 0).all()


def test_gdpo_in_verl_moves_equal_groups_when_there_are_singletons():
    """A singleton's raw reward shifts the batch's mean, which whitening then takes from those that learnt nothing."""
    values, ids = torch.tensor([[5.0], [1.0], [1.0], [0.0], [1.0]]), np.array([0, 1, 1, 2, 2])
    assert (verls_gdpo(values, ids, torch.ones(1))[1:3] < -0.3).all()
    ours = ours_of(values, ids, aggregate="gdpo", eps=1e-6, singleton="raw")
    assert (ours[1:3] == 0).all()
    assert_parity(ours[[0, 3, 4]], verls_gdpo(values, ids, torch.ones(1))[[0, 3, 4]], torch.float32)


@pytest.mark.parametrize("ids", [["1", "1", "01", "01"], [0.2, 0.2, 0.7, 0.7]], ids=str)
def test_verls_grpo_vectorized_merges_ids_that_become_the_same_int(ids):
    values, ids = torch.tensor([[1.0], [0.0], [5.0], [4.0]]), np.array(ids, dtype=object)
    assert (verls("grpo_vectorized", values, ids) - verls("grpo", values, ids)).abs().max() > 1
    assert_parity(ours_of(values, ids, eps=1e-6), verls("grpo", values, ids), torch.float32)


def test_verls_grpo_vectorized_fails_on_a_negative_id():
    """It also allocates as many groups as the largest id: 2**40 asks for four terabytes."""
    values, ids = torch.tensor([[1.0], [0.0], [5.0]]), np.array([-1, -1, 0])
    with pytest.raises(IndexError):
        verls("grpo_vectorized", values, ids)
    assert_parity(ours_of(values, ids, eps=1e-6, singleton="raw"), verls("grpo", values, ids), torch.float32)


def test_verls_two_rloos_differ_on_a_group_of_one():
    values, ids = torch.tensor([[3.0], [1.0], [0.0]]), np.array([0, 1, 1])
    assert verls("rloo", values, ids)[0] == 3 and verls("rloo_vectorized", values, ids)[0] == 0


def test_an_infinite_reward_reaches_its_group_in_trl_and_verl():
    values, ids = torch.tensor([[torch.inf], [1.0], [0.0], [2.0]]), np.zeros(4, dtype=int)
    assert verls("grpo", values, ids).isnan().any()
    assert trls(values, torch.ones(1), scale="none").min() == torch.finfo(torch.float32).min
    assert ours_of(values, ids, scale="none").tolist() == [0, 0, -1, 1]


def test_ids_of_any_kind_are_grouped_as_verls_dict_would():
    for kind, shuffle in itertools.product((str, int, lambda g: (g, "x")), (False, True)):
        ids = np.empty(sum(SIZES), dtype=object)
        ids[:] = [kind(g) for g, size in enumerate(SIZES) for _ in range(size)]
        ids = ids[np.random.default_rng(1).permutation(len(ids))] if shuffle else ids
        values = torch.randint(0, 3, (len(ids), 1), generator=torch.Generator().manual_seed(2)).float()
        assert_parity(ours_of(values, ids, eps=1e-6, singleton="raw"), verls("grpo", values, ids), torch.float32)
