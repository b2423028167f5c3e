"""The local engine: transformers' language model in this process, a fixed number of rows, refilled as responses end.

B prompts, N = B x G responses, R new tokens at most, S slots (rows of one decode step), H hidden size, V vocabulary.

    free slots <- waiting responses (a prompt is prefilled when its first response begins, and held until its last has)
    hidden [S, H] -> one token a slot -> those that ended free their slot -> decode: hidden of the next
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout.decode import Decoder
from r1v2_fast.rollout.engine import Prompt, Response, check_seeds
from r1v2_fast.rollout.prefill import Prefilled, prefill, prefill_nothing
from r1v2_fast.rollout.sampling import pick, uniforms
from r1v2_fast.rollout.slots import SlotCache, window_of


def end_ids(policy: Policy) -> list[int]:
    """The tokens that end a response: the generation config's, else the tokenizer's."""
    ids = policy.loaded.model.generation_config.eos_token_id
    if ids is None:
        ids = policy.tokenizer.eos_token_id
    return list(ids) if isinstance(ids, (list, tuple)) else [ids]


class LocalEngine:
    """`rollout.engine.Engine` in this process.

    max_rows        slots S; None has one for every response. Keys and values take S x (longest prompt + R) tokens
    prefill_tokens  padded tokens of one prefill, None as many as there are slots for
    cuda_graphs     on a GPU, replay the decode step as a CUDA graph
    agree           whether any rank says True, on every rank: where the model is sharded each forward is a collective, so a
                    rank that has run out goes on with rows that nobody reads. None: this rank is alone

    A response is the same whatever the slots, its company and its rank, up to the rounding of sums in another order.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        max_rows: int | None = None,
        prefill_tokens: int | None = None,
        cuda_graphs: bool = True,
        agree: Callable[[bool], bool] | None = None,
    ):
        window_of(policy.internvl.language_model)  # says at once what it cannot run
        self.policy = policy
        self.max_rows = max_rows
        self.prefill_tokens = prefill_tokens
        self.cuda_graphs = cuda_graphs and agree is None  # collectives are not captured
        self.alone = agree is None
        self.agree = agree or (lambda own: own)

    @torch.no_grad()
    def generate(
        self,
        prompts: list[Prompt],
        *,
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        seeds: list[int] | None = None,
    ) -> list[Response]:
        check_seeds(seeds, prompts, temperature)
        noise = uniforms(seeds, group_size, max_new_tokens) if temperature and seeds else None
        with self.policy.precision():
            run = _Run(self, prompts, group_size, max_new_tokens, temperature, noise)
            while self.agree(run.unfinished):
                run.refill()
                run.pick()
                if self.agree(run.running):
                    run.decode()
            return run.responses()

    def probe(self, prompt: Prompt) -> None:
        """Its log-probs are the policy's own."""

    def sync(self) -> None:
        """Nothing to do: the policy is the one that trains."""

    def close(self) -> None:
        """Nothing to do: between rollouts it holds no tensor."""


