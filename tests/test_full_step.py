"""The benchmark of whole steps: every policy stage of a recipe is timed in parts, and trains."""

import pytest

from bench import full_step
from r1v2_fast import config


def test_a_line_a_stage_with_seconds_by_part_and_what_was_computed(small_architecture, tmp_path):
    overrides = [f"{s}.sampling={{prompts: 2, group_size: 4, max_new_tokens: 8}}" for s in ("mpo", "grpo")]
    more = ["model.dummy_weights=true", "model.dtype=float32", "data.sizes={policy: 8, heldout: 2}", "data.max_tiles=2"]
    recipe = config.load(
        "internvl3-1b", [small_architecture, *overrides, *more, f"run.folder={tmp_path}", "run.device=cpu"]
    )
    lines = list(full_step.measure(recipe, tmp_path))
    assert [line["stage"] for line in lines] == ["mpo", "grpo"]
    for line in lines:
        assert line["grad_norm"] > 0 and line["sequences"] > 0 and line["flops"] > 0
        inside = sum(line["seconds"][part] for part in ("rollout", "forward", "backward", "optimizer"))
        assert 0 < inside <= line["seconds"]["step"]
    assert lines[1]["packed_tokens"] > lines[1]["response_tokens"] > 0


def test_the_flops_of_a_step_are_those_that_pytorch_counts_without_attention(small_architecture, tmp_path):
    """2 a weight and token forward, 2 backward through frozen weights; the head is inside an op that the counter cannot see."""
    from torch.utils.flop_counter import FlopCounterMode

    from r1v2_fast.data.collate import Sequence
    from r1v2_fast.log import Log
    from r1v2_fast.models.packing import pack
    from r1v2_fast.train.context import Context

    more = [
        "model.dummy_weights=true",
        "model.dtype=float32",
        "run.device=cpu",
        "data.make=digits",
        f"run.folder={tmp_path}",
    ]
    recipe = config.load(
        "internvl3-1b", [small_architecture, *more, "data.sizes={align: 1, policy: 1, reward: 1, heldout: 1}"]
    )
    context = Context(recipe, tmp_path, Log(tmp_path))
    context.use(context.initial())
    context.policy.train_parts(["adapter"])
    sequences = [Sequence([65 + i] * 20, [70] * r, []) for i in range(2) for r in (5, 9)]
    with FlopCounterMode(display=False) as counter:
        context.policy.hidden(pack(sequences)).sum().backward()
    counted = sum(flops for name, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(name))
    text = context.policy.internvl.language_model.config
    heads = text.num_attention_heads * text.hidden_size // text.num_attention_heads
    seen = sum(r * 20 + r * r / 2 for _ in range(2) for r in (5, 9)) + 2 * 20 * 20 / 2
    head = 4 * 28 * context.policy.head.weight.numel()
    ours = full_step.training_flops(context, sequences) - head - 12 * text.num_hidden_layers * heads * seen
    projector = counted - ours  # the adapter runs once for text alone, and its gradient is made
    assert 0 < projector <= 8 * sum(p.numel() for p in context.policy.parameters.values())
    assert ours == pytest.approx(4 * 68 * sum(
        p.numel() for n, p in context.policy.internvl.language_model.named_parameters() if "layers." in n and p.dim() == 2
    ))  # fmt: skip
