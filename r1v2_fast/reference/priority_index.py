"""What a PriorityIndex does, in plain PyTorch: the last writer wins, and draws come in rounds of draws with replacement.

N priorities, n updates, k draws. O(N) a round.
"""

from __future__ import annotations

import torch

from r1v2_fast.reference.priority_sample import philox


def write(leaves_N: torch.Tensor, indices_n: torch.Tensor, priorities_n: torch.Tensor) -> None:
    """leaves[i] = p for each pair, in order; a pair whose index is out of range or whose p is NaN, inf or negative is skipped."""
    good = (indices_n >= 0) & (indices_n < len(leaves_N)) & priorities_n.isfinite() & (priorities_n >= 0)
    indices, priorities = indices_n[good], priorities_n[good]
    unique, inverse = indices.unique(return_inverse=True)
    positions = torch.arange(len(indices), device=indices.device)
    last = torch.zeros_like(unique).scatter_reduce(0, inverse, positions, "amax")
    leaves_N[unique] = priorities[last] + 0.0  # -0 becomes 0


def masses(leaves_N: torch.Tensor, alpha: float) -> torch.Tensor:
    """p^alpha in fp64, 0 where p is 0."""
    return torch.where(leaves_N > 0, leaves_N.double() ** alpha, 0)


def draws(masses_N: torch.Tensor, first: int, count: int, seed: int) -> torch.Tensor:
    """Draws first, first + 1, ... with replacement: u in [0, 1) from Philox, counter = the draw's number, by inverse CDF."""
    words = philox(torch.arange(first, first + count, dtype=torch.int64, device=masses_N.device), seed)
    u = (words[1].double() * 2.0**21 + (words[0] >> 11).double()) * 2.0**-53
    cumulative = masses_N.cumsum(0)
    drawn = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    positions = torch.arange(len(masses_N), device=masses_N.device)
    return torch.minimum(drawn, positions.where(masses_N > 0, 0).amax())  # where rounding went beyond the last


def first_occurrences(drawn: torch.Tensor) -> torch.Tensor:
    """Each index once, in the order in which they came."""
    unique, inverse = drawn.unique(return_inverse=True)
    positions = torch.arange(len(drawn), device=drawn.device)
    first = torch.full_like(unique, len(drawn)).scatter_reduce(0, inverse, positions, "amin")
    return drawn[first.sort().values]


def sample(leaves_N: torch.Tensor, k: int, seed: int, alpha: float, replacement: bool) -> torch.Tensor:
    """Indices, k of them or as many as are positive.

    Without replacement: sequential weighted sampling. Repeats among draws with replacement are skipped; a round makes
    B = needed + needed // 4 + 32 of them, and what one brought has mass 0 in the next. Draws count on over the rounds.
    """
    mass = masses(leaves_N, alpha)
    if replacement:
        return draws(mass, 0, k if bool(mass.any()) else 0, seed)
    accepted = torch.empty(0, dtype=torch.int64, device=leaves_N.device)
    most, number = min(k, len(leaves_N)), 0
    while len(accepted) < most and bool(mass.any()):
        needed = most - len(accepted)
        count = needed + needed // 4 + 32
        accepted = torch.cat((accepted, first_occurrences(draws(mass, number, count, seed))[:needed]))
        mass[accepted] = 0
        number += count
    return accepted
