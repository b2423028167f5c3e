"""Rows: against the loop's own micro-batches, token counts and attention layouts."""

import itertools
from collections import Counter

import pytest

from r1v2_fast import config
from r1v2_fast.data.collate import Sequence
from r1v2_fast.models.packing import pack, packed_tokens
from r1v2_fast.plan import work
from r1v2_fast.plan.work import Row
from r1v2_fast.train.batching import Single, micro_batches, tokens
from r1v2_fast.train.stages.mpo import Pair


def samples(groups: int, sequences: int, unit: int, prompt: int, response: int) -> list:
    made = []
    for group in range(groups):
        side = Sequence([group + 1] * prompt, [1] * response, [])
        made += [Pair(side, side) if unit == 2 else Single(side) for _ in range(sequences // unit)]
    return made


GRID = [
    *itertools.product((1, 3, 8), (2, 4, 8), (1, 2), (40,), (15,), (None, 50, 120, 200, 333, 1000)),
    (2, 6, 1, 10, 90, 250),  # a prompt much shorter than its responses
]


@pytest.mark.parametrize("packed", [True, False])
def test_rows_are_the_micro_batches_of_the_loop(packed):
    for groups, sequences, unit, prompt, response, budget in GRID:
        parts = micro_batches(samples(groups, sequences, unit, prompt, response), budget, packed=packed)
        real = Counter(tokens(part, packed=packed) for part in parts)
        rows = work.rows(groups, sequences, unit, prompt, response, budget, packed=packed)
        planned = Counter(row.tokens for row in rows)
        assert planned == real, (groups, sequences, unit, prompt, response, budget)


def test_tokens_of_a_packed_row_are_each_prompt_once_and_all_responses():
    row = Row(3, 4, 25, 11)
    assert row.tokens == packed_tokens([s for sample in samples(3, 4, 1, 25, 11) for s in sample.sequences])
    assert Row(3, 4, 25, 11, packed=False).tokens == 3 * 4 * (25 + 11)


def test_attention_computes_the_pairs_that_the_layout_shows():
    row = Row(2, 3, 120, 80)
    layout = pack([s for sample in samples(2, 3, 1, 120, 80) for s in sample.sequences]).layout
    seen = int(layout.dense().sum())
    assert row.pairs("flex") == pytest.approx(seen, rel=0.01)  # a token sees itself too: half a pair each is left out
    behind = 3 * 80
    assert row.mask("sdpa") == 2 * behind * (120 + behind)
    assert row.mask("flex") == 0


def recipe(**stages) -> config.Recipe:
    rewards = [{"name": "answer", "function": "exact_match"}]
    made = {name: {"steps": 1, "data": "x.jsonl", "rewards": rewards, **values} for name, values in stages.items()}
    if "grpo" in made:
        made["grpo"]["informative_from"] = "answer"
    return config.resolve(
        {
            "run": {"name": "x", "folder": "x", "stages": list(made)},
            "model": {"preset": "digits"},
            "data": {"folder": "x"},
            "evaluation": {"sets": {"x": "x.jsonl"}},
            **made,
        },
        source="test",
    )


def of(made: config.Recipe, name: str, gpus: int = 1) -> work.Work:
    return work.of(name, getattr(made, name), made, gpus=gpus, prompt=100, response=20, tiles=1)


def test_a_stage_says_how_often_its_rows_run():
    plain = of(recipe(grpo={"sampling": {"prompts": 6, "group_size": 4}}), "grpo")
    assert (plain.passes, plain.scored, plain.updates, plain.tokens) == (1, 0, 1, 6 * (100 + 4 * 20))
    several = of(
        recipe(grpo={"updates_per_rollout": 2, "mini_batches": 3, "loss": {"kl_coef": 0.1},
                     "sampling": {"prompts": 6, "group_size": 4}}),
        "grpo",
    )  # fmt: skip
    assert (several.passes, several.scored, several.updates, len(several.rows)) == (2, 2, 6, 3)
    assert several.tokens == 2 * plain.tokens
    pairs = of(recipe(mpo={"max_pairs": 9, "sampling": {"prompts": 6, "group_size": 4}}), "mpo")
    assert pairs.largest.sequences == 2 * 4  # two right and two wrong responses form four pairs
    assert pairs.scored == 1


def test_prompts_are_dealt_out_over_the_gpus():
    made = recipe(grpo={"sampling": {"prompts": 6, "group_size": 4}})
    assert [of(made, "grpo", gpus).prompts for gpus in (1, 2, 4, 6, 64)] == [6, 3, 2, 1, 1]


def test_a_prompt_without_tokens_is_refused():
    made = recipe(grpo={})
    with pytest.raises(ValueError, match="--prompt-tokens and --response-tokens of 1 or more, got 0 and 5"):
        work.of("grpo", made.grpo, made, gpus=1, prompt=0, response=5, tiles=1)
