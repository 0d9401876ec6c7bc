"""Parameter bytes of real Megatron modules on the meta device, for ranks that are not there.

`python -m tests.support.plan_meta CASES` takes a JSON list of cases and prints their bytes.
torch's fake process group stands for the others: no communication, no memory, any world size.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_sgopd.config.schema import ParallelConfig
from megatron_sgopd.distributed import megatron_cpu
from megatron_sgopd.distributed.groups import initialize, shutdown

META = torch.device("meta")


def parameter_bytes(case: dict[str, Any]) -> int:
    """Of `model` (keywords of Qwen3Config) on `rank` of `world` under `parallel`."""
    from megatron.core import parallel_state
    from transformers import Qwen3Config

    from megatron_sgopd.model.gpt import build_model

    dist.init_process_group("fake", store=FakeStore(), rank=case["rank"], world_size=case["world"])
    whole = parallel_state.initialize_model_parallel
    # Megatron would make gloo groups beside the others, with real connections.
    parallel_state.initialize_model_parallel = partial(whole, create_gloo_process_groups=False)
    try:
        groups = initialize(ParallelConfig(**case["parallel"]), seed=1)
        model = build_model(
            Qwen3Config(**case["model"]),
            replace(groups, device=META),
            dtype=torch.bfloat16,
            trainable=True,
        )
        parameters = list(model.parameters())
        assert {p.device for p in parameters} == {META}
        return sum(p.numel() * p.element_size() for p in parameters)
    finally:
        parallel_state.initialize_model_parallel = whole
        shutdown()
        dist.destroy_process_group()


if __name__ == "__main__":
    megatron_cpu.install(torch.device("cpu"))
    torch.cuda.current_device = lambda: META  # where Megatron makes its weights
    print(json.dumps([parameter_bytes(case) for case in json.loads(sys.argv[1])]))
