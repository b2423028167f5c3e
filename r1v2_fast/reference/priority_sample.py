"""Weighted sampling by an exponential race, with Philox 4x32-10 written out on 32-bit words in int64.

N priorities. Words: 0xFFFFFFFF masks; a product of two 32-bit words fits 64 bits unsigned, so it is made of halves.
"""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32-bit words of a * b, without leaving int64's positive range."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: torch.Tensor, seed: int) -> list[torch.Tensor]:
    """Philox 4x32-10 of the 64-bit counters [N] under a 64-bit key: four words [N] (Salmon et al., SC 2011)."""
    c = [counter & _MASK, (counter >> 32) & _MASK, torch.zeros_like(counter), torch.zeros_like(counter)]
    k = [seed & _MASK, (seed >> 32) & _MASK]
    return philox_rounds(c, k)


def philox_rounds(c: list[torch.Tensor], k: list[int]) -> list[torch.Tensor]:
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c[0])
        high1, low1 = _multiply(_MULTIPLIERS[1], c[2])
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
        k = [(k[0] + _WEYL[0]) & _MASK, (k[1] + _WEYL[1]) & _MASK]
    return c


def exponentials(count: int, seed: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """E_i = -log(u_i), u_i = (w1 2^32 + w0 + 1) 2^-64 in (0, 1]: 64 bits, fp64, full resolution near u = 0.

    Near u = 1 fp64 is coarser than the 64 bits: there -log1p(-(1 - u)) from the complement keeps E's small end.
    """
    words = philox(torch.arange(count, dtype=torch.int64, device=device), seed)
    low, high = words[0].double(), words[1].double()
    u = (high * 2.0**32 + low + 1.0) * 2.0**-64
    complement = ((_MASK - words[1]).double() * 2.0**32 + (_MASK - words[0]).double()) * 2.0**-64
    return torch.where(u < 0.5, -u.log(), -torch.log1p(-complement)).clamp(min=2.0**-65)


def race_keys(priorities_N: torch.Tensor, seed: int, alpha: float) -> torch.Tensor:
    """log(E_i) - alpha log(p_i), fp64; +inf where p_i is 0."""
    keys = exponentials(len(priorities_N), seed, priorities_N.device).log() - alpha * priorities_N.double().log()
    return keys.masked_fill(priorities_N <= 0, torch.inf)


def smallest(keys_N: torch.Tensor, k: int) -> torch.Tensor:
    """Indices of the k smallest keys in ascending order, ties by lower index."""
    return torch.sort(keys_N, stable=True).indices[:k]


def masses(priorities_N: torch.Tensor, alpha: float) -> torch.Tensor:
    """p^alpha in fp64 up to a common factor: relative to the largest, so that no power overflows; 0 where p is 0."""
    p = priorities_N.double()
    largest = p.amax().clamp(min=torch.finfo(p.dtype).tiny) if len(p) else 1.0
    return torch.where(p > 0, (p / largest) ** alpha, 0)


def sample(priorities_N: torch.Tensor, k: int, seed: int, alpha: float, replacement: bool) -> torch.Tensor:
    """Indices [k]: the k smallest keys in ascending order, ties by lower index; or k draws by inverse CDF."""
    if not replacement:
        return smallest(race_keys(priorities_N, seed, alpha), k)
    mass = masses(priorities_N, alpha)
    cumulative = mass.cumsum(0)
    words = philox(torch.arange(k, dtype=torch.int64, device=priorities_N.device), seed)
    u = (words[1].double() * 2.0**21 + (words[0] >> 11).double()) * 2.0**-53  # [0, 1)
    drawn = torch.searchsorted(cumulative, u * cumulative[-1], right=True)
    positions = torch.arange(len(mass), device=mass.device)
    return torch.minimum(drawn, positions.where(mass > 0, 0).amax())  # where rounding went beyond the last
