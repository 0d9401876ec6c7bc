"""The trainable GPT: Megatron's DDP, optimizer and learning-rate schedule around it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_sgopd.config.schema import Config
from megatron_sgopd.model import DistillationGPTModel
from megatron_sgopd.parallel import Groups


@dataclass(frozen=True)
class Student:
    """`module` is the bare model; `ddp` the same under Megatron's gradient buffers."""

    module: DistillationGPTModel
    ddp: DistributedDataParallel
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    groups: Groups

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])


def make_student(module: DistillationGPTModel, config: Config, groups: Groups) -> Student:
    """Wraps a model that already holds its initial weights.

    The optimizer copies its fp32 main weights from the module when it is made, so load first.
    """
    module.train()
    ddp = DistributedDataParallel(
        module.config,
        DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False),
        module,
    )
    # Gradients are plain sums over micro-batches and replicas: the normalisation is in the loss's
    # token_scale, so Megatron's own division by an integer token count is left out.
    module.config.finalize_model_grads_func = _finalize_without_scaling
    optimizer_config = _optimizer_config(config)
    optimizer = get_megatron_optimizer(
        optimizer_config,
        [ddp],
        config_overrides=get_standard_config_overrides(optimizer_config),  # no decay on norms
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.optimizer.lr,
        min_lr=config.optimizer.min_lr,
        lr_warmup_steps=config.optimizer.lr_warmup_steps,
        lr_decay_steps=max(config.num_steps, config.optimizer.lr_warmup_steps + 1),
        lr_decay_style=config.optimizer.lr_decay_style,
        # Weight decay acts only through the scheduler, which multiplies it by wd_mult.
        start_wd=config.optimizer.weight_decay,
        end_wd=config.optimizer.weight_decay,
        wd_incr_steps=config.num_steps,
        wd_incr_style="constant",
    )
    return Student(module, ddp, optimizer, scheduler, groups)


def _optimizer_config(config: Config) -> OptimizerConfig:
    o = config.optimizer
    dtype = getattr(torch, config.model.dtype)
    return OptimizerConfig(
        optimizer="adam",
        lr=o.lr,
        min_lr=o.min_lr,
        weight_decay=o.weight_decay,
        adam_beta1=o.adam_beta1,
        adam_beta2=o.adam_beta2,
        adam_eps=o.adam_eps,
        clip_grad=o.clip_grad,
        bf16=dtype == torch.bfloat16,
        fp16=False,
        params_dtype=dtype,
        use_distributed_optimizer=False,
    )


def _finalize_without_scaling(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: object
) -> None:
    """Megatron's gradient reductions (DP, tied embeddings, norms over TP) without its scaling."""
    finalize_model_grads(model, None, **kwargs)
