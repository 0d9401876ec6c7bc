"""Takes the trainer's weights inside vLLM's processes, and asks every caller for a key.

The one door to vLLM. vLLM 0.32's own weight-transfer protocol (init, start, update, finish) calls
`TrainerWeights` in each of its workers; a push is a few buckets (`weight_buckets`), which come as a
broadcast over gloo or NCCL, through CUDA IPC, or in a file. Every worker reads whole buckets and
vLLM's loader takes its share, so the engine's tensor parallel size may differ from the trainer's.
"""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import vllm
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from megatron_sgopd.rollouts.vllm_servers.weight_buckets import Entry, view
from megatron_sgopd.rollouts.vllm_servers.weight_wire import (
    DESCRIPTION,
    KEY_VARIABLE,
    OPEN_PATHS,
    SHAPE,
    Receiver,
)

EMBEDDING = "model.embed_tokens.weight"
BACKEND = "sgopd"  # what --weight-transfer-config names


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Describes how the buckets will come; `weight_wire.Receiver` has the fields' meaning."""

    transport: str
    master_address: str = ""
    master_port: int = 0
    world_size: int = 0


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """One bucket: its entries, and where its bytes are."""

    entries: list[list[Any]]
    source: dict[str, Any] = field(default_factory=dict)


class TrainerWeights(WeightTransferEngine[InitInfo, UpdateInfo]):
    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    receiver: Receiver | None = None

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Again after a failed push: the old group is given up."""
        self.shutdown()
        parallel = self.parallel_config
        worker = parallel.data_parallel_index * parallel.world_size + parallel.rank
        self.receiver = Receiver(
            init_info.transport,
            self.device,
            rank=1 + worker,  # the trainer's rank is 0
            world_size=init_info.world_size,
            address=init_info.master_address,
            port=init_info.master_port,
        )

    def start_weight_update(self) -> None:
        # Linear weights are packed and emptied after loading on CPUs: a plain load_weights fails.
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: UpdateInfo) -> None:
        assert self.receiver is not None, "init_weight_transfer_engine comes first"
        entries = [Entry.from_json(row) for row in update_info.entries]
        flat = self.receiver.receive(entries, update_info.source)
        with torch.no_grad():
            self.model.load_weights(_tensors(flat, entries))
            for entry in entries:
                if entry.name == EMBEDDING:
                    self._load_tied_head(view(flat, entry))

    def _load_tied_head(self, embedding: Tensor) -> None:
        """vLLM's loader leaves a tied head out, and on CPUs the head is a packed copy of its own,
        which would keep the old weights ("ParallelLMHead: Failed to load weights")."""
        head = getattr(self.model, "lm_head", None)
        if self.model_config.hf_text_config.tie_word_embeddings and head is not None:
            head.weight.weight_loader(head.weight, embedding)

    def finish_weight_update(self) -> None:
        with torch.no_grad():
            finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        if self.receiver is not None:
            self.receiver.close()
            self.receiver = None


def _tensors(flat: Tensor, entries: Sequence[Entry]) -> Iterator[tuple[str, Tensor]]:
    for entry in entries:
        yield entry.name, view(flat, entry)


if BACKEND not in WeightTransferEngineFactory._registry:  # the module may be imported twice
    WeightTransferEngineFactory.register_engine(BACKEND, TrainerWeights)


class WorkerExtension:
    """Named by --worker-extension-cls so that every worker imports this module."""


class ForTrainers:
    """ASGI middleware: every route asks for the key (vLLM's own --api-key leaves those that change
    weights open), and DESCRIPTION says what is served. Health may be asked for by anyone."""

    def __init__(self, app: Any) -> None:
        self.app, self.key = app, os.environ[KEY_VARIABLE]

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self.key}".encode()):
            await _answer(send, 401, {"error": "the engine wants the key of its run"})
        elif scope["path"] == DESCRIPTION:
            await _answer(send, 200, _description(scope["app"].state.vllm_config))
        else:
            await self.app(scope, receive, send)


def _description(config: Any) -> dict[str, Any]:
    model = config.model_config
    return {
        "model": model.model,
        **{key: getattr(model.hf_text_config, key, None) for key in SHAPE},
        "max_model_len": model.max_model_len,
        "awaits_weights": str(config.load_config.load_format).endswith("dummy"),
        "dtype": str(model.dtype).removeprefix("torch."),
        "logprobs_mode": model.logprobs_mode,
        "version": vllm.__version__,
        "world_size": config.parallel_config.world_size_across_dp,
        "block_size": config.cache_config.block_size,
    }


async def _answer(send: Any, status: int, body: dict[str, Any]) -> None:
    headers = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})
