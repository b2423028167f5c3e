"""The language model's weights to a vLLM server, through vLLM's own weight transfer (NCCL), for runs that train it.

Not yet run against a real engine. It follows vLLM's documented trainer side (`vllm.distributed.weight_transfer`, 0.32): vllm
must be installed here too, and the server be started with VLLM_SERVER_DEV_MODE=1 and --weight-transfer-config
'{"backend": "nccl"}'. Those endpoints take no key, so the server must be on loopback.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from r1v2_fast.models import freeze, lora
from r1v2_fast.models.policy import Policy
from r1v2_fast.rollout.http import Client, loopback


def language_model_weights(policy: Policy) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's weights, LoRA merged, under the names of its own Hugging Face folder and in its dtype."""
    for name, tensor in lora.merged_state(policy.root).items():
        if freeze.part_of(name) == "llm":
            yield name.replace("model.language_model.", "model.", 1), tensor.to(policy.dtype).contiguous()


class WeightTransfer:
    """Sends `policy`'s language model to the server of `client`; `address`, host:port, is where its workers find us.

    raises  ValueError where the server is not on loopback, or the address is none; RuntimeError without vllm
    """

    def __init__(self, policy: Policy, client: Client, address: str):
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"rollout.weight_transfer must be host:port, got {address!r}")
        if not loopback(client.url):
            raise ValueError(f"weights go to a server on loopback alone: its endpoints take no key, got {client.url}")
        self.policy, self.client, self.address = policy, client, (host, int(port))
        self._sender: Any = None

    def send(self) -> None:
        if self._sender is None:
            self._sender = self._open()
        self.client.post("/pause?mode=wait", {})  # the caches of the old weights are dropped
        try:
            self._sender.send_weights()
        finally:
            self.client.post("/resume", {})

    def close(self) -> None:
        if self._sender is not None:
            self._sender.shutdown()
            self._sender = None

    def _open(self) -> Any:
        try:
            from vllm.distributed import weight_transfer as vllm
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        except ImportError as error:
            raise RuntimeError(
                "rollout.weight_transfer needs a vllm with weight transfer installed beside this package; "
                "runs that train the adapter or the tower alone, or rollout.engine=local, need none"
            ) from error
        policy = self.policy

        class Source(vllm.WeightSource):
            def metadata(self):
                return [vllm.ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in language_model_weights(policy)]

            def __iter__(self):
                yield from language_model_weights(policy)

        host, port = self.address
        workers = self.client.get("/get_world_size")["world_size"]
        return vllm.WeightTransferTrainerFactory.trainer_init(
            init_info=NCCLTrainerInitInfo(master_address=host, master_port=port, world_size=workers + 1, rank=0),
            client=vllm.HTTPVLLMWeightSyncClient(self.client.url),
            source=Source(),
        )
