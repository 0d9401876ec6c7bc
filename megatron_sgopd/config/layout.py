"""Layouts that cannot be, or that Megatron computes wrongly, found before anything is started."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.schema import (
    Config,
    FrozenConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
)

ROLES = ("student", "teacher", "reference")
RECOMPUTE_MODULES = {
    "local": ("core_attn", "mlp"),
    # Megatron's recomputation of norms asks Transformer Engine for its FP8 state.
    "transformer_engine": ("core_attn", "mlp", "layernorm"),
}


def replica_size(parallel: ParallelConfig) -> int:
    """Ranks of one copy of the student."""
    return (
        parallel.tensor_model_parallel_size
        * parallel.pipeline_model_parallel_size
        * parallel.context_parallel_size
    )


def split_layers(num_layers: int, stages: int) -> list[int]:
    """Layers of each pipeline stage; a remainder goes to the middle, which has no vocabulary.

    Raises:
        ValueError: fewer layers than stages.
    """
    if num_layers < stages:
        raise ValueError(
            f"config.json has num_hidden_layers {num_layers}, fewer than the {stages} pipeline "
            "stages (pipeline_model_parallel_size x virtual_pipeline_model_parallel_size): "
            "lower them"
        )
    base, rest = divmod(num_layers, stages)
    middle_first = [*range(1, stages - 1), 0, stages - 1]
    return [base + (stage in middle_first[:rest]) for stage in range(stages)]


def recompute_problem(parallel: ParallelConfig, num_layers: int) -> str | None:
    """Megatron fails in the first forward pass where the last checkpoint would lack layers."""
    if (parallel.recompute_granularity, parallel.recompute_method) != ("full", "uniform"):
        return None
    virtual = parallel.virtual_pipeline_model_parallel_size or 1
    each = parallel.recompute_num_layers
    for layers in split_layers(num_layers, parallel.pipeline_model_parallel_size * virtual):
        if layers % each:
            return (
                f"parallel.recompute_num_layers is {each}, which does not divide the {layers} "
                "layers of a pipeline stage's chunk as recompute_method 'uniform' needs: use a "
                "divisor, or recompute_method 'block'"
            )
    return None


def padded_vocab_size(vocab_size: int, divisible_by: int, tensor_parallel: int) -> int:
    """Vocabulary rows over all tensor parallel ranks: a multiple of `divisible_by` for each."""
    multiple = divisible_by * tensor_parallel
    return -(-vocab_size // multiple) * multiple


def layout_problems(config: Config) -> Iterator[str]:
    """Everything wrong with `parallel`, and with the layouts of frozen models, one message each."""
    yield from _pipeline(config.parallel)
    yield from _data_parallel(config.parallel)
    p = config.parallel
    if config.distill.method != "sft":
        yield from _micro_batches(p, config.rollout)
    yield from _recompute(p, config.model.transformer_impl)
    yield from _frozen(p, config.model)
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        yield (
            "parallel.sequence_parallel is true with tensor_model_parallel_size 1, which has no "
            "ranks to share the sequence among: set it to false, or use tensor parallelism"
        )


def machine_problems(model: ModelConfig) -> Iterator[str]:
    """Says what the recipe asks for and this machine does not have."""
    impl = model.transformer_impl
    if impl == "transformer_engine" and importlib.util.find_spec("transformer_engine") is None:
        yield (
            "model.transformer_impl is 'transformer_engine', which is not installed here: install "
            "the [gpu] extra on a GPU machine, or set it to 'local'"
        )


def _pipeline(p: ParallelConfig) -> Iterator[str]:
    virtual, stages = p.virtual_pipeline_model_parallel_size, p.pipeline_model_parallel_size
    if virtual is None:
        if p.overlap_p2p_comm:
            yield (
                "parallel.overlap_p2p_comm is true without interleaved stages, where Megatron has "
                "no such overlap: leave it null, or set virtual_pipeline_model_parallel_size"
            )
        return
    if stages == 1 or virtual == 1:
        yield (
            f"parallel.virtual_pipeline_model_parallel_size is {virtual} with "
            f"pipeline_model_parallel_size {stages}: interleaving needs 2 or more of both; leave "
            "it null for plain pipeline parallelism"
        )
    if p.overlap_p2p_comm is False or p.batch_p2p_comm:
        yield (
            "parallel.virtual_pipeline_model_parallel_size is set with overlap_p2p_comm "
            f"{p.overlap_p2p_comm} and batch_p2p_comm {p.batch_p2p_comm}: with these megatron-core "
            "0.16 pairs messages between two stages wrongly and gives wrong losses without an "
            "error. What works is overlap_p2p_comm=true with batch_p2p_comm=false, which null means"
        )


def _data_parallel(p: ParallelConfig) -> Iterator[str]:
    if p.overlap_param_gather and not (p.use_distributed_optimizer and p.overlap_grad_reduce):
        yield (
            "parallel.overlap_param_gather is true with use_distributed_optimizer "
            f"{p.use_distributed_optimizer} and overlap_grad_reduce {p.overlap_grad_reduce}: "
            "Megatron overlaps it only with both of them true"
        )


def _micro_batches(p: ParallelConfig, rollout: RolloutConfig) -> Iterator[str]:
    budget = p.micro_batch_tokens
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if budget is not None and budget < longest:
        yield (
            f"parallel.micro_batch_tokens is {budget}, less than the longest rollout: "
            f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} + rollout.max_new_tokens "
            f"{rollout.max_new_tokens} = {longest}; raise it to that, or shorten them"
        )


def _recompute(p: ParallelConfig, impl: str) -> Iterator[str]:
    if p.recompute_modules is None:
        return
    if p.recompute_granularity != "selective":
        yield (
            f"parallel.recompute_modules is {p.recompute_modules} with recompute_granularity "
            f"{p.recompute_granularity!r}; only 'selective' reads it: set that, or leave it null"
        )
    allowed = RECOMPUTE_MODULES[impl]
    if not p.recompute_modules or set(p.recompute_modules) - set(allowed):
        yield (
            f"parallel.recompute_modules is {p.recompute_modules}; with model.transformer_impl "
            f"{impl!r} some of {', '.join(allowed)} are wanted"
        )


def _frozen(p: ParallelConfig, model: ModelConfig) -> Iterator[str]:
    replica = replica_size(p)
    for role in ("teacher", "reference"):
        tp, pp = frozen_layout(getattr(model, role), p)
        if replica % (tp * pp):
            yield (
                f"model.{role} has a layout of TP {tp} x PP {pp}, which does not divide the "
                f"{replica} ranks of a replica (TP x PP x CP of parallel.*): use sizes whose "
                "product does"
            )


def has_own_layout(frozen: FrozenConfig) -> bool:
    """Tells whether the teacher or the reference has a layout of its own."""
    return bool(frozen.tensor_model_parallel_size or frozen.pipeline_model_parallel_size)


def frozen_layout(frozen: FrozenConfig, p: ParallelConfig) -> tuple[int, int]:
    """Returns (TP, PP) of the teacher or the reference: its own, else the student's."""
    if not has_own_layout(frozen):
        return p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    return frozen.tensor_model_parallel_size or 1, frozen.pipeline_model_parallel_size or 1


