"""The reference policy without a second model: trained weights change places with their initial values, nothing else moves."""

import pytest
import torch

from r1v2_fast import config
from r1v2_fast.log import Log
from r1v2_fast.models import lora
from r1v2_fast.train.context import Context


@pytest.fixture(params=[[], ["llm"]], ids=["adapter", "adapter and LoRA"])
def policy(request, tmp_path):
    recipe = config.load(
        "digits", [f"run.folder={tmp_path}", "data.sizes={align: 4, policy: 4, reward: 4, heldout: 4}"]
    )
    context = Context(recipe, tmp_path, Log(tmp_path))
    context.use(context.initial())
    policy = context.policy
    policy.train_parts(["adapter"], {part: config.LoRA(rank=2) for part in request.param}, seed=0)
    policy.keep_reference()
    with torch.no_grad():
        for parameter in policy.parameters.values():
            parameter.add_(0.1)
    return policy


def where(module):
    """Address and bits of every parameter and buffer."""
    return {n: (t.data_ptr(), t.detach().clone()) for n, t in module.state_dict(keep_vars=True).items()}


def moved(before, after):
    assert before.keys() == after.keys()
    return {n for n in before if before[n][0] != after[n][0] or not torch.equal(before[n][1], after[n][1])}


def test_inside_only_the_trained_weights_move_and_outside_all_is_as_before(policy):
    before = where(policy.root)
    in_full = {n for n in policy.parameters if lora.MARK not in n}
    held = {value.data_ptr() for value in policy._initial}
    with policy.reference():
        inside = where(policy.root)
        assert moved(before, inside) == in_full and not torch.is_grad_enabled()
        assert {inside[n][0] for n in in_full} == held, "they are the kept values themselves, not copies"
    assert not moved(before, where(policy.root)) and torch.is_grad_enabled()


def test_it_takes_the_memory_of_the_trained_weights_alone(policy):
    in_full = [p for n, p in policy.parameters.items() if lora.MARK not in n]
    assert sum(v.nbytes for v in policy._initial) == sum(p.nbytes for p in in_full)


def test_gradients_and_optimizer_state_stay_with_the_trained_weights(policy):
    optimizer = torch.optim.AdamW(list(policy.parameters.values()))
    for parameter in policy.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    gradients = {n: p.grad.data_ptr() for n, p in policy.parameters.items()}
    moments = {n: optimizer.state[p]["exp_avg"].data_ptr() for n, p in policy.parameters.items()}
    with policy.reference():
        pass
    assert gradients == {n: p.grad.data_ptr() for n, p in policy.parameters.items()}
    assert moments == {n: optimizer.state[p]["exp_avg"].data_ptr() for n, p in policy.parameters.items()}


def test_an_error_inside_leaves_the_trained_weights_in_place(policy):
    before = where(policy.root)
    with pytest.raises(KeyError), policy.reference():
        raise KeyError
    assert not moved(before, where(policy.root))
