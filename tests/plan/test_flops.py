"""FLOPs: the formulas against PyTorch's counter on real forwards and backwards."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from r1v2_fast import ops
from r1v2_fast.models import vision
from r1v2_fast.plan import flops, shapes
from r1v2_fast.plan.work import Row
from r1v2_fast.testing.flops import matmul_flops


def counted(toys, made, row: Row) -> tuple[int, int]:
    """FLOPs of forward and backward; under the math backend attention's products are seen too."""
    rows = toys.batch(made, row)
    with made.precision():
        made.image_embeddings(rows.image_keys)  # the tower's features are cached before
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            hidden = made.hidden(rows)
        with FlopCounterMode(display=False) as backward:
            hidden.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


# the math backend computes a prompt's whole square, the formula half of it: prompts are short here
SHORT = Row(2, 3, 8, 90)


@pytest.mark.parametrize("train", [("adapter",), ("adapter", "llm")], ids="+".join)
@pytest.mark.parametrize("size", ["digits", "mid", "qwen3"])
def test_flops_of_a_row_are_those_that_the_counter_sees(toys, size, train):
    made = toys.build(size, train=train)
    of = shapes.of(made.loaded.model.config)
    settings = toys.settings(trains_llm="llm" in train)
    planned = flops.of_row(of, SHORT, settings, tiles=1)
    forward, backward = counted(toys, made, SHORT)
    assert sum(planned[f"{part} forward"] for part in ("matrices", "attention", "adapter")) == pytest.approx(
        forward, rel=0.02
    )
    # the math backend keeps its probabilities: four products backward, where fused kernels make a fifth
    attention = planned["attention backward"] * 4 / 5
    expected = planned["matrices backward"] + planned["adapter backward"] + attention
    assert expected == pytest.approx(backward, rel=0.02)


@pytest.mark.parametrize("trains", [False, True])
def test_flops_of_the_head_are_the_ops_own(toys, trains):
    of = shapes.of(toys.build("mid").loaded.model.config)
    row = Row(1, 4, 8, 64)
    hidden = torch.randn(row.targets, of.hidden, requires_grad=True)
    weight = torch.randn(of.vocabulary, of.hidden, requires_grad=trains)
    targets = torch.zeros(row.targets, dtype=torch.int64)
    seen = matmul_flops(lambda: ops.linear_logprobs(hidden, weight, targets).logprobs.sum().backward())
    planned = flops.of_row(of, row, toys.settings(trains_llm=trains), tiles=1)["head"]
    assert planned == pytest.approx(seen, rel=0.02)


def test_flops_of_a_picture_are_those_of_the_tower(toys):
    made = toys.build("digits")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        vision.tower_features(made.internvl, torch.randn(3, 3, 16, 16))
    of = shapes.of(made.loaded.model.config)
    patches = 2 * 3 * of.patches * 3 * 4 * 4 * of.vision_width  # the counter sees the patches' convolution too
    assert flops.of_picture(of, tiles=3) == pytest.approx(counter.get_total_flops() - patches, rel=0.02)


def test_flops_of_the_adapter_are_those_of_its_module(toys):
    made = toys.build("mid")
    of = shapes.of(made.loaded.model.config)
    features = torch.randn(2, of.image_tokens, of.channels)
    with FlopCounterMode(display=False) as forward:
        out = made.internvl.multi_modal_projector(features)
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    planned = flops.of_row(of, SHORT, toys.settings(), tiles=1)
    assert planned["adapter forward"] == forward.get_total_flops()
    assert planned["adapter backward"] == backward.get_total_flops()
