"""Save and resume: weights, optimizer, schedule, RNG and where the run stands.

Megatron's dist_checkpointing holds the sharded part. A checkpoint is written under a temporary name
and renamed when it is whole, so that a folder named `step-…` is always complete. `checkpoint_files`
knows what lies in it.
"""

from __future__ import annotations

import queue
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.strategies import filesystem_async

from megatron_sgopd.atomic_files import begin_folder, finish_folder
from megatron_sgopd.distributed.groups import from_first_rank
from megatron_sgopd.model.checkpoint_files import COMPANIONS, list_checkpoints
from megatron_sgopd.model.hf_writer import copy_companions
from megatron_sgopd.training.student import Student


@dataclass
class TrainState:
    """Describes where a run stands. Prompts, seeds and phases are functions of (seed, step)."""

    step: int = 0  # optimizer steps done
    policy_version: int = 0
    gate_eps: float | None = None  # measured tie width, once known
    world_size: int = 1
    seed: int = 0
    name: str = ""
    best_step: int | None = None  # of the evaluations during training; its student is in hf_best
    best_avg_at_k: float | None = None


def checkpoint_path(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


@dataclass(frozen=True)
class Companions:
    """The files that make a checkpoint self-contained."""

    source: Path  # a Hugging Face directory: config, tokenizer
    texts: Mapping[str, str]  # other files, by name


def save_checkpoint(
    run_dir: Path,
    student: Student,
    state: TrainState,
    keep: int,
    companions: Companions | None,
    pending: Any = None,
) -> Path:
    """Writes RUN_DIR/checkpoints/step-N and removes all but the newest `keep`. Collective.

    `pending`: this replica's rollouts of the next step, where they are there already.
    `companions`: rank 0's.
    """
    final = checkpoint_path(run_dir, state.step)
    is_first = dist.get_rank() == 0
    temporary = from_first_rank(begin_folder(final) if is_first else None)
    # Megatron would start a manager process for this queue, seconds of imports that outlive a rank
    # which is killed. A synchronous save puts and gets in this process: a plain queue will do.
    filesystem_async._results_queue = queue.Queue()
    with student.optimizer_on_device():
        whole = _sharded(student, state, pending, is_loading=False)
        dist_checkpointing.save(whole, str(temporary))
    dist.barrier()  # every rank's shards are on disk before the name says so
    if is_first:
        assert companions is not None, "rank 0 has them"
        copy_companions(companions.source, temporary / COMPANIONS, companions.texts)
        finish_folder(final)
        for old in list_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return final


def load_checkpoint(
    path: Path, student: Student, *, seed: int, name: str
) -> tuple[TrainState, Any]:
    """Restores the student in place; where the run stood, and its pending rollouts. Collective.

    Raises:
        ValueError: the checkpoint is another run's (name or seed), naming both; or its RNG states
            are for another number of ranks.
    """
    common = dist_checkpointing.load_common_state_dict(str(path))
    state = TrainState(**common["state"])
    for key, ours, other in (("name", name, state.name), ("seed", seed, state.seed)):
        if ours != other:
            raise ValueError(
                f"{path} was written with {key} {other!r}, this run has {ours!r}: set {key} back, "
                "or choose another logging.run_dir"
            )
    if state.world_size != dist.get_world_size():
        raise ValueError(
            f"{path} was written by {state.world_size} ranks and this run has "
            f"{dist.get_world_size()}: start it with the same number"
        )
    with student.optimizer_on_device():
        wanted = _sharded(student, state, None, is_loading=True)
        loaded = dist_checkpointing.load(wanted, str(path))
    for i, chunk in enumerate(student.model.chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
    with student.optimizer_on_device():
        student.optimizer.load_state_dict(loaded["optimizer"])
    student.scheduler.load_state_dict(loaded["scheduler"])
    rng = loaded["rng"]
    torch.set_rng_state(rng["cpu"])
    if rng["cuda"] is not None:
        torch.cuda.set_rng_state(rng["cuda"])
    return state, loaded["pending"]


def _sharded(
    student: Student, state: TrainState, pending: Any, *, is_loading: bool
) -> dict[str, Any]:
    # Interleaved stages hold several chunks; the names inside count layers over the whole model.
    model = {f"model{i}": c.sharded_state_dict() for i, c in enumerate(student.model.chunks)}
    groups, rank, world = student.groups, dist.get_rank(), dist.get_world_size()
    on_gpu = student.groups.device.type == "cuda"
    rng = {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if on_gpu else None,
    }
    return {
        **model,
        "optimizer": student.optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata={"distrib_optim_sharding_type": "dp_reshardable"}
        ),
        "scheduler": student.scheduler.state_dict(),
        "rng": ShardedObject("rng", rng, (world,), (rank,), replica_id=0),
        "pending": ShardedObject(
            "pending",
            pending,
            (groups.dp_size,),
            (groups.dp_rank,),
            replica_id=int(not groups.is_replica_first_rank),
        ),
        "state": asdict(state),
    }
