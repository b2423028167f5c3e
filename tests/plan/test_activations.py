"""Activations: the formula against what autograd keeps, storage by storage, of real models on the CPU."""

import pytest
import torch

from r1v2_fast.models import policy
from r1v2_fast.plan import memory, shapes
from r1v2_fast.plan.work import Row
from r1v2_fast.testing.memory import peak_bytes


class Kept:
    """Bytes of the distinct storages that a forward leaves behind for the backward, parameters apart."""

    def __init__(self, made: policy.Policy):
        self.parameters = {p.untyped_storage().data_ptr() for p in made.root.parameters()}
        self.sizes: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []  # a freed storage's address would be given out again

    def see(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.parameters:
            self.sizes[storage.data_ptr()] = storage.nbytes()
            self._alive.append(tensor)
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def forward(toys, made: policy.Policy, row: Row) -> tuple[Kept, torch.Tensor]:
    kept = Kept(made)
    with torch.autograd.graph.saved_tensors_hooks(kept.see, lambda tensor: tensor):
        hidden = made.hidden(toys.batch(made, row))
    return kept, hidden


ROWS = {
    "packed": Row(2, 3, 40, 30),
    "one long group": Row(1, 8, 24, 60),  # masks of SDPA weigh most here
    "long prompts": Row(3, 2, 150, 12),
    "padded": Row(2, 3, 40, 30, packed=False),
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("size", ["digits", "mid", "qwen3"])
def test_activations_are_what_autograd_keeps(toys, size, row):
    made = toys.build(size)
    kept, _ = forward(toys, made, row)
    planned = memory.saved(shapes.of(made.loaded.model.config), row, toys.settings(), tiles=1)
    assert planned == pytest.approx(kept.bytes, rel=0.02)


@pytest.mark.parametrize("size", ["digits", "mid", "qwen3"])
def test_activations_in_bfloat16_are_what_autograd_keeps_under_autocast(toys, size):
    made = toys.build(size, torch.bfloat16)
    kept, _ = forward(toys, made, ROWS["packed"])
    planned = memory.saved(shapes.of(made.loaded.model.config), ROWS["packed"], toys.settings(2), tiles=1)
    assert planned == pytest.approx(kept.bytes, rel=0.05)


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_activations_of_a_language_model_that_trains_are_what_autograd_keeps(toys, dtype, row):
    made = toys.build("mid", dtype, train=("adapter", "llm"))
    kept, _ = forward(toys, made, row)
    width = dtype.itemsize
    planned = memory.saved(shapes.of(made.loaded.model.config), row, toys.settings(width, trains_llm=True), tiles=1)
    assert planned == pytest.approx(kept.bytes, rel=0.06)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("width, dtype", [(4, torch.float32), (2, torch.bfloat16)], ids=["fp32", "bf16"])
def test_the_peak_of_forward_and_backward_stays_below_the_plan_and_near_it(toys, width, dtype, checkpointing):
    made, row = toys.build("mid", dtype), ROWS["packed"]
    made.checkpointing = checkpointing
    rows = toys.batch(made, row)
    with made.precision():
        made.image_embeddings(rows.image_keys)  # the tower's features are cached before

    peak = peak_bytes(lambda: made.hidden(rows).sum().backward())
    of, wanted = shapes.of(made.loaded.model.config), toys.settings(width, checkpointing=checkpointing)
    planned = memory.saved(of, row, wanted, tiles=1) + memory.working(of, row, wanted) + 4 * of.adapter
    assert 0.75 * planned < peak <= planned


@pytest.mark.parametrize("size", ["digits", "mid", "qwen3"])
def test_checkpointed_activations_are_the_layers_inputs_and_one_layer(toys, size, monkeypatch):
    made, row = toys.build(size), ROWS["packed"]
    made.checkpointing = True
    inputs = Kept(made)
    real = policy.checkpoint

    def seen(function, *args, **kwargs):
        if torch.is_grad_enabled():  # the frozen tower keeps nothing
            for value in (*args, *function.keywords["position_embeddings"]):
                inputs.see(value)
        return real(function, *args, **kwargs)

    monkeypatch.setattr(policy, "checkpoint", seen)
    outside, _ = forward(toys, made, row)
    of = shapes.of(made.loaded.model.config)
    held = Kept(made)
    held.sizes = {**outside.sizes, **inputs.sizes}
    whole = memory.saved(of, row, toys.settings(checkpointing=True), tiles=1)
    assert len(inputs.sizes) == of.layers + 2  # and the rotary tables
    assert whole - memory.layer_saved(of, row, toys.settings()) == pytest.approx(held.bytes, rel=0.05)
