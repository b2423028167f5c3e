"""Time: the roofline's arithmetic, and where the shares of the peak come from."""

import json

import pytest

from r1v2_fast.plan import gpus, memory, time
from r1v2_fast.plan.report import seconds


def test_decode_reads_weights_and_keys_and_values_at_the_memorys_bandwidth(made):
    stage = made(overrides=["grpo.sampling.prompts=1"])["grpo"]
    part = stage.time["decode"]
    of = stage.shapes
    reads = 2 * (of.layers * of.layer + of.embedding + 8 * (1992 + 1024) * of.kv)
    share = stage.efficiency.bandwidth.value
    assert part.bound == "memory" and part.seconds == pytest.approx(2048 * reads / (4.8e12 * share))


def test_links_between_nodes_bound_a_gather_where_they_are_slower():
    def machine(count: int, between: float) -> time.Machine:
        return time.Machine(gpus.find("h100"), gpus.ASSUMED, count, between, 2)

    assert machine(1, 1e9).gather(1e9) == 0
    inside = 1e9 * 7 / 8 / 450e9 / gpus.ASSUMED.link.value
    assert machine(8, 1e9).gather(1e9) == pytest.approx(inside)
    assert machine(16, 50e9).gather(1e9) == pytest.approx(1e9 / 2 / 50e9 / gpus.ASSUMED.link.value)
    assert machine(16, 1e15).gather(1e9) == pytest.approx(inside * (15 / 16) / (7 / 8))


def test_a_cache_too_small_for_the_steps_pictures_encodes_them_again(made):
    stage = made()["grpo"]
    small = stage.set("model", feature_cache_gib=0.01)
    assert small.time["vision encode"].seconds == pytest.approx(2 * stage.time["vision encode"].seconds)


def test_measured_lines_of_a_gpu_replace_what_was_assumed(tmp_path):
    line = {
        "stem": "linear_logprob", "case": "frozen head, forward and backward", "provider": "ours", "dtype": "bfloat16",
        "flops": 7e12, "seconds": 0.01, "ceilings": {"bandwidth": 4.0e12, "matmul": {"bfloat16": 800e12}},
        "environment": {"machine": "NVIDIA H200"},
    }  # fmt: skip
    peer, slow = {**line, "provider": "trl", "seconds": 1.0}, {**line, "seconds": 0.02}
    text = "".join(json.dumps(entry) + "\n" for entry in (line, peer, slow, line))
    (tmp_path / "gpu.jsonl").write_text(text)
    found = gpus.efficiency("h200", tmp_path)
    assert found.matmul.value == pytest.approx(800 / 989) and "measured" in found.matmul.source
    assert found.bandwidth.value == pytest.approx(4.0 / 4.8)
    assert found.head.value == pytest.approx(700 / 989) and "3 lines" in found.head.source
    assert gpus.efficiency("h100", tmp_path) == gpus.ASSUMED
    assert gpus.efficiency("h200", tmp_path / "none") == gpus.ASSUMED


def test_fp32_runs_at_the_fp32_rate(made):
    half = made()["grpo"]
    full = half.set("model", dtype="float32")
    ratio = full.time["backward"].seconds / half.time["backward"].seconds
    assert ratio == pytest.approx(989 / 67)
    assert full.memory["held"]["head, frozen"] == 2 * half.memory["held"]["head, frozen"]


def test_mfu_is_the_useful_flops_of_training_over_the_peak(made):
    stage = made()["grpo"]
    plain = stage.set("grpo", gradient_checkpointing=False)
    parts = plain.time
    useful = sum(parts[name].flops for name in time.TRAINING)
    took = sum(parts[name].seconds for name in time.TRAINING)
    assert time.mfu(parts, plain.machine) == pytest.approx(useful / took / 989e12)
    assert time.mfu(stage.time, stage.machine) < time.mfu(parts, plain.machine)  # the recompute is not useful


def test_packing_pays_for_a_prompt_once(made):
    packed, padded = made()["grpo"], made(overrides=["model.packing=false"])["grpo"]
    assert packed.work.tokens < padded.work.tokens == 4 * 8 * (1992 + 2048)
    assert memory.slots(packed.work, packed.needs) == memory.slots(padded.work, padded.needs) == 32


@pytest.mark.parametrize(
    "value, text", [(1234.4, "1,234"), (56.78, "56.8"), (0.894, "0.89"), (0.004, "<0.01"), (0, "0.00")]
)
def test_seconds_have_three_digits_at_most(value, text):
    assert seconds(value) == text


def test_full_sharding_gathers_layers_and_head_at_every_decode_step(made):
    stage = made("r1v2-38b-8gpu", count=8, gpu="h100")["grpo"]
    of, parts = stage.shapes, stage.time
    steps = 4096 * -(-64 // memory.slots(stage.work, stage.needs))
    one = parts["decode"].seconds / steps
    gather = 2 * (of.layers * of.layer + of.embedding) * 7 / 8 / 450e9 / stage.efficiency.link.value
    assert parts["gathers awaited, rollout"].seconds == pytest.approx(steps * (gather - one), rel=0.01)
    assert "gathers awaited, rollout" not in made("r1v2-38b-8gpu", count=8, gpu="h100", shard="none")["grpo"].time
