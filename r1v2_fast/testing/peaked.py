"""A policy as peaked as a trained one: few entries carry most rows' mass.

N rows, H hidden size, V vocabulary, C clusters of tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

TAU = 2.0**-10  # the dropped mass at which the shares below are promised
SPARSE, MIDDLE = 64, 2048  # entries that hold 1 - TAU of a row
PEAK = 24.0  # largest logits; at H = 64 the other clusters' logits spread by 3, and 2^18 of them still hold < TAU
LOW_GAIN = 0.8  # a cluster's weakest token stands at 0.8 of its peak, so that its tokens differ by up to exp(4.8)
NOISE = 0.1  # of a direction's length
WIDE_CLUSTERS = 4
CHUNK_BYTES = 64 << 20  # of fp64 logits while targets are drawn: N x V never stands whole


def peaked_policy(
    n: int, h: int, v: int, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows that hold 1 - 2^-10 of their mass in at most 64 entries (80 %), in 65 to 2,048 (10 %) and in more (10 %).

    returns  hidden [n, h] and weight [v, h] in `dtype`, targets [n] int64 drawn from each row's own policy
    shares   at temperature 1; n // 10 rows of each rarer kind, in an order set by `seed`; dense rows need nearly
             all of v
    head     a cluster's tokens share a direction: 4 clusters of min(1024, v // 8), the rest of 16, ids shuffled; peaked
             rows point along one of them, dense rows nowhere
    raises   ValueError unless h >= 64 and 2,048 <= v <= 2^18
    """
    if h < 64 or not 2048 <= v <= 1 << 18:
        raise ValueError(f"h must be at least 64 and v within 2048 .. {1 << 18}, got h = {h}, v = {v}")
    g = torch.Generator().manual_seed(seed)  # on the CPU: the same head on every device
    wide = min(1024, v // 8)
    token_V = torch.arange(v)
    in_wide = WIDE_CLUSTERS * wide
    cluster_V = torch.where(token_V < in_wide, token_V // wide, WIDE_CLUSTERS + (token_V - in_wide) // 16)
    clusters = int(cluster_V[-1]) + 1
    cluster_V = cluster_V[torch.randperm(v, generator=g)]
    gain_V = LOW_GAIN + (1 - LOW_GAIN) * torch.rand(v, generator=g)
    direction_CH = F.normalize(torch.randn(clusters, h, generator=g), dim=1)

    weight_VH = torch.empty(v, h, dtype=dtype, device=device)
    for tokens in token_V.split(8192):
        noise = NOISE * torch.randn(len(tokens), h, generator=g) / h**0.5
        along = gain_V[tokens, None] * direction_CH[cluster_V[tokens]]
        weight_VH[tokens.to(device)] = (along + noise).to(device, dtype)

    tenth = n // 10
    kind_N = torch.tensor([0] * (n - 2 * tenth) + [1] * tenth + [2] * tenth)[torch.randperm(n, generator=g)]
    narrow_N = torch.randint(WIDE_CLUSTERS, clusters, (n,), generator=g)
    wide_N = torch.randint(0, WIDE_CLUSTERS, (n,), generator=g)
    noise_NH = torch.randn(n, h, generator=g) / h**0.5
    peaked_NH = PEAK * (direction_CH[torch.where(kind_N == 1, wide_N, narrow_N)] + NOISE * noise_NH)
    hidden_NH = torch.where((kind_N == 2)[:, None], noise_NH, peaked_NH).to(device, dtype)
    return hidden_NH, weight_VH, _draw(hidden_NH, weight_VH, torch.rand(n, generator=g).double())


def _draw(hidden_NH: torch.Tensor, weight_VH: torch.Tensor, uniform_N: torch.Tensor) -> torch.Tensor:
    """The token at which a row's cumulated probability passes its uniform number."""
    rows = max(1, CHUNK_BYTES // (8 * len(weight_VH)))
    drawn = []
    for hidden, uniform in zip(hidden_NH.split(rows), uniform_N.to(hidden_NH.device).split(rows), strict=True):
        mass = (hidden @ weight_VH.T).double().softmax(1).cumsum(1)
        drawn.append(torch.searchsorted(mass, uniform[:, None] * mass[:, -1:]).squeeze(1))
    return torch.cat(drawn).clamp(max=len(weight_VH) - 1) if drawn else uniform_N.long()
