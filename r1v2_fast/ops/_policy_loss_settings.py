"""What a policy loss is made of besides tensors, as both backends read it, and the names of what they return."""

from __future__ import annotations

import math
from typing import NamedTuple


class Kind(NamedTuple):
    family: str  # how its term is formed
    ratio: str  # the level of its ratio, as Words has it
    aggregate: str  # how its tokens are averaged


KINDS = {
    "grpo": Kind("clip", "token", "seq_mean_token_mean"),
    "dr_grpo": Kind("clip", "token", "seq_mean_token_sum_norm"),
    "dapo": Kind("clip", "token", "token_mean"),
    "bnpo": Kind("clip", "token", "token_mean"),
    "gspo": Kind("clip", "own", "seq_mean_token_mean"),
    "gmpo": Kind("gmpo", "sequence", "seq_mean_token_mean"),
    "cispo": Kind("cispo", "token", "token_mean"),
    "sapo": Kind("sapo", "token", "seq_mean_token_mean"),
    "luspo": Kind("clip", "sequence", "seq_mean_token_sum"),
    "vespo": Kind("vespo", "token", "token_mean"),
    "dppo_tv": Kind("dppo_tv", "token", "token_mean"),
}
AGGREGATES = ("token_mean", "token_sum", "seq_mean_token_sum", "seq_mean_token_sum_norm", "seq_mean_token_mean")
KL_KINDS = ("k1", "k2", "k3")
ROLLOUT_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
METRICS = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "clip_ratio/dual_mean",
    "cispo_clip_ratio",
    "vespo/phi_seq_mean",
    "ratio/mean",
    "kl",
    "entropy",
    "off_policy_mask/dropped",
    "sampling/importance_sampling_ratio/mean",
    "sampling/sampling_logp_difference/mean",
    "clip_ratio/low_min",
    "sampling/importance_sampling_ratio/min",
    "clip_ratio/high_max",
    "sampling/importance_sampling_ratio/max",
    "sampling/sampling_logp_difference/max",
)


class Numbers(NamedTuple):
    """An absent bound is infinite, an absent normaliser NaN (a tensor may stand in its place)."""

    low: float
    high: float
    ratio_cap: float
    dual_clip: float
    bound: float
    kl_coef: float
    rollout_min: float
    rollout_cap: float
    behaviour_cap: float
    off_policy: float
    tau_positive: float
    tau_other: float
    k_positive: float
    rate_positive: float
    k_negative: float
    rate_negative: float
    change_low: float
    change_high: float
    tv_low: float
    tv_high: float
    entropy_coef: float
    divisor: float
    entropy_divisor: float


class Words(NamedTuple):
    family: str  # "clip", "gmpo", "cispo", "sapo", "vespo", "dppo_tv"
    ratio: str  # "token"; "sequence": its gradient is spread over the tokens; "own": it stays with its token (GSPO)
    aggregate: str
    kl_kind: str  # "" without a KL term, metric or otherwise
    kl_importance: str  # "yes" or ""
    rollout_mode: str  # "" without rollout log-probs
    divided: str  # "yes" where the divisor is known before a token is read, so that the launch can divide the gradient
    entropy_divided: str


def or_infinite(value: float | None) -> float:
    return math.inf if value is None else float(value)


def reported(words: Words, numbers: Numbers, *, weighted: bool, rollout: bool, entropy: bool) -> list[str]:
    """The metrics that mean something for these settings."""
    meaning = {
        "clip_ratio/": words.family in ("clip", "gmpo", "dppo_tv"),
        "clip_ratio/dual_mean": numbers.dual_clip < math.inf,
        "cispo_clip_ratio": words.family == "cispo",
        "vespo/": words.family == "vespo",
        "kl": bool(words.kl_kind),
        "entropy": entropy,
        "off_policy_mask/": numbers.off_policy < math.inf,
        "sampling/importance_sampling_ratio/": weighted,
        "sampling/sampling_logp_difference/": rollout,
    }
    hidden = tuple(start for start, shown in meaning.items() if not shown)
    return [name for name in METRICS if not name.startswith(hidden)]


def over_sequences(kind: str, ratio_level: str | None, rollout_mode: str) -> set[str]:
    """The metrics that are means over sequences; the others are means over tokens, or extremes."""
    names = {"vespo/phi_seq_mean", "off_policy_mask/dropped"}
    if ratio_level == "sequence" or (KINDS[kind].ratio != "token" and ratio_level is None):
        names |= {name for name in METRICS if name.startswith(("clip_ratio/", "cispo", "ratio/"))}
    if rollout_mode.startswith("sequence"):
        names.add("sampling/importance_sampling_ratio/mean")
    return names
