"""Rollout: each prompt is prefilled once for its G responses, and every sampled token keeps its behaviour log-prob.

B prompts, G responses a prompt, R new tokens at most, V vocabulary.
"""

from __future__ import annotations

import torch

from r1v2_fast.data.collate import Sequence, collate
from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout.engine import Prompt, Response
from r1v2_fast.rollout.sampling import pick, uniforms


@torch.no_grad()
def rollout(
    policy: Policy,
    prompts: list[Prompt],
    *,
    group_size: int,
    max_new_tokens: int,
    temperature: float,
    seeds: list[int] | None = None,
) -> list[Response]:
    """Sample `group_size` responses a prompt, in the prompts' order; temperature 0 takes the likeliest token.

    seeds  one a prompt: its responses depend on it, and not on what else is sampled; needed above temperature 0
    """
    assert temperature == 0 or (seeds is not None and len(seeds) == len(prompts)), "one seed a prompt"
    with policy.precision():
        batch = collate([Sequence(p.ids, [], p.image_keys) for p in prompts], policy.tokenizer.pad_token_id)
        batch = batch.to(policy.internvl.device)
        language_model = policy.internvl.language_model
        output = language_model(
            inputs_embeds=policy.embed(batch.input_ids, batch.image_keys),
            attention_mask=batch.attention_mask,
            position_ids=batch.positions,
            use_cache=True,
        )
        cache = output.past_key_values
        cache.batch_repeat_interleave(group_size)
        hidden = output.last_hidden_state[:, -1].repeat_interleave(group_size, 0)
        mask = batch.attention_mask.repeat_interleave(group_size, 0)
        position = batch.positions[:, -1:].repeat_interleave(group_size, 0)
        end = torch.tensor(end_ids(policy), device=hidden.device)
        alive = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        tokens, logprobs, alives = [], [], []
        noise = uniforms(seeds, group_size, max_new_tokens).to(hidden.device) if temperature and seeds else None
        for step in range(max_new_tokens):
            logits = policy.head(hidden).float()
            logits[:, policy.forbidden] = -torch.inf
            token, logprob = pick(logits, temperature, None if noise is None else noise[:, step])
            tokens.append(token)
            logprobs.append(logprob)
            alives.append(alive)
            alive = alive & ~torch.isin(token, end)
            if step + 1 == max_new_tokens or not alive.any():
                break
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position = position + 1
            hidden = language_model(
                inputs_embeds=policy.internvl.get_input_embeddings()(token[:, None]),
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state[:, -1]
    lengths = torch.stack(alives, 1).sum(1).tolist()
    rows = torch.stack(tokens, 1).tolist()
    columns = torch.stack(logprobs, 1).cpu()
    finished = (~alive).tolist()
    return [
        Response(row[:n], columns[i, :n].clone(), finished[i])
        for i, (row, n) in enumerate(zip(rows, lengths, strict=True))
    ]


def end_ids(policy: Policy) -> list[int]:
    """The tokens that end a response: the generation config's, else the tokenizer's."""
    ids = policy.loaded.model.generation_config.eos_token_id
    if ids is None:
        ids = policy.tokenizer.eos_token_id
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]