class _Run:
    """The state of one `generate`: which response stands in which slot, and what has been sampled so far."""

    def __init__(
        self,
        engine: LocalEngine,
        prompts: list[Prompt],
        group_size: int,
        max_new_tokens: int,
        temperature: float,
        noise: torch.Tensor | None,
    ):
        self.engine, self.policy, self.prompts = engine, engine.policy, prompts
        self.group_size, self.max_new_tokens, self.temperature = group_size, max_new_tokens, temperature
        self.end = set(end_ids(self.policy))
        count = len(prompts) * group_size
        device = self.policy.internvl.device
        self.waiting = list(range(count))[::-1]  # responses not begun, the next one last
        self.slots: list[int | None] = [None] * max(1, min(engine.max_rows or count, count))  # response in each
        self.tokens: list[list[int]] = [[] for _ in range(count)]  # sampled so far
        # a row more than there are responses: idle slots write there and read from there
        self.logprobs = torch.zeros(count + 1, max_new_tokens, device=device)
        self.noise = None
        if noise is not None:
            self.noise = torch.cat([noise, noise.new_zeros(1, max_new_tokens)]).to(device)
        self.held: dict[int, Prefilled] = {}  # prompts with responses that have not begun
        self.decoder: Decoder | None = None
        self.hidden: torch.Tensor | None = None  # [S, H], what predicts each slot's next token

    @property
    def running(self) -> bool:
        return any(response is not None for response in self.slots)

    @property
    def unfinished(self) -> bool:
        return self.running or bool(self.waiting)

    def refill(self) -> None:
        """Waiting responses into free slots, their prompts prefilled where they are the first."""
        free = [slot for slot, response in enumerate(self.slots) if response is None]
        begin = [self.waiting.pop() for _ in range(min(len(free), len(self.waiting)))]
        needed = list(dict.fromkeys(i // self.group_size for i in begin))
        missing = fresh = [prompt for prompt in needed if prompt not in self.held]
        while self.engine.agree(bool(missing)):
            part = self._fitting(missing)
            missing = missing[len(part) :]
            if part:
                self.held |= zip(part, prefill(self.policy, [self.prompts[p] for p in part]), strict=True)
            else:
                prefilled = prefill_nothing(self.policy)
                if self.decoder is None:
                    self._open(prefilled[0])
        for prompt in needed:
            prefilled_prompt = self.held[prompt]
            members = [i for i in begin if i // self.group_size == prompt]
            slots, free = free[: len(members)], free[len(members) :]
            if self.decoder is None:
                self._open(prefilled_prompt)
            assert self.decoder is not None and self.hidden is not None
            self.decoder.cache.fill(slots, prefilled_prompt.cache)
            self.hidden[slots] = prefilled_prompt.hidden
            for slot, response in zip(slots, members, strict=True):
                self.slots[slot] = response
            if not self.waiting or self.waiting[-1] // self.group_size != prompt:
                del self.held[prompt]
            elif prompt in fresh:
                self.held[prompt] = prefilled_prompt.alone()

    def pick(self) -> None:
        """Every slot's next token; a response that has ended gives its slot back."""
        if not self.running:
            if not self.engine.alone:  # a sharded head is a collective too
                self.policy.head(self.hidden)
            return
        assert self.hidden is not None
        idle = len(self.tokens)
        place = [(idle, 0) if i is None else (i, len(self.tokens[i])) for i in self.slots]
        rows, steps = torch.tensor(place, device=self.hidden.device).T
        logits = self.policy.head(self.hidden).float()
        logits[:, self.policy.forbidden] = -torch.inf
        token, logprob = pick(logits, self.temperature, None if self.noise is None else self.noise[rows, steps])
        self.logprobs[rows, steps] = logprob
        for slot, (response, value) in enumerate(zip(self.slots, token.tolist(), strict=True)):
            if response is None:
                continue
            self.tokens[response].append(value)
            if value in self.end or len(self.tokens[response]) == self.max_new_tokens:
                self.slots[slot] = None

    def decode(self) -> None:
        """The hidden states that the tokens just picked lead to."""
        assert self.decoder is not None
        last = [(0, 0) if i is None else (self.tokens[i][-1], self._length(i)) for i in self.slots]
        self.hidden = self.decoder.step(*zip(*last, strict=True))

    def responses(self) -> list[Response]:
        logprobs = self.logprobs.cpu()
        return [
            Response(ids, logprobs[i, : len(ids)].clone(), ids[-1] in self.end) for i, ids in enumerate(self.tokens)
        ]

    def _length(self, response: int) -> int:
        """Tokens of it that the cache holds: its prompt's, and those it was fed before the last one picked."""
        return len(self.prompts[response // self.group_size].ids) + len(self.tokens[response]) - 1

    def _fitting(self, prompts: list[int]) -> list[int]:
        """The first of `prompts` that one prefill takes; one that is too long goes alone."""
        budget = self.engine.prefill_tokens
        longest = count = 0
        for prompt in prompts:
            longest = max(longest, len(self.prompts[prompt].ids))
            if budget is not None and count and longest * (count + 1) > budget:
                break
            count += 1
        return prompts[:count]

    def _open(self, like: Prefilled) -> None:
        """Slots for the longest that this rollout can meet, made once the model has shown its shapes and dtype."""
        columns = max((len(prompt.ids) for prompt in self.prompts), default=1) + self.max_new_tokens
        cache = SlotCache(like.cache, len(self.slots), columns)
        self.decoder = Decoder(self.policy, cache, graphs=self.engine.cuda_graphs)
        self.hidden = like.hidden.new_zeros(len(self.slots), len(like.hidden))
