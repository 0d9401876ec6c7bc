"""Megatron's DistributedOptimizer with torch AdamW: two steps, save, load into a fresh one."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

from megatron_sgopd.distributed.groups import Groups
from megatron_sgopd.model.weight_stream import load_hf_weights
from tests.support.layouts import layout
from tests.support.model_cases import build


class Trained:
    """A tiny model under the distributed optimizer, with gradients drawn from the step's seed."""

    def __init__(self, path: str, groups: Groups) -> None:
        model = build(path, groups, trainable=True)
        load_hf_weights(model, Path(path))
        (self.module,) = model.chunks
        self.ddp = DistributedDataParallel(
            self.module.config,
            DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True),
            self.module,
        )
        config = OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            clip_grad=0.0,
            params_dtype=torch.float32,
            use_distributed_optimizer=True,
        )
        self.optimizer: Any = get_megatron_optimizer(config, [self.ddp])

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        self.ddp.zero_grad_buffer()
        for p in self.module.parameters():
            p.main_grad.copy_(torch.randn(p.shape, generator=generator))
        self.ddp.finish_grad_sync()
        self.optimizer.step()

    def sharded(self, *, is_loading: bool) -> dict[str, Any]:
        state = {"model": self.module.sharded_state_dict()}
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        state["optimizer"] = self.optimizer.sharded_state_dict(
            state["model"], is_loading=is_loading, metadata=metadata
        )
        return state

    def load(self, folder: str) -> None:
        state = dist_checkpointing.load(self.sharded(is_loading=True), folder)
        self.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def adam_states(self) -> list[dict[str, torch.Tensor]]:
        inner = [o.optimizer for o in self.optimizer.chained_optimizers]
        return [o.state[p] for o in inner for group in o.param_groups for p in group["params"]]

    def weights(self) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for p in self.module.parameters()])


def save_and_load(path: str, out: str) -> dict[str, Any]:
    """How a reloaded optimizer differs from the one that went on; `error` where it fails."""
    with layout() as groups:
        first = Trained(path, groups)
        for number in (1, 2):
            first.step(number)
        try:
            Path(out, "checkpoint").mkdir()
            dist_checkpointing.save(first.sharded(is_loading=False), f"{out}/checkpoint")
            second = Trained(path, groups)
            second.load(f"{out}/checkpoint")
        except Exception:
            return {"error": traceback.format_exc()}
        state_differs = max(
            (a[k] - b[k]).abs().max().item()
            for a, b in zip(first.adam_states(), second.adam_states(), strict=True)
            for k in ("exp_avg", "exp_avg_sq", "step")
        )
        before = second.weights()
        for trained in (first, second):
            trained.step(3)
        return {
            "error": None,
            "state_differs": state_differs,
            "steps": sorted({s["step"].item() for s in second.adam_states()}),
            "next_step_differs": (first.weights() - second.weights()).abs().max().item(),
            "moved": (second.weights() - before).abs().max().item(),
        }
