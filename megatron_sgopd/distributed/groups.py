"""Process groups from one ParallelConfig, as values that are passed on.

A *replica* is one copy of the student: TP x CP x PP ranks. Its first rank (TP 0, CP 0, PP 0) talks
to the engines and the verifier. A frozen model may have a layout of its own on the replica's ranks
(`inner_groups`): as many copies of it as fit, each of its own TP x PP.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from megatron_sgopd.config.schema import ParallelConfig

_made: list[dist.ProcessGroup] = []  # groups that Megatron does not know of


@dataclass(frozen=True)
class Groups:
    """This rank's place in the layout of a model; `config` is that model's layout."""

    device: torch.device
    rank: int
    world_size: int
    config: ParallelConfig
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup  # ranks with the same place in other replicas
    replica_group: dist.ProcessGroup
    collection: Any  # the same as Megatron's ProcessGroupCollection
    copy: int = 0  # which copy of a frozen model on this replica
    num_copies: int = 1

    @property
    def tp_rank(self) -> int:
        return self.tp_group.rank()

    @property
    def tp_size(self) -> int:
        return self.tp_group.size()

    @property
    def pp_rank(self) -> int:
        return self.pp_group.rank()

    @property
    def pp_size(self) -> int:
        return self.pp_group.size()

    @property
    def cp_rank(self) -> int:
        return self.cp_group.rank()

    @property
    def cp_size(self) -> int:
        return self.cp_group.size()

    @property
    def dp_rank(self) -> int:
        return self.dp_group.rank()

    @property
    def dp_size(self) -> int:
        return self.dp_group.size()

    @property
    def is_replica_first_rank(self) -> bool:
        return self.replica_group.rank() == 0

    @property
    def is_last_stage(self) -> bool:
        """Tells whether this rank holds the LM head and computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def counts_tokens(self) -> bool:
        """Tells whether this rank counts its tokens: one of those that compute the same loss."""
        return self.is_last_stage and self.tp_rank == 0