def check_models(models: ModelConfig, p: ParallelConfig) -> None:
    """Checks heads against TP and layers against stages, where a model's config.json is at hand.

    Raises:
        ConfigError: naming the model, both numbers and the remedy.
    """
    virtual = p.virtual_pipeline_model_parallel_size or 1
    for role in ROLES:
        of_role = getattr(models, role)
        path = of_role.hf_path
        model = _local_model_config(path, role) if path else None
        if model is None:
            continue
        key, tp = "parallel", p.tensor_model_parallel_size
        stages = p.pipeline_model_parallel_size * virtual
        if role != "student" and has_own_layout(of_role):
            key, (tp, stages) = f"model.{role}", frozen_layout(of_role, p)
        for heads in ("num_attention_heads", "num_key_value_heads"):
            if heads in model and model[heads] % tp:
                raise ConfigError(
                    f"{key}.tensor_model_parallel_size is {tp}, and the {role} ({path}) has "
                    f"{heads} {model[heads]}, which {tp} ranks cannot share: use a divisor of it"
                )
        if model.get("num_hidden_layers", stages) < stages:
            raise ConfigError(
                f"{key} asks for {stages} pipeline stages (pipeline_model_parallel_size x "
                f"virtual_pipeline_model_parallel_size), and the {role} ({path}) has "
                f"num_hidden_layers {model['num_hidden_layers']}: use no more stages than layers"
            )


def _local_model_config(path: str, role: str) -> dict[str, Any] | None:
    file = Path(path) / "config.json"
    if not file.is_file():
        return None
    try:
        loaded = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"model.{role}.hf_path: {file} is not JSON ({error})") from error
    return loaded if isinstance(loaded, dict) else None
