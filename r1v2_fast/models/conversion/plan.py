"""What every output tensor is made of: ranges of bytes of the tensors that are there.

Both directions only rename, cut along the first axis or join along it, so nothing is ever computed on a value and any
dtype comes out bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import InternVLConfig, InternVLForConditionalGeneration

from r1v2_fast.models.conversion import names

ITEM_BYTES = {
    "F64": 8, "I64": 8, "U64": 8, "C64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor of a checkpoint; `read(start, stop)` gives its bytes of that range in pieces."""

    name: str
    dtype: str  # as safetensors writes it: BF16
    shape: tuple[int, ...]
    read: Callable[[int, int], Iterator[bytes]] = field(compare=False, repr=False)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class Span(NamedTuple):
    """Bytes `start` to `stop` of a stored tensor."""

    stored: Stored
    start: int
    stop: int


class Target(NamedTuple):
    """A tensor to write: its spans one after the other."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    spans: list[Span]

    @property
    def nbytes(self) -> int:
        return sum(span.stop - span.start for span in self.spans)


def expected_shapes(config: InternVLConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of transformers' model under the name it is stored by, in the model's order; no memory is taken.

    raises  ValueError where the config describes no model
    """
    try:
        with torch.device("meta"):
            model = InternVLForConditionalGeneration(config)
    except Exception as error:  # a config whose fields do not go together fails in any of the modules
        raise ValueError(f"config.json describes no model: {type(error).__name__}: {error}") from error
    return {names.stored_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def original_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """The same tensors in the original layout and its modules' order: tower, language model, adapter."""
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if (placed := names.to_original(name)) is None:
            raise ValueError(f"the original layout has no place for {name}, which this config.json asks for")
        rows = found[placed[0]][0] if placed[0] in found else 0
        found[placed[0]] = (rows + shape[0], *shape[1:])
    order = ("vision_model.", names.LANGUAGE, "mlp1.")
    return dict(sorted(found.items(), key=lambda item: next(i for i, o in enumerate(order) if item[0].startswith(o))))


def check(stored: Mapping[str, Stored], expected: Mapping[str, tuple[int, ...]], *, tied: bool, where: str) -> None:
    """raises  ValueError that lists the tensors that are missing, left over or of another shape"""
    optional = {names.HEAD} if tied else set()
    missing = [name for name in expected if name not in stored and name not in optional]
    leftover = sorted(name for name in stored if name not in expected)
    wrong = [
        f"{name}: expected {list(expected[name])}, got {list(stored[name].shape)}"
        for name in expected
        if name in stored and stored[name].shape != expected[name]
    ]
    found = {"missing": missing, "left over": leftover, "of another shape": wrong}
    if said := [f"{len(listed)} {kind}: {_few(listed)}" for kind, listed in found.items() if listed]:
        raise ValueError(f"{where}: its tensors are not those that its config.json asks for; {'; '.join(said)}")


def check_head(stored: Mapping[str, Stored], *, where: str) -> None:
    """raises  ValueError where a head that the config ties to the embedding holds other values"""
    if names.HEAD not in stored:
        return
    head, embedding = stored[names.HEAD], stored[names.EMBEDDING]
    if (head.dtype, head.shape) == (embedding.dtype, embedding.shape):
        step = 1 << 22
        pairs = ((t.read(i, min(i + step, t.nbytes)) for t in (head, embedding)) for i in range(0, head.nbytes, step))
        if all(b"".join(a) == b"".join(b) for a, b in pairs):
            return
    raise ValueError(
        f"{where}: tie_word_embeddings is true, expected no {names.HEAD} or one equal to {names.EMBEDDING}, "
        "got another; say tie_word_embeddings false in its config.json if the head is its own"
    )


def to_transformers(stored: Iterable[Stored]) -> dict[str, Target]:
    """Tensors of the original layout, checked, as transformers stores them: a qkv is cut in three."""
    targets = {}
    for tensor in stored:
        parts = names.to_transformers(tensor.name) or []
        rows, size = tensor.shape[0] // max(len(parts), 1), tensor.nbytes // max(len(parts), 1)
        for index, name in enumerate(parts):
            span = Span(tensor, index * size, (index + 1) * size)
            targets[name] = Target(name, tensor.dtype, (rows, *tensor.shape[1:]), [span])
    return targets


def to_original(stored: Iterable[Stored]) -> dict[str, Target]:
    """Tensors as transformers stores them, checked, in the original layout: q, k and v joined.

    raises  ValueError where q, k and v of a layer have different dtypes
    """
    parts: dict[str, dict[int, Stored]] = {}
    for tensor in stored:
        name, third = names.to_original(tensor.name) or (tensor.name, 0)
        parts.setdefault(name, {})[third] = tensor
    targets = {}
    for name, thirds in parts.items():
        ordered = [thirds[third] for third in sorted(thirds)]
        if len(dtypes := {tensor.dtype for tensor in ordered}) > 1:
            raise ValueError(f"{name}: expected q, k and v of one dtype, got {sorted(dtypes)}")
        shape = (sum(tensor.shape[0] for tensor in ordered), *ordered[0].shape[1:])
        spans = [Span(tensor, 0, tensor.nbytes) for tensor in ordered]
        targets[name] = Target(name, ordered[0].dtype, shape, spans)
    return targets


def language_model(targets: Mapping[str, Target]) -> dict[str, Target]:
    """The language model's alone, under Qwen2ForCausalLM's own names."""
    inner = {n.removeprefix(names.LANGUAGE): t for n, t in targets.items() if n.startswith(names.LANGUAGE)}
    return {name: target._replace(name=name) for name, target in inner.items()}


def _few(listed: list[str]) -> str:
    return f"{', '.join(listed[:8])}{f' and {len(listed) - 8} more' if len(listed) > 8 else ''}"
