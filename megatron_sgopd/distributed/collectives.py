"""Collectives under the names this torch has: 2.13 renamed two and warns about the old ones."""

from __future__ import annotations

from collections.abc import Callable

import torch.distributed as dist
from torch import Tensor

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
SCATTER = (
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
)


def all_gather(shard: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[n, ...] of each of W ranks -> [W, n, ...] on all."""
    out = shard.new_empty(group.size() * shard.shape[0], *shard.shape[1:])
    getattr(dist, GATHER)(out, shard.contiguous(), group=group)
    return out.unflatten(0, (group.size(), -1))


def start_all_gather(shard: Tensor, group: dist.ProcessGroup) -> Callable[[], Tensor]:
    """Starts the same; the function that it gives waits for it and returns the result."""
    out = shard.new_empty(group.size() * shard.shape[0], *shard.shape[1:])
    own = shard.contiguous()
    work = getattr(dist, GATHER)(out, own, group=group, async_op=True)

    def result() -> Tensor:
        work.wait()
        return out.unflatten(0, (group.size(), -1))

    return result


def reduce_scatter(whole: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[W, n, ...] of each rank -> [n, ...]: the sum over all of them of this rank's part."""
    out = whole.new_empty(whole.shape[1:])
    getattr(dist, SCATTER)(out, whole.contiguous().flatten(0, 1), group=group)
    return out
