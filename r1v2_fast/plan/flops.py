"""FLOPs of the model's parts, two for a multiply and an add.

L tokens of a row, N response tokens among them, C channels before the adapter, H hidden size, V vocabulary.
A matrix of n parameters costs 2 n FLOPs a token forward, 2 n for the gradient of its input, 2 n for its own.
"""

from __future__ import annotations

from r1v2_fast.plan.memory import Settings
from r1v2_fast.plan.shapes import Shapes
from r1v2_fast.plan.work import Row


def forward(shapes: Shapes, tokens: float, pairs: float) -> tuple[float, float]:
    """(matrices, attention) of the layers' forward: 2 n a token, and two products, 4 Hq D, a query-key pair."""
    matrices = 2.0 * shapes.layers * shapes.layer_matrices * tokens
    return matrices, 4.0 * shapes.layers * shapes.heads * shapes.head_size * pairs


def of_row(shapes: Shapes, row: Row, settings: Settings, tiles: int) -> dict[str, float]:
    """FLOPs of one row's training: forward and backward of the layers' matrices, of attention, of the adapter, the head's.

    Layers: 2 n L forward, as much for the inputs' gradient, and as much again where they train. Attention: 4 Hq D a pair
    forward (two products), 2.5 times that backward (five, one of them a recompute). The adapter, its norm training too:
    2 n forward and 4 n backward. Log-prob op: 4 N H V behind a frozen head, 6 N H V where it trains.
    """
    matrices, attention = forward(shapes, row.tokens, row.pairs(settings.attention))
    adapter = 2.0 * adapter_matrices(shapes) * row.groups * tiles * shapes.image_tokens
    return {
        "matrices forward": matrices,
        "matrices backward": matrices * (2 if settings.trains_llm else 1),
        "attention forward": attention,
        "attention backward": 2.5 * attention,
        "adapter forward": adapter,
        "adapter backward": 2 * adapter,
        "head": (6.0 if settings.trains_llm else 4.0) * row.targets * shapes.embedding,
    }


def adapter_matrices(shapes: Shapes) -> int:
    """C H + H H."""
    return shapes.channels * shapes.hidden + shapes.hidden**2


def of_picture(shapes: Shapes, tiles: int) -> float:
    """Of the tower over one picture: 2 (4 w^2 + 2 w i) a token and layer, attention 4 w over all pairs of a tile's tokens."""
    tokens, width = shapes.patches + 1, shapes.vision_width
    matrices = 2.0 * tokens * (4 * width * width + 2 * width * shapes.vision_inner)
    return tiles * shapes.vision_layers * (matrices + 4.0 * width * tokens**2)