def pick_device() -> torch.device:
    """This rank's device: its CUDA device where there is one, or what SGOPD_DEVICE names.

    Raises:
        ValueError: more ranks on this machine than GPUs, or another SGOPD_DEVICE.
    """
    wanted = os.environ.get("SGOPD_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
    if wanted not in ("cpu", "cuda"):
        raise ValueError(f"SGOPD_DEVICE is {wanted!r}; allowed are 'cpu' and 'cuda'")
    if wanted == "cpu":
        return torch.device("cpu")
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        local = 0  # srun may show each rank its own GPU alone; torchrun shows all ranks the same
    if local >= count:
        raise ValueError(
            f"rank {local} of this machine has no GPU of its own, {count} can be seen here: lower "
            "parallel.*, use more machines, or set SGOPD_DEVICE=cpu"
        )
    return torch.device("cuda", local)


def gpu_name(device: torch.device) -> str | None:
    """The GPU as CUDA_VISIBLE_DEVICES names it for another process; None for a CPU."""
    if device.type != "cuda":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return visible.split(",")[device.index] if visible else str(device.index)


def initialize(config: ParallelConfig, *, seed: int, device: torch.device | None = None) -> Groups:
    """Joins the job (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) and makes Megatron's groups.

    Raises:
        ValueError: the world size is not TP x PP x CP x DP, naming all of them.
    """
    device = device or pick_device()
    from megatron_sgopd.distributed import megatron_adam, megatron_cpu

    megatron_cpu.install(device)
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    megatron_adam.install()
    timeout = timedelta(minutes=config.distributed_timeout_minutes)
    if not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    world = dist.get_world_size()
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    cp = config.context_parallel_size
    dp = config.data_parallel_size or world // (tp * pp * cp)
    if tp * pp * cp * dp != world:
        raise ValueError(
            f"{world} processes cannot be TP {tp} x PP {pp} x CP {cp} x DP {dp}: start a multiple "
            f"of {tp * pp * cp} processes, or change parallel.* so that the product is the world "
            "size"
        )
    parallel_state.initialize_model_parallel(
        tp,
        pp,
        config.virtual_pipeline_model_parallel_size,
        context_parallel_size=cp,
        distributed_timeout_minutes=int(max(1, config.distributed_timeout_minutes)),
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    dp_group = parallel_state.get_data_parallel_group()
    return Groups(
        device=device,
        rank=dist.get_rank(),
        world_size=world,
        config=replace(config, data_parallel_size=dp),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=dp_group,
        # Megatron's model parallel group has no context parallel ranks in it.
        replica_group=parallel_state.get_model_parallel_group()
        if cp == 1
        else _group_of_equals(dp_group.rank(), timeout),
        collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def inner_groups(groups: Groups, tensor: int | None, pipeline: int | None) -> Groups:
    """The layout of a frozen model: the student's, or TP x PP of its own on the replica's ranks.

    An own layout has no context parallelism and no interleaving; the replica holds as many copies
    as fit, which share the micro-batches out among them. Collective over all ranks.

    Raises:
        ValueError: TP x PP does not divide the replica's ranks.
    """
    if tensor is None and pipeline is None:
        return groups
    tp, pp = tensor or 1, pipeline or 1
    interleaved = groups.config.virtual_pipeline_model_parallel_size is not None
    if (tp, pp, 1) == (groups.tp_size, groups.pp_size, groups.cp_size) and not interleaved:
        return groups
    size = groups.replica_group.size()
    if size % (tp * pp):
        raise ValueError(
            f"a frozen model of TP {tp} x PP {pp} does not fit the {size} ranks of a replica "
            "(TP x CP x PP of parallel.*) without a remainder: use sizes whose product divides it"
        )
    from megatron.core.process_groups_config import ProcessGroupCollection

    timeout = timedelta(minutes=groups.config.distributed_timeout_minutes)
    # Of the ranks in the replica's order: copies, then stages, then tensor parallel neighbours.
    place, replica = groups.replica_group.rank(), groups.dp_rank
    copy, stage, shard = place // (tp * pp), place // tp % pp, place % tp
    tp_group = _group_of_equals((replica, copy, stage), timeout)
    pp_group = _group_of_equals((replica, copy, shard), timeout)
    both = _group_of_equals((replica, copy), timeout)
    alone = _group_of_equals(groups.rank, timeout)
    end = "first and last" if stage in (0, pp - 1) else stage  # where tied embeddings lie
    ends = _group_of_equals((replica, copy, shard, end), timeout)
    alone_fields = ("cp", "dp", "dp_cp", "ep", "expt_tp", "expt_dp", "tp_dp_cp", "pos_embd")
    return replace(
        groups,
        config=replace(
            groups.config,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=None,
            context_parallel_size=1,
            sequence_parallel=groups.config.sequence_parallel and tp > 1,
        ),
        tp_group=tp_group,
        pp_group=pp_group,
        cp_group=alone,
        collection=ProcessGroupCollection(
            tp=tp_group,
            pp=pp_group,
            mp=both,
            embd=ends,
            tp_cp=tp_group,
            tp_ep=tp_group,
            tp_ep_pp=both,
            hcp=[alone],
            **dict.fromkeys(alone_fields, alone),
        ),
        copy=copy,
        num_copies=size // (tp * pp),
    )


def _group_of_equals(key: Any, timeout: timedelta) -> dist.ProcessGroup:
    """The group of all ranks that give the same key. Collective over all ranks."""
    members: dict[Any, list[int]] = {}
    for rank, other in enumerate(gather_objects(key)):
        members.setdefault(other, []).append(rank)
    own, _ = dist.new_subgroups_by_enumeration(list(members.values()), timeout=timeout)
    assert own is not None, "every rank gave a key"
    _made.append(own)
    return own


def shutdown() -> None:
    """Unmakes all groups (the default group stays), so that another layout can be made.

    Megatron only forgets its groups; each keeps its gloo threads until torch destroys it.
    """
    from megatron.core import parallel_state
    from torch.distributed.distributed_c10d import _world

    made = {*(parallel_state._global_process_group_list or []), *_made}
    parallel_state.destroy_model_parallel()
    _made.clear()
    for group in made & set(_world.pg_map):  # those this rank is a member of, each once
        dist.destroy_process_group(group)


def alignment(*layouts: Groups) -> int:
    """Returns what a micro-batch's length must be a multiple of: sequence parallelism cuts it."""
    return math.lcm(*(g.tp_size for g in layouts if g.config.sequence_parallel))


def sequence_alignment(groups: Groups) -> int:
    """Returns what each packed sequence's length must be a multiple of: context parallel ranks
    take two parts of it each.
    """
    return 2 * groups.cp_size if groups.cp_size > 1 else 1


def broadcast_object(value: Any, groups: Groups) -> Any:
    """The replica's first rank's value on all its ranks."""
    group = groups.replica_group
    if group.size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=dist.get_global_rank(group, 0), group=group)
    return box[0]


def from_first_rank(value: Any) -> Any:
    """Broadcasts rank 0's value to all ranks of the job; the others' values do not count."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def any_rank(flag: bool, groups: Groups, *, of_replica: bool = False) -> bool:
    """Tells whether it is true on any rank of the job, or of the replica. Collective."""
    asked = torch.tensor(int(flag), device=groups.device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=groups.replica_group if of_replica else None)
    return bool(asked)


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> Sequence[Any]:
    """Every rank's value, in the group's order, on all of them; of all ranks without a group."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
