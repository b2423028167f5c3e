"""Host time of a call on next to no data, with pytest-benchmark: `python -m pytest bench/host_overhead.py`.

On a GPU the launches are not waited for: what is timed is what the caller's thread spends.
"""

from __future__ import annotations

import pytest
import torch

from r1v2_fast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def on_device(values, **options):
    return torch.tensor(values, device=DEVICE, **options)


PRIORITIES = on_device([1.0, 2.0, 0.0, 3.0] * 16)
LOGPROBS = on_device([-1.0, -2.0, -0.5, -0.1] * 4)
OFFSETS = on_device([0, 8, 16])
ADVANTAGES = on_device([0.5, -0.5])


def index():
    made = ops.PriorityIndex(64, device=DEVICE)
    made.update(torch.arange(64, device=DEVICE), PRIORITIES)
    return made


INDEX = index()
CALLS = {
    "sample_by_priority": lambda: ops.sample_by_priority(PRIORITIES, 8, seed=1, check=False),
    "sample_by_priority, replacement": lambda: ops.sample_by_priority(
        PRIORITIES, 8, seed=1, replacement=True, check=False
    ),
    "PriorityIndex.sample": lambda: INDEX.sample(8, seed=1, check=False),
    "PriorityIndex.update": lambda: INDEX.update(OFFSETS, PRIORITIES[:3], check=False),
    "group_advantages": lambda: ops.group_advantages(LOGPROBS, 4),
    "policy_loss": lambda: ops.policy_loss(LOGPROBS, LOGPROBS, ADVANTAGES, offsets=OFFSETS),
    "linear_logprobs": lambda: ops.linear_logprobs(
        LOGPROBS.reshape(4, 4), LOGPROBS.reshape(4, 4), OFFSETS.new_zeros(4)
    ),
    "torch.multinomial": lambda: PRIORITIES.multinomial(8),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_costs_its_caller(benchmark, name):
    torch.set_num_threads(1)
    benchmark.pedantic(CALLS[name], rounds=200, iterations=10, warmup_rounds=20)
