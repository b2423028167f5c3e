"""The vLLM engine: a client of a vLLM server that holds the language model; prompts go there as embeddings.

The vision tower and the adapter run here. While they alone train, the server's weights never change; else
`weight_transfer` sends them. P prompt tokens, H hidden size.
"""

from __future__ import annotations

import functools
import re
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from r1v2_fast.data.collate import Sequence, collate
from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout.completion import HOTTEST, Ask, read, request
from r1v2_fast.rollout.engine import Prompt, Response, check_seeds
from r1v2_fast.rollout.generation import end_ids
from r1v2_fast.rollout.http import Client
from r1v2_fast.rollout.weight_transfer import WeightTransfer

# CVE-2025-62164: a crafted embedding wrote outside its memory in the server. 0.11.1 only put the feature behind a switch,
# 0.13.0 checks what it loads (GHSA-mcmc-2m55-j8jj).
FLOOR = (0, 13, 0)
PROBE_TEMPERATURE = 2.0  # hotter than 1: there log-probs at temperature 1 are far from those of what is sampled
PROBE_RESPONSES, PROBE_TOKENS = 2, 16
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # nat, mean over tokens; 16-bit: two implementations' rounding
HALF_TOLERANCE = 0.05


class VLLMEngine:
    """`rollout.engine.Engine` over a vLLM server.

    model        the name it is served under, None the only one
    concurrency  requests in flight, one a prompt
    tolerance    nat that log-probs of the probe may differ by, mean over tokens; None follows the policy's dtype
    transfer     what sends the language model's weights; None where they do not change
    """

    def __init__(
        self,
        policy: Policy,
        client: Client,
        *,
        model: str | None = None,
        concurrency: int = 64,
        tolerance: float | None = None,
        transfer: WeightTransfer | None = None,
    ):
        self.policy = policy
        self.client = client
        self.model = model
        self.concurrency = concurrency
        self.tolerance = TOLERANCE.get(policy.dtype, HALF_TOLERANCE) if tolerance is None else tolerance
        self.transfer = transfer

    @functools.cached_property
    def served(self) -> str:
        """The name of the model that answers, once the server is known to be new enough.

        raises  RuntimeError where the version is below the floor, or the name is not served
        """
        said = self.client.get("/version")
        version = str(said.get("version")) if isinstance(said, dict) else repr(said)
        numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
        floor = ".".join(map(str, FLOOR))
        if numbers is None or tuple(map(int, numbers.groups())) < FLOOR:
            raise RuntimeError(
                f"{self.client.url}: expected vLLM {floor} or newer, got {version}: a crafted embedding could run code in "
                "older servers (CVE-2025-62164)"
            )
        listed = self.client.get("/v1/models")
        try:
            names = [str(entry["id"]) for entry in listed["data"]]
        except (KeyError, TypeError) as error:
            raise RuntimeError(f"{self.client.url}/v1/models: expected a list of models, got {listed!r}") from error
        wanted = names[0] if self.model is None and len(names) == 1 else self.model
        if wanted is None or wanted not in names:
            raise RuntimeError(f"{self.client.url}: expected the model {wanted!r}, got {names}; set rollout.model")
        return wanted

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
        if temperature > HOTTEST:
            raise ValueError(
                f"a vLLM server keeps placeholder tokens out up to temperature {HOTTEST}, got {temperature}; "
                "rollout.engine=local has no such bound"
            )
        ask = Ask(
            self.served, group_size, max_new_tokens, temperature, end_ids(self.policy), self.policy.forbidden.tolist(),
            self.policy.head.weight.shape[0],
        )  # fmt: skip
        pool = ThreadPoolExecutor(self.concurrency)
        window = threading.BoundedSemaphore(self.concurrency)  # embeddings wait here, not in the pool's queue
        answers: list[Future[list[Response]]] = []
        try:
            for index, prompt in enumerate(prompts):
                window.acquire()
                _raise_first(answers)
                body = request(ask, self._embeddings(prompt), seeds[index] if seeds else None)
                answer = pool.submit(self._answer, ask, prompt.id, body)
                answer.add_done_callback(lambda _: window.release())
                answers.append(answer)
            return [response for answer in answers for response in answer.result()]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # after an error the others are not waited for

    def _answer(self, ask: Ask, prompt: str, body: dict[str, Any]) -> list[Response]:
        return read(ask, prompt, self.client.post("/v1/completions", body))

    def _embeddings(self, prompt: Prompt) -> torch.Tensor:
        """[P, H], as the server's language model would make them of tokens, the image tokens replaced."""
        with self.policy.precision():
            ids = torch.tensor([prompt.ids], device=self.policy.internvl.device)
            return self.policy.embed(ids, [prompt.image_keys])[0].to(self.policy.dtype)

    @torch.no_grad()
    def probe(self, prompt: Prompt) -> None:
        """Sample at a temperature that is not 1 and compare the log-probs that come with the policy's own."""
        responses = self.generate(
            [prompt],
            group_size=PROBE_RESPONSES,
            max_new_tokens=PROBE_TOKENS,
            temperature=PROBE_TEMPERATURE,
            seeds=[0],
        )
        theirs = torch.cat([response.logprobs for response in responses])
        sequences = [Sequence(prompt.ids, response.ids, prompt.image_keys) for response in responses]
        batch = collate(sequences, self.policy.tokenizer.pad_token_id).to(self.policy.internvl.device)

        def apart(temperature: float) -> float:
            ours = self.policy.response_logprobs(batch, temperature=temperature).logprobs.float().cpu()
            return (ours - theirs).abs().mean().item()

        got = apart(PROBE_TEMPERATURE)
        if got <= self.tolerance:
            return
        raw = apart(1.0) < got / 2
        raise RuntimeError(
            f"{self.client.url}: at temperature {PROBE_TEMPERATURE:g} its log-probs of sampled tokens must be the policy's "
            f"up to {self.tolerance:g} nat, got {got:.3g} on average"
            + (", and they are nearer to those at temperature 1" if raw else "")
            + ". Start the server with --logprobs-mode processed_logprobs"
            + ("" if raw else "; if it was, its weights, dtype or quantization are not the policy's language model's")
        )

    def sync(self) -> None:
        if self.transfer is not None:
            self.transfer.send()

    def close(self) -> None:
        if self.transfer is not None:
            self.transfer.close()


def _raise_first(answers: list[Future[list[Response]]]) -> None:
    """Where a prompt has failed, no further ones are sent."""
    for answer in answers:
        if answer.done():
            answer.result()
