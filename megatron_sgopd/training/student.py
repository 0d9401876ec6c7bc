"""The trainable GPT: Megatron's DDP, optimizer and learning-rate schedule around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import (
    ChainedOptimizer,
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_sgopd.config.schema import OptimizerConfig as OptimizerRecipe
from megatron_sgopd.config.schema import ParallelConfig
from megatron_sgopd.distributed.groups import Groups
from megatron_sgopd.model.gpt import ShardedModel
from megatron_sgopd.training.offload import Offloader


@dataclass(frozen=True)
class Student:
    """`model` holds the bare chunks; `ddp` the same under Megatron's gradient buffers."""

    model: ShardedModel
    ddp: tuple[DistributedDataParallel, ...]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    offloader: Offloader | None  # holds the optimizer's state between updates

    @property
    def groups(self) -> Groups:
        return self.model.groups

    @property
    def lr(self) -> float:
        return float(self.optimizer.param_groups[0]["lr"])

    @contextmanager
    def optimizer_on_device(self) -> Iterator[None]:
        """Brings the optimizer's state to the device inside, where it is offloaded."""
        if self.offloader is None:
            yield
            return
        self.offloader.restore()
        try:
            yield
        finally:
            self.offloader.offload(self._optimizer_tensors())

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Takes gradients off the weights inside, as off a teacher's. Collective."""
        overlapped = [c for c in self.ddp if c.ddp_config.overlap_param_gather]
        for chunk in overlapped:  # its hooks insist on weights that are trained
            chunk.disable_forward_pre_hook()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)
            for chunk in overlapped:
                chunk.enable_forward_pre_hook()

    def wait_for(self, parameter: Tensor) -> None:
        """Waits until an overlapped gather has brought a parameter that no module's call reads.

        Megatron waits in a hook before the module that owns it; the LM head's is never called.
        """
        for chunk in self.ddp:
            group = chunk.param_to_bucket_group.get(parameter)
            if group is not None and chunk.ddp_config.overlap_param_gather:
                group.finish_param_sync(skip_next_bucket_dispatch=True)

    def zero_grad(self) -> None:
        for chunk in self.ddp:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    def update(self) -> tuple[bool, float]:
        """One optimizer step on the gradients there are: (whether it was taken, their norm)."""
        self.scheduler.step(1)  # before the update: the first step has a learning rate
        with self.optimizer_on_device():
            updated, norm, _ = self.optimizer.step()
        for chunk in self.ddp:
            # The new weights are wanted by the engine before any forward pass would fetch them.
            if chunk.ddp_config.overlap_param_gather:
                chunk.start_param_sync(force_sync=True)
        return bool(updated), float(norm or 0.0)

    def _optimizer_tensors(self) -> list[Tensor]:
        """Moments, and fp32 weights where they are copies of the model's."""
        chained = isinstance(self.optimizer, ChainedOptimizer)
        each = self.optimizer.chained_optimizers if chained else [self.optimizer]
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        tensors = []
        for one in each:
            for group in one.optimizer.param_groups:
                tensors += [p for p in group["params"] if p.untyped_storage().data_ptr() not in own]
            for state in one.optimizer.state.values():
                tensors += [value for value in state.values() if isinstance(value, Tensor)]
        return tensors


def make_student(model: ShardedModel, recipe: OptimizerRecipe, num_steps: int) -> Student:
    """Wraps a model that already holds its initial weights.

    The optimizer copies its fp32 main weights from the model when it is made, so load first.
    """
    layout = model.groups.config
    chunks = []
    for i, module in enumerate(model.chunks):
        module.train()
        chunks.append(
            DistributedDataParallel(
                module.config,
                DistributedDataParallelConfig(
                    grad_reduce_in_fp32=layout.grad_reduce_in_fp32,
                    use_distributed_optimizer=layout.use_distributed_optimizer,
                    overlap_grad_reduce=layout.overlap_grad_reduce,
                    overlap_param_gather=layout.overlap_param_gather,
                ),
                module,
                disable_bucketing=i > 0,  # as Megatron does: later chunks hide behind the first
            )
        )
        # Gradients are plain sums over micro-batches and replicas: the normalisation is in the
        # loss's token_scale, so Megatron's own division by an integer token count is left out.
        module.config.finalize_model_grads_func = _finalize_without_scaling
    if layout.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in chunks]
        for module in model.chunks:
            module.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    optimizer_config = _optimizer_config(recipe, model.dtype, layout)
    optimizer = get_megatron_optimizer(
        optimizer_config,
        chunks,
        config_overrides=get_standard_config_overrides(optimizer_config),  # no decay on norms
    )
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=recipe.lr,
        min_lr=recipe.min_lr,
        lr_warmup_steps=recipe.lr_warmup_steps,
        lr_decay_steps=max(num_steps, recipe.lr_warmup_steps + 1),
        lr_decay_style=recipe.lr_decay_style,
        # Weight decay acts only through the scheduler, which multiplies it by wd_mult.
        start_wd=recipe.weight_decay,
        end_wd=recipe.weight_decay,
        wd_incr_steps=num_steps,
        wd_incr_style="constant",
    )
    offloader = Offloader(model.groups.device) if recipe.offload else None
    return Student(model, tuple(chunks), optimizer, scheduler, offloader)


def _optimizer_config(
    o: OptimizerRecipe, dtype: torch.dtype, layout: ParallelConfig
) -> OptimizerConfig:
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
        use_distributed_optimizer=layout.use_distributed_optimizer,
        overlap_param_gather=layout.overlap_param_gather,
    )


def _finalize_without_scaling(
    model: list[torch.nn.Module], num_tokens: torch.Tensor | None = None, **kwargs: object
) -> None:
    """Megatron's gradient reductions (DP, tied embeddings, norms over TP) without its scaling."""
    finalize_model_grads(model, None, **kwargs)
