"""The engine that a recipe's `rollout` section names."""

from __future__ import annotations

from collections.abc import Callable

from r1v2_fast.config import Rollout
from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout.engine import Engine
from r1v2_fast.rollout.generation import LocalEngine
from r1v2_fast.rollout.http import Client, api_key
from r1v2_fast.rollout.vllm import VLLMEngine
from r1v2_fast.rollout.weight_transfer import WeightTransfer


def engine_of(settings: Rollout, policy: Policy, agree: Callable[[bool], bool] | None = None) -> Engine:
    """An engine that samples from `policy`; `agree` as `LocalEngine` takes it.

    raises  ValueError where the server's address or key is not as it must be; nothing is sent yet
    """
    if settings.engine == "local":
        return LocalEngine(
            policy,
            max_rows=settings.max_rows,
            prefill_tokens=settings.prefill_tokens,
            cuda_graphs=settings.cuda_graphs,
            agree=agree,
        )
    client = Client(
        settings.url,
        key=api_key(settings.url, settings.api_key_env),
        timeout=settings.timeout,
        retries=settings.retries,
    )
    address = settings.weight_transfer
    return VLLMEngine(
        policy,
        client,
        model=settings.model,
        concurrency=settings.concurrency,
        tolerance=settings.probe_tolerance,
        transfer=WeightTransfer(policy, client, address) if address else None,
    )
