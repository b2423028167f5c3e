"""The step that is timed against TRL's trainer is the same step: equal batches, responses of one length, gradients that agree."""

from bench import grpo_step


def test_both_sides_make_the_step_and_the_packed_gradient_is_the_padded_one(tmp_path):
    line = grpo_step.measure(tmp_path, tiles=1, response=4, train=["adapter"], rounds=1, device="cpu")
    assert line["gradient_difference"] <= 1e-5
    assert line["tokens"]["packed"] == 8 * (line["prompt"] + 8 * 4)
    assert line["tokens"]["padded"] == 64 * (line["prompt"] + 4)
    assert line["step"]["trl"]["rounds"] == line["step"]["ours"]["rounds"] == 1
