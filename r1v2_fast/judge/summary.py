"""What a rollout's rewards say: its metrics, and its preference pairs.

N = B x G responses of B prompts, R reward components.
"""

from __future__ import annotations

import torch


def pairs_by_gap(totals_N: torch.Tensor, group_size: int, *, min_gap: float, max_pairs: int) -> list[tuple[int, int]]:
    """(chosen, rejected) of each group with a reward gap above `min_gap`, the widest gaps first."""
    pairs = []
    for start in range(0, len(totals_N), group_size):
        values = totals_N[start : start + group_size].tolist()
        gaps = [
            (values[i] - values[j], start + i, start + j)
            for i in range(group_size)
            for j in range(group_size)
            if values[i] - values[j] > min_gap
        ]
        gaps.sort(key=lambda gap: -gap[0])
        pairs += [(chosen, rejected) for _, chosen, rejected in gaps[:max_pairs]]
    return pairs


def reward_metrics(
    rewards_NR: torch.Tensor,
    names: list[str],
    weights_R: torch.Tensor,
    group_size: int,
    *,
    lengths_N: torch.Tensor,
    finished_N: torch.Tensor,
) -> dict[str, float]:
    """TRL's names: reward, reward_std, rewards/<name>/mean|std, completions/*."""
    totals = (rewards_NR.nan_to_num() * weights_R).sum(1)
    scored = rewards_NR.isfinite().any(1)
    groups = totals.view(-1, group_size)
    metrics = {"reward": totals[scored].mean().item(), "reward_std": groups.std(1).mean().item()}
    metrics["frac_reward_zero_std"] = ((groups.amax(1) - groups.amin(1)) == 0).float().mean().item()
    for index, name in enumerate(names):
        values = rewards_NR[:, index]
        values = values[values.isfinite()]
        metrics[f"rewards/{name}/mean"] = values.mean().item()
        metrics[f"rewards/{name}/std"] = values.std().item()
        if len(values) < len(rewards_NR):
            metrics[f"rewards/{name}/unscored"] = 1 - len(values) / len(rewards_NR)
    lengths = lengths_N.float()
    metrics["completions/mean_length"] = lengths.mean().item()
    metrics["completions/min_length"] = lengths.min().item()
    metrics["completions/max_length"] = lengths.max().item()
    metrics["completions/clipped_ratio"] = 1 - finished_N.float().mean().item()
    if finished_N.any():
        metrics["completions/mean_terminated_length"] = lengths[finished_N].mean().item()
    return metrics
