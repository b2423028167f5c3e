"""What a rank can be asked without another one."""

import pytest
import torch

from r1v2_fast import config
from r1v2_fast.parallel.checks import check
from r1v2_fast.parallel.gradients import clip
from r1v2_fast.parallel.world import ALONE, World


def test_ranks_take_all_things_once_in_order_and_almost_equally():
    for count in range(12):
        for size in (1, 2, 3, 5):
            shares = [list(range(count))[World(rank, size).slice(count)] for rank in range(size)]
            assert [i for share in shares for i in share] == list(range(count))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_rank_alone_needs_no_process_group():
    assert not torch.distributed.is_initialized()
    assert ALONE.gather("a") == ["a"] and ALONE.concatenate([1, 2]) == [1, 2] and ALONE.most(3) == 3
    assert ALONE.sums({"tokens": 2.0}) == {"tokens": 2.0} and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.once(lambda: 5) == 5
    with pytest.raises(KeyError), ALONE.together():
        raise KeyError("as it was raised")


def test_clipping_without_shards_is_torchs():
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.tensor([3.0, 4.0, 0.0])
    assert clip([parameter], 1.0) == 5
    assert torch.allclose(parameter.grad, torch.tensor([0.6, 0.8, 0.0]))


def test_a_server_that_takes_weights_from_one_process_is_refused_on_two():
    vllm = ["rollout.engine=vllm", "rollout.weight_transfer=127.0.0.1:29600"]
    check(config.load("digits", vllm), ALONE)
    with pytest.raises(RuntimeError, match="sends from one process; on several ranks rollout.engine=local works"):
        check(config.load("digits", vllm), World(0, 2))
    tower = ["rollout.engine=vllm", "run.stages=[grpo]", "run.shard=full", "grpo.train=[adapter, vision]"]
    rewards = "grpo.rewards=[{name: answer, function: exact_match}]"
    with pytest.raises(RuntimeError, match="run.shard=none works"):
        check(config.load("digits", [*tower, rewards]), World(0, 2))
