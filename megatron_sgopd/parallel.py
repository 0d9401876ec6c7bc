"""Process groups from one ParallelConfig, as values that are passed on.

A *replica* is one copy of the student: TP x PP ranks. Its first rank (TP 0, PP 0) talks to the
engines and the verifier.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_sgopd.config.schema import ParallelConfig


@dataclass(frozen=True)
class Groups:
    """This rank's place in the layout."""

    device: torch.device
    rank: int
    world_size: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def tp_size(self) -> int:
        return self.tp_group.size()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def dp_size(self) -> int:
        return self.dp_group.size()

    @property
    def is_replica_first_rank(self) -> bool:
        return self.replica_group.rank() == 0


def pick_device() -> torch.device:
    """This rank's device: its CUDA device where there is one, or what SGOPD_DEVICE names."""
    wanted = os.environ.get("SGOPD_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise ValueError(f"SGOPD_DEVICE is {wanted!r}; allowed are 'cpu' and 'cuda'")
    if wanted == "cpu":
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def initialize(config: ParallelConfig, *, seed: int, device: torch.device | None = None) -> Groups:
    """Joins the job (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and makes Megatron's groups.

    Raises:
        ValueError: the world size is not TP x PP x DP, naming all of them.
    """
    device = device or pick_device()
    from megatron_sgopd import megatron_adam, megatron_cpu

    megatron_cpu.install(device)
    from megatron.core import parallel_state, tensor_parallel

    megatron_adam.install()
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    world = dist.get_world_size()
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    dp = config.data_parallel_size or world // (tp * pp)
    if tp * pp * dp != world:
        raise ValueError(
            f"{world} processes cannot be TP {tp} x PP {pp} x DP {dp}: start a multiple of "
            f"{tp * pp} processes, or change parallel.* so that the product is the world size"
        )
    parallel_state.initialize_model_parallel(
        tp, pp, distributed_timeout_minutes=int(max(1, config.distributed_timeout_minutes))
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return Groups(
        device=device,
        rank=dist.get_rank(),
        world_size=world,
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        replica_group=parallel_state.get_model_parallel_group(),
    )


def shutdown() -> None:
    """Unmakes Megatron's groups (the default group stays), so that another layout can be made.

    Megatron only forgets its groups; each keeps its gloo threads until torch destroys it.
    """
    from megatron.core import parallel_state
    from torch.distributed.distributed_c10d import _world

    made = set(parallel_state._global_process_group_list or [])
    parallel_state.destroy_model_parallel()
    for group in made & set(_world.pg_map):  # those this rank is a member of, each once
        dist.destroy_process_group(group)


def broadcast_object(value: Any, groups: Groups) -> Any:
    """The replica's first rank's value on all its ranks."""
    group = groups.replica_group
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]
