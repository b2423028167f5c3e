"""The public ops. Each module validates, picks a backend and returns a NamedTuple; kernels and references lie elsewhere."""

from r1v2_fast.ops.group_advantage import GroupAdvantages, group_advantages, groups_from_ids
from r1v2_fast.ops.linear_logprob import LogProbs, linear_logprobs, logprobs_from_logits
from r1v2_fast.ops.mpo_loss import MPOLoss, mpo_loss
from r1v2_fast.ops.policy_loss import PolicyLoss, policy_loss
from r1v2_fast.ops.priority_index import PriorityIndex
from r1v2_fast.ops.priority_sample import PrioritySample, sample_by_priority
from r1v2_fast.ops.reward_shift import RewardShift

__all__ = [
    "linear_logprobs",
    "logprobs_from_logits",
    "group_advantages",
    "groups_from_ids",
    "policy_loss",
    "mpo_loss",
    "RewardShift",
    "sample_by_priority",
    "PriorityIndex",
    "LogProbs",
    "GroupAdvantages",
    "PolicyLoss",
    "MPOLoss",
    "PrioritySample",
]
