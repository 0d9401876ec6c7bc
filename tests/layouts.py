"""Makes and unmakes Megatron's process groups around one case in a pool worker."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sgopd.config.schema import ParallelConfig
from megatron_sgopd.parallel import Groups, initialize, shutdown


@contextmanager
def layout(tp: int = 1, seed: int = 1) -> Iterator[Groups]:
    groups = initialize(ParallelConfig(tensor_model_parallel_size=tp), seed=seed)
    try:
        yield groups
    finally:
        shutdown()
