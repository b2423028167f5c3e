"""Time of one step on one GPU by part: a roofline over FLOPs, bytes read and bytes sent.

S slots of a decode step, P prompt tokens, R response tokens; FLOPs are those of `flops`.
"""

from __future__ import annotations

from dataclasses import dataclass

from r1v2_fast.plan import flops, memory
from r1v2_fast.plan.gpus import GPU, NODE, Efficiency
from r1v2_fast.plan.memory import Settings, Shard
from r1v2_fast.plan.shapes import Shapes
from r1v2_fast.plan.work import Work

OPTIMIZER_BYTES = 40  # a parameter: the clip reads the gradient twice and writes it, AdamW reads four and writes three


@dataclass(frozen=True)
class Machine:
    """A GPU with what its kernels reach, and how many there are."""

    gpu: GPU
    efficiency: Efficiency
    count: int
    between_nodes: float
    """Bytes/s into and out of one node of eight."""
    width: int
    """Bytes of an element of model.dtype: 4 runs at the fp32 rate."""

    @property
    def peak(self) -> float:
        """FLOP/s of one GPU in the dtype."""
        return self.gpu.fp32_flops if self.width == 4 else self.gpu.flops

    def compute(self, flops: float, share: float) -> float:
        return flops / (self.peak * share)

    def read(self, count: float) -> float:
        return count / (self.gpu.bandwidth * self.efficiency.bandwidth.value)

    def gather(self, count: float) -> float:
        """Seconds to bring `count` bytes, spread over all GPUs, to each: the slower of NVLink and, between nodes, their link.

        A GPU receives (n - 1) / n of them; a node receives (nodes - 1) / nodes, once for all its GPUs.
        """
        nodes = -(-self.count // NODE)
        inside = count * (self.count - 1) / self.count / self.gpu.nvlink
        outside = count * (nodes - 1) / nodes / self.between_nodes if nodes > 1 else 0.0
        return max(inside, outside) / self.efficiency.link.value


@dataclass(frozen=True)
class Part:
    """Seconds of one part of a step, and what bounds it."""

    seconds: float
    bound: str
    flops: float = 0.0


def by_part(shapes: Shapes, work: Work, settings: Settings, machine: Machine, shard: Shard) -> dict[str, Part]:
    """Seconds of one step on one GPU, the parts one after the other.

    Under full sharding each forward, each backward and each decode step gathers the layers once; what outlasts the
    computing beside it is a part of its own; a picture's wait counts with what comes next.
    """
    full = shard == "full" and machine.count > 1
    layers = machine.gather(shapes.layers * shapes.layer * settings.width) if full else 0.0
    head = machine.gather(shapes.embedding * settings.width) if full else 0.0
    parts: dict[str, Part] = {}
    parts["vision encode"], exposed = _vision(shapes, work, settings, machine, full=full)
    if work.group_size:
        parts["prompt prefill"], waits = _prefill(shapes, work, settings, machine, layers)
        parts["decode"], more = _decode(shapes, work, settings, machine, layers + head)
        if full:
            parts["gathers awaited, rollout"] = Part(exposed + waits + more, "links")
            exposed = 0.0
    train, waits = _training(shapes, work, settings, machine, layers, head)
    parts |= train
    if full:
        parts["gathers awaited, training"] = Part(exposed + waits, "links")
    count = memory.trained(shapes, settings)
    parts["optimizer"] = Part(
        work.updates * machine.read(count * OPTIMIZER_BYTES / (machine.count if full else 1)), "memory"
    )
    if machine.count > 1:  # a reduce-scatter, and without sharding an all-gather behind it
        parts["gradient reduction"] = Part(work.updates * (1 if full else 2) * machine.gather(4 * count), "links")
    return parts


def _vision(shapes: Shapes, work: Work, settings: Settings, machine: Machine, *, full: bool) -> tuple[Part, float]:
    """One picture a call of the tower, which sharding gathers for each."""
    calls = work.prompts * encodes(shapes, work, settings)
    count = calls * flops.of_picture(shapes, work.tiles)
    seconds = machine.compute(count, machine.efficiency.matmul.value)
    gather = calls * machine.gather(shapes.vision * settings.width) if full else 0.0
    return Part(seconds, "FLOPs", count), max(0.0, gather - seconds)


def encodes(shapes: Shapes, work: Work, settings: Settings) -> int:
    """How often a step encodes a picture: once, or in every forward where the cache cannot hold the step's features."""
    features = work.prompts * work.tiles * shapes.image_tokens * shapes.channels * settings.width
    return 1 if features <= settings.feature_cache else bool(work.group_size) + work.passes + work.scored


def _forward(shapes: Shapes, tokens: float, pairs: float, machine: Machine) -> tuple[float, float]:
    """FLOPs and seconds of the layers' forward."""
    matrices, attention = flops.forward(shapes, tokens, pairs)
    e = machine.efficiency
    return matrices + attention, machine.compute(matrices, e.matmul.value) + machine.compute(
        attention, e.attention.value
    )


def _prefill(shapes: Shapes, work: Work, settings: Settings, machine: Machine, layers: float) -> tuple[Part, float]:
    count, seconds = _forward(shapes, work.prompts * work.prompt, work.prompts * work.prompt**2 / 2, machine)
    at_once = max(1, settings.prefill_tokens // work.prompt) if settings.prefill_tokens else work.prompts
    at_once = min(at_once, -(-memory.slots(work, settings) // work.group_size))
    return Part(seconds, "FLOPs", count), max(0.0, -(-work.prompts // at_once) * layers - seconds)


def _decode(shapes: Shapes, work: Work, settings: Settings, machine: Machine, gather: float) -> tuple[Part, float]:
    """ceil(responses / S) R steps: each reads the layers, the head, and S (P + R / 2) tokens' keys and values."""
    slots = memory.slots(work, settings)
    steps = -(-work.prompts * work.group_size // slots) * work.response
    matrices = shapes.layers * shapes.layer + shapes.embedding
    width = work.prompt + work.response / 2
    attention = 4.0 * slots * shapes.layers * shapes.heads * shapes.head_size * width
    count = 2.0 * slots * matrices + attention
    reading = machine.read((matrices + slots * width * shapes.kv) * settings.width)
    computing = machine.compute(count, machine.efficiency.matmul.value)
    one = max(reading, computing)
    bound = "memory" if reading >= computing else "FLOPs"
    return Part(steps * one, bound, steps * count), steps * max(0.0, gather - one)


def _training(
    shapes: Shapes, work: Work, settings: Settings, machine: Machine, layers: float, head: float
) -> tuple[dict[str, Part], float]:
    """Parts of all rows, and the seconds that gathers outlast them."""
    names = ("scoring, no gradient", "training forward", "recompute", "backward", "log-prob head")
    seconds, counts = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)
    waits, e = 0.0, machine.efficiency

    def add(name: str, matrices: float, attention: float, gather: float, share: float) -> float:
        took = machine.compute(matrices, share) + machine.compute(attention, e.attention.value)
        seconds[name] += took
        counts[name] += matrices + attention
        return max(0.0, gather - took)

    for row in work.rows:
        f = flops.of_row(shapes, row, settings, work.tiles)
        forward = f["matrices forward"] + f["adapter forward"]
        backward = f["matrices backward"] + f["adapter backward"]
        for _ in range(work.scored):
            scored = machine.compute(2.0 * row.targets * shapes.embedding, e.head.value)
            waits += add(names[0], forward, f["attention forward"], layers, e.matmul.value)
            waits += max(0.0, head - scored)
            seconds[names[0]] += scored
            counts[names[0]] += 2.0 * row.targets * shapes.embedding
        for _ in range(work.passes):
            waits += add("training forward", forward, f["attention forward"], layers, e.matmul.value)
            waits += add("log-prob head", f["head"], 0.0, head, e.head.value)
            again = 0.0
            if settings.checkpointing:
                again = seconds["recompute"]
                add("recompute", f["matrices forward"], f["attention forward"], 0.0, e.matmul.value)
                again = seconds["recompute"] - again
            waits += add("backward", backward, f["attention backward"], max(0.0, layers - again), e.matmul.value)
    return {name: Part(seconds[name], "FLOPs", counts[name]) for name in names if seconds[name]}, waits


TRAINING = ("training forward", "backward", "log-prob head")
ROLLOUT = ("prompt prefill", "decode", "gathers awaited, rollout")


def mfu(parts: dict[str, Part], machine: Machine) -> float:
    """FLOPs of forward, backward and log-prob head over what the GPU could do in their time, recompute and waits in it."""
    seconds = sum_of(parts, (*TRAINING, "recompute", "gathers awaited, training"))
    return sum(parts[name].flops for name in TRAINING) / (machine.peak * seconds)


def sum_of(parts: dict[str, Part], names: tuple[str, ...] | None = None) -> float:
    """Seconds of the parts named, None of the step."""
    return sum(part.seconds for name, part in parts.items() if names is None or name in names)
