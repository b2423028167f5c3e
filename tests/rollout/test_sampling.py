"""Inverse-CDF sampling: its distribution, what it never picks, and that a response's numbers are its own."""

import torch

from r1v2_fast.rollout.sampling import pick, uniforms


def test_a_groups_numbers_follow_its_seed_alone():
    both = uniforms([11, 22], 3, 5)
    assert both.shape == (6, 5) and both.dtype == torch.float64
    assert torch.equal(both[:3], uniforms([11], 3, 5)) and torch.equal(both[3:], uniforms([22], 3, 5))
    assert len(both.flatten().unique()) == 30


def test_frequencies_are_the_softmax_at_the_temperature():
    logits = torch.tensor([2.0, -1.0, 0.5, -torch.inf, 1.0])
    n = 200_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # stratified: counts are exact to one a token
    token, logprobs = pick(logits.expand(n, -1), 0.7, grid)
    expected = (logits / 0.7).double().softmax(0)
    counts = torch.bincount(token, minlength=5)
    assert ((counts / n) - expected).abs().max() <= 2 / n
    assert torch.equal(logprobs, (logits / 0.7).log_softmax(0)[token])


def test_tokens_of_probability_0_are_never_picked_at_either_end():
    logits = torch.full((4, 6), -torch.inf)
    logits[:, 2:4] = torch.tensor([0.0, -40.0])
    almost_one = 1 - 2.0**-53
    token, _ = pick(logits, 1.0, torch.tensor([0.0, 0.5, almost_one, 1.0], dtype=torch.float64))
    assert set(token.tolist()) <= {2, 3} and token[0] == 2


def test_a_rare_token_behind_a_large_vocabulary_is_reached():
    """An fp32 sum of 150,000 probabilities stops growing before the last ones."""
    logits = torch.zeros(1, 152_064)
    token, _ = pick(logits, 1.0, torch.tensor([1 - 1e-7], dtype=torch.float64))
    assert token.item() == 152_063


def test_temperature_0_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 1.0]])
    token, logprob = pick(logits, 0, None)
    assert token.item() == 1 and torch.equal(logprob, logits.log_softmax(1)[:, 1])
