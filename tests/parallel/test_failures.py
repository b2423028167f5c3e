"""One rank's failure ends the others with a sentence, and the last completed checkpoint is whole, named and resumable."""

import time

import pytest

from r1v2_fast.parallel.stored import broken
from r1v2_fast.parallel.world import ALONE


def test_a_killed_rank_ends_the_others_and_the_run_resumes(launch):
    started = time.monotonic()
    done = launch("killed", 2, "run.stages=[grpo]", flags=["--kill", "9", "grpo", "7", "1"])
    assert done.status != 0 and time.monotonic() - started < 60
    checkpoint = done.folder / "checkpoints" / "grpo-000005"
    assert "rank 0 of 2 stops: " in done.said and f"the last completed checkpoint is {checkpoint}" in done.said
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert broken(checkpoint, ALONE) is None
    again = launch("killed", 1, "run.stages=[grpo]", flags=["--resume"])
    assert again.status == 0 and (again.folder / "final").is_dir(), again.said


@pytest.mark.slow
def test_a_reward_that_fails_on_one_rank_stops_all_with_its_words(launch, tmp_path):
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import os\n\n\ndef broken(prompts, completions, **_):\n    if os.environ['RANK'] == '1':\n"
        "        raise KeyError('no such column')\n    return [1.0] * len(completions)\n"
    )
    rewards = f"grpo.rewards=[{{name: answer, function: '{reward}:broken'}}]"
    done = launch("raises", 2, "run.stages=[grpo]", "run.timeout=30", rewards)
    assert done.status != 0
    for rank in (0, 1):
        assert f"rank {rank} of 2 stops: " in done.said
    assert done.said.count("no such column") >= 2 and "holds no checkpoint of a stage yet" in done.said
