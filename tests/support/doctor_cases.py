"""The parallel self-test on a pool's ranks, sound or with a fault planted in it."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads

from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.load import load_config
from megatron_sgopd.distributed.groups import shutdown
from megatron_sgopd.preflight.layout_check import Report, check_parallel
from megatron_sgopd.training.packing import MicroBatch


def check(recipe: str, overrides: Sequence[str], fault: str | None = None) -> Report:
    config = resolve(load_config(recipe, overrides), dist.get_world_size())
    gc.collect()
    try:
        with planted(fault):
            return check_parallel(config)
    finally:
        shutdown()


@contextmanager
def planted(fault: str | None) -> Iterator[None]:
    if fault is None:
        yield
    elif fault == "norms are not summed over TP":
        module = __import__(finalize_model_grads.__module__, fromlist=["_"])
        with patch.object(module, "_allreduce_non_tensor_model_parallel_grads"):
            yield
    elif fault == "the loss is scaled by PP":
        shard = MicroBatch.context_shard

        def scaled(self: MicroBatch, rank: int, size: int) -> MicroBatch:
            part = shard(self, rank, size)
            return dataclasses.replace(part, token_scale=part.token_scale * 2)

        with patch.object(MicroBatch, "context_shard", scaled):
            yield
    elif fault == "one CP rank's tokens count twice":
        shard = MicroBatch.context_shard

        def twice(self: MicroBatch, rank: int, size: int) -> MicroBatch:
            part = shard(self, rank, size)
            factor = 2.0 if rank == 0 else 1.0
            return dataclasses.replace(part, token_scale=part.token_scale * factor)

        with patch.object(MicroBatch, "context_shard", twice):
            yield
    else:
        raise ValueError(fault)
