"""A toy that has opinions: its untrained weights are scaled until its answers depend on the prompt and the picture."""

import pytest
import torch

from r1v2_fast import config
from r1v2_fast.log import Log
from r1v2_fast.rollout.engine import Prompt
from r1v2_fast.train.context import Context


def sharpen(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                parameter.mul_(5.0 if "language_model" in name or "lm_head" in name else 2.0)


@pytest.fixture(scope="module")
def context(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    sizes = "data.sizes={align: 16, policy: 16, reward: 16, heldout: 16}"
    recipe = config.load("digits", [f"run.folder={folder}", sizes])
    context = Context(recipe, folder, Log(folder))
    loaded = context.initial()
    sharpen(loaded.model)
    context.use(loaded)
    context.policy.train_parts(["adapter"])
    return context


@pytest.fixture(scope="module")
def prompts(context):
    """Of unequal lengths, with one picture, none and two."""
    dataset = context.corpus.dataset("policy.parquet")
    found = context.reader.prompts(dataset, dataset.records[:6])
    words = context.policy.tokenizer("Read the digits.", add_special_tokens=False)["input_ids"]
    text = Prompt("text", [*words, *words[:2]], [])
    two = Prompt("two pictures", found[0].ids + found[1].ids, found[0].image_keys + found[1].image_keys)
    assert len({len(prompt.ids) for prompt in [*found, text, two]}) >= 4
    return [found[0], text, *found[1:4], two, *found[4:]]
