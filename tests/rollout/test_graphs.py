"""CUDA graphs of the decode step against the eager step, and what happens where a capture fails."""

import pytest

from r1v2_fast.models import load
from r1v2_fast.models.feature_cache import FeatureCache
from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout import decode
from r1v2_fast.rollout.generation import LocalEngine
from r1v2_fast.rollout.graphs import captured


@pytest.mark.gpu
@pytest.mark.parametrize("max_rows", [None, 5])
def test_graphs_give_the_eager_responses(max_rows, context, prompts, tmp_path, monkeypatch):
    load.save_folder(tmp_path, context.policy.loaded)
    loaded = load.from_folder(tmp_path)
    loaded.model.to("cuda")
    policy = Policy(loaded, context.reader.pixels, FeatureCache())
    monkeypatch.setattr(decode, "BUCKET", 16)  # several graphs
    settings = {"group_size": 3, "max_new_tokens": 24, "temperature": 1.0, "seeds": list(range(len(prompts)))}
    eager, graphed = (
        LocalEngine(policy, max_rows=max_rows, cuda_graphs=graphs).generate(prompts, **settings)
        for graphs in (False, True)
    )
    assert [r.ids for r in graphed] == [r.ids for r in eager]
    for one, other in zip(graphed, eager, strict=True):
        assert (one.logprobs - other.logprobs).abs().max() <= 1e-5 * (1 + other.logprobs.abs().max())


def test_a_step_that_cannot_be_captured_runs_eagerly_and_says_so():
    def step():
        raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.warns(RuntimeWarning, match="runs eagerly, which is slower"):
        assert captured(step) is step


def test_a_cpu_has_no_graphs(context, prompts, recwarn):
    settings = {"group_size": 1, "max_new_tokens": 2, "temperature": 0.0}
    LocalEngine(context.policy, cuda_graphs=True).generate(prompts[:1], **settings)
    assert not recwarn.list
