"""Makes and unmakes Megatron's process groups around one case in a pool worker."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_sgopd.config.schema import ParallelConfig
from megatron_sgopd.distributed.groups import Groups, initialize, shutdown


@contextmanager
def layout(tp: int = 1, seed: int = 1, **fields: Any) -> Iterator[Groups]:
    """`fields` are ParallelConfig's; the vocabulary is padded to a multiple of TP only."""
    config = ParallelConfig(
        tensor_model_parallel_size=tp, **{"make_vocab_size_divisible_by": 1, **fields}
    )
    # Models in reference cycles keep the last layout's groups, and each of those its gloo threads.
    gc.collect()
    groups = initialize(config, seed=seed)
    try:
        yield groups
    finally:
        shutdown()
