"""A recipe's mistakes: each is a sentence before anything starts."""

import pytest

from r1v2_fast import config

REWARD = "{name: a, function: exact_match}"
MISTAKES = {
    "grpo.sampling.group_siz=4": "unknown key 'grpo.sampling.group_siz'; did you mean 'group_size'",
    "grpo.lora={llm: {rnk: 4}}": "unknown key 'grpo.lora.llm.rnk'; did you mean 'rank'",
    "grpo.rewards=[{name: x": "override .*: not YAML",
    "grpo.optimizer.lr=.inf": "grpo.optimizer.lr: .*finite",
    "mpo.rewards=[{name: a, function: exact_match, weight: .nan}]": "mpo.rewards.0.weight: .*finite",
    "mpo.optimizer.betas=[0.9, 3]": "mpo.optimizer.betas.1: .*less than 1, got 3",
    "mpo.weights=[-1, 0, 1]": "mpo.weights.0: .*greater than or equal to 0, got -1",
    "grpo.loss.clip_low=3": "grpo.loss.clip_low: .*less than or equal to 1, got 3",
    "reward.rewards=[]": "reward.rewards: .*at least 1 item",
    f"mpo.rewards=[{REWARD}, {REWARD}]": r"mpo.rewards: rewards must have distinct names, got \['a', 'a'\]",
    "grpo.informative_from=answr": r"grpo.informative_from must be one of \['answer', 'format', 'model'\], got 'answr'",
    "grpo.overlong_cache=13": "overlong_cache must be at most max_new_tokens = 12, got 13",
    "grpo.train=[]": "grpo: train or lora must name a part",
    "mpo.sampling=null": "mpo.rewards has no meaning while mpo.sampling is null",
    "evaluation.sets={}": "evaluation.sets: .*at least 1 item",
    "run.stages=[align, mpo]": "mpo.rewards uses reward_model, but no stage 'reward' comes before it",
    "checkpoint.best=accuracy": "checkpoint.best must be one of .*'eval/clean/accuracy'.*, got 'accuracy'",
}


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_is_named_with_what_was_got(override):
    with pytest.raises(ValueError, match=MISTAKES[override]) as raised:
        config.load("digits", [override])
    assert len(str(raised.value)) < 500


def test_a_penalty_and_a_reward_cannot_share_a_name():
    taken = "grpo.rewards=[{name: overlong, function: exact_match}]"
    with pytest.raises(ValueError, match="a reward named 'overlong' would be mistaken"):
        config.load("digits", [taken, "grpo.informative_from=overlong", "grpo.overlong_cache=4"])


def test_a_file_that_is_no_yaml_is_named(tmp_path):
    (tmp_path / "x.yaml").write_text("run: {name: x\ngrpo: [")
    with pytest.raises(ValueError, match=r"x.yaml: not YAML: "):
        config.load(str(tmp_path / "x.yaml"), [])


@pytest.mark.parametrize("written", ["on", "off", "auto", '"on"'])
def test_a_switch_takes_the_words_that_yaml_reads_as_booleans(written):
    assert config.load("digits", [f"model.fused_layers={written}"]).model.fused_layers == written.strip('"')
    with pytest.raises(ValueError, match="model.fused_layers: Input should be 'auto', 'on' or 'off', got 1"):
        config.load("digits", ["model.fused_layers=1"])
