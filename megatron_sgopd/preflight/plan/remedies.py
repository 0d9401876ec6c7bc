"""Finds what to change when a recipe does not fit: keys in order, each kept if it helps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.schema import Config, ParallelConfig, RolloutConfig

HELPS = 0.02  # share of what is missing that a change must save
PASSES = 3

Changes = dict[str, Any]
Shortage = Callable[[Config], int]  # bytes that are missing; raises ConfigError


@dataclass(frozen=True)
class Remedy:
    """Settings, added to those before, and what is then missing (at most 0: it fits)."""

    changes: Changes
    missing_bytes: int


def remedies(config: Config, shortage: Shortage, *, gpus_per_node: int) -> list[Remedy]:
    """Finds changes that build on each other until the recipe fits, or until nothing helps more."""

    def missing_after(several: Sequence[Changes]) -> int | None:
        """Bytes; None where layout, heads or prompts do not allow the changes."""
        try:
            return shortage(with_values(config, several))
        except ConfigError:
            return None

    missing, kept = shortage(config), list[Changes]()
    for _ in range(PASSES):  # what hardly helped at first may be all that is left to do
        for changes in _candidates(with_values(config, kept), gpus_per_node):
            if missing <= 0:
                break
            after = missing_after([*kept, changes])
            if after is not None and after < (1 - HELPS) * missing:
                missing = after
                kept.append(changes)
    if missing <= 0:
        kept = _needed(kept, missing_after)
    return [
        Remedy(changes, shortage(with_values(config, kept[: i + 1])))
        for i, changes in enumerate(kept)
    ]


def _needed(
    kept: list[Changes], missing_after: Callable[[Sequence[Changes]], int | None]
) -> list[Changes]:
    """Leaves out what later changes have made needless, the dearest looked at first."""
    for changes in reversed(kept[:-1]):
        others = [each for each in kept if each is not changes]
        after = missing_after(others)
        if after is not None and after <= 0:
            kept = others
    return kept


def _candidates(config: Config, gpus_per_node: int) -> Iterator[Changes]:
    """Proposes changes, the cheapest in time first."""
    p, rollout = config.parallel, config.rollout
    if not p.use_distributed_optimizer:
        yield {"parallel.use_distributed_optimizer": True}
    if p.tensor_model_parallel_size > 1 and not p.sequence_parallel:
        yield {"parallel.sequence_parallel": True}
    if p.micro_batch_tokens is None and p.micro_batch_size > 1:
        yield {"parallel.micro_batch_size": 1}
    longest = rollout.max_prompt_tokens + rollout.max_new_tokens
    if p.micro_batch_tokens is not None and p.micro_batch_tokens > longest:
        yield {"parallel.micro_batch_tokens": longest}
    if config.distill.estimator == "full_vocab" and p.hidden_states_budget_mb is None:
        yield {"parallel.hidden_states_budget_mb": 4096.0}
        yield {"parallel.hidden_states_budget_mb": 0.0}
    for role in ("reference", "teacher"):
        if not getattr(config.model, role).offload:
            yield {f"model.{role}.offload": True}
    if p.recompute_granularity != "full":
        yield {"parallel.recompute_granularity": "full", "parallel.recompute_modules": None}
    yield from _engine_shares(rollout)
    phases = config.distill.phases
    if rollout.engine == "vllm" and phases.enabled and phases.source == "engine":
        yield {"distill.phases.source": "LABELLED.jsonl"}  # tools/label_rollouts.py makes it
    if not config.optimizer.offload:
        yield {"optimizer.offload": True}
    yield from _wider(p, gpus_per_node)


def _engine_shares(rollout: RolloutConfig) -> Iterator[Changes]:
    """Proposes less of a shared GPU for the servers, or more of their own for their cache."""
    vllm, key = rollout.vllm, "rollout.vllm.gpu_memory_utilization"
    if rollout.engine == "embedded":
        for batch in (64, 32, 16, 8, 4, 2, 1):
            if batch < rollout.max_batch_size:
                yield {"rollout.max_batch_size": batch}
        return
    for tp in (2, 4, 8):
        if tp > vllm.tensor_parallel_size and vllm.devices is None:
            yield {"rollout.vllm.tensor_parallel_size": tp}
    if vllm.colocated:
        yield from ({key: lower} for lower in (0.5, 0.4, 0.3, 0.2))
    else:
        yield {key: 0.9}


def _wider(p: ParallelConfig, gpus_per_node: int) -> Iterator[Changes]:
    """Proposes more tensor, then pipeline, then context parallelism, and less data parallelism."""
    free: Changes = {} if p.data_parallel_size is None else {"parallel.data_parallel_size": None}
    tp = 2 * p.tensor_model_parallel_size
    while tp <= gpus_per_node:
        changes = {"parallel.tensor_model_parallel_size": tp, "parallel.sequence_parallel": True}
        yield changes | free
        tp *= 2
    for name in ("pipeline", "context"):
        key = "pipeline_model_parallel_size" if name == "pipeline" else "context_parallel_size"
        for times in (2, 4):
            yield {f"parallel.{key}": times * getattr(p, key)} | free


def with_values(config: Config, several: Sequence[Changes]) -> Config:
    """Returns the config with dotted keys replaced, one set of changes after the other."""
    for changes in several:
        for key, value in changes.items():
            config = _with(config, key.split("."), value)
    return config


def _with(node: Any, path: list[str], value: Any) -> Any:
    assert is_dataclass(node) and not isinstance(node, type), "keys end at a field"
    head, *rest = path
    return replace(node, **{head: _with(getattr(node, head), rest, value) if rest else value})
