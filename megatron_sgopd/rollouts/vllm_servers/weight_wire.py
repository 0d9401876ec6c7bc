"""Moves a bucket of weights from a trainer's rank into vLLM's workers: both ends of it.

gloo, nccl: one broadcast per bucket in a group of the sending rank (0) and the engine's workers
(1, 2, ...), which is nobody's default group. ipc: the workers map the sender's CUDA memory, on the
same GPUs. file: the raw bytes in a folder that both see, such as /dev/shm on one host.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.rollouts.vllm_servers.weight_buckets import Entry, size_of

Transport = Literal["gloo", "nccl", "ipc", "file"]
KEY_VARIABLE = "SGOPD_ENGINE_KEY"
OPEN_PATHS = ("/health",)
DESCRIPTION = "/sgopd/description"  # a route of our servers
SHAPE = (  # of a model's Hugging Face configuration: what engine and trainer must agree in
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "tie_word_embeddings",
)
TIMEOUT_S = 300.0


def make_group(
    transport: str, address: str, port: int, rank: int, world_size: int, timeout_s: float
) -> tuple[Any, Any]:
    """A group of its own beside the process's default one, and the store that must outlive it."""
    timeout = timedelta(seconds=timeout_s)
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]
        address, port, None, is_master=rank == 0, timeout=timeout, wait_for_workers=False
    )
    prefixed = dist.PrefixStore("sgopd-weights", store)  # type: ignore[attr-defined]
    if transport == "gloo":
        return dist.ProcessGroupGloo(prefixed, rank, world_size, timeout), store
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(prefixed, rank, world_size, options), store


def broadcast(group: Any, flat: Tensor) -> Any:
    """Starts the broadcast from rank 0; the work to wait for."""
    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    return group.broadcast([flat], options)


class Receiver:
    """A worker's end."""

    def __init__(
        self,
        transport: str,
        device: torch.device,
        *,
        rank: int,
        world_size: int,
        address: str,
        port: int,
    ) -> None:
        self._transport, self._device = transport, device
        self._group: Any = None
        if transport in ("gloo", "nccl"):
            self._group, self._store = make_group(
                transport, address, port, rank, world_size, TIMEOUT_S
            )

    def receive(self, entries: Sequence[Entry], source: dict[str, Any]) -> Tensor:
        """The bucket's bytes, uint8; a buffer that nobody writes to again."""
        size = size_of(entries)
        if self._transport == "file":
            flat = torch.empty(size, dtype=torch.uint8)
            with open(source["path"], "rb") as file:
                count = file.readinto(flat.numpy().data)
            if count != size:
                raise ValueError(f"{source['path']} has {count} bytes, the bucket {size}")
            return flat.to(self._device)
        if self._transport == "ipc":
            other = open_handle(source["handles"], self._device)
            return other.to(self._device, copy=True)
        device = self._device if self._transport == "nccl" else torch.device("cpu")
        flat = torch.empty(size, dtype=torch.uint8, device=device)
        broadcast(self._group, flat).wait()
        return flat.to(self._device)

    def close(self) -> None:
        self._group = None
        self._store = None


def export_handle(flat: Tensor) -> dict[str, str]:
    """CUDA memory as JSON: {the GPU's UUID: how to map it}. The tensor must outlive its use."""
    from torch.multiprocessing.reductions import reduce_tensor

    _, arguments = reduce_tensor(flat)
    uuid = str(torch.cuda.get_device_properties(flat.device).uuid)
    return {uuid: json.dumps([_as_json(x) for x in arguments[1:]])}


def open_handle(handles: dict[str, str], device: torch.device) -> Tensor:
    """The sender's memory, on the GPU where it lies; a worker on a neighbour copies it over.

    Raises:
        ValueError: none of the GPUs that this process sees is the sender's.
    """
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    # The same GPU may have another number in this process: GPUs are known by their UUIDs.
    uuids = [
        str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())
    ]
    shared = [i for i, uuid in enumerate(uuids) if uuid in handles]
    if not shared:
        raise ValueError(
            f"weights came for the GPUs {sorted(handles)}, this worker on {device} sees {uuids}: "
            "CUDA IPC needs engine and trainer on the same GPUs; set "
            "rollout.vllm.weight_transfer to nccl"
        )
    arguments = [_of_json(x) for x in json.loads(handles[uuids[shared[0]]])]
    arguments[5] = shared[0]
    return rebuild_cuda_tensor(torch.Tensor, *arguments)


def _as_json(value: Any) -> Any:
    """rebuild_cuda_tensor's arguments: numbers, bytes, a dtype, the storage's class."""
    if isinstance(value, bytes):
        return {"bytes": base64.b64encode(value).decode()}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, type):
        return {"class": value.__name__}
    return list(value) if isinstance(value, torch.Size | tuple) else value


def _of_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if "bytes" in value:
        return base64.b64decode(value["bytes"])
    if "dtype" in value:
        return getattr(torch, value["dtype"])
    return (
        torch.UntypedStorage if value["class"] == "UntypedStorage" else torch.storage.TypedStorage
    )


def write_bucket(path: Path, flat: Tensor) -> None:
    """The bucket's bytes, whole under its name or not there."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(flat.cpu().numpy().data)
    os.replace(temporary, path)
