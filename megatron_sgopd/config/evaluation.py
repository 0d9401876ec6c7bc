"""Names what an evaluation is of, and turns a recipe into what an evaluation reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from megatron_sgopd.config.engines import servers_of
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.layout import replica_size
from megatron_sgopd.config.schema import (
    Config,
    DistillConfig,
    EvaluationConfig,
    ModelConfig,
    ParallelConfig,
    PhasesConfig,
    StudentConfig,
)

NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")  # of a benchmark: it names files


def evaluation_sets(evaluation: EvaluationConfig) -> dict[str, str]:
    """{name: file or hub name} of the final evaluation; {} for none."""
    if evaluation.data is None:
        return dict(evaluation.benchmarks)
    return {re.sub(r"[^\w.+-]", "_", Path(evaluation.data).stem): evaluation.data}


def during_sets(evaluation: EvaluationConfig) -> dict[str, str]:
    """The same of the evaluations during training."""
    path = evaluation.during_data
    return {"during": path} if path else evaluation_sets(evaluation)


def samples_per_problem(evaluation: EvaluationConfig) -> int:
    return evaluation.n or evaluation.k


def evaluation_problems(e: EvaluationConfig) -> Iterator[str]:
    """Says everything wrong with the evaluation's section, one message each."""
    if e.data is not None and e.benchmarks:
        yield (
            "evaluation.data and evaluation.benchmarks are both set: name data's file among the "
            "benchmarks, and set data to null"
        )
    if e.every and not during_sets(e):
        yield (
            f"evaluation.every is {e.every} and there is nothing to evaluate on: set "
            "evaluation.during_data, data or benchmarks, or evaluation.every=0"
        )
    for name in e.benchmarks:
        if not NAME.fullmatch(name):
            yield (
                f"evaluation.benchmarks has the name {name!r}; letters, digits and . _ + - only, "
                "since it names files"
            )
    if e.k > samples_per_problem(e):
        yield (
            f"evaluation.k is {e.k} and evaluation.n {e.n}: pass@k needs at least k samples per "
            "problem; raise n, or lower k"
        )
    if e.temperature < 0:
        yield f"evaluation.temperature is {e.temperature}; 0 (greedy) or above"
    if not 0 < e.top_p <= 1:
        yield f"evaluation.top_p is {e.top_p}; above 0 and up to 1 (off)"
    if not 0 <= e.min_p < 1:
        yield f"evaluation.min_p is {e.min_p}; from 0 (off) to below 1"


def config_for_model(config: Config, model: str, world_size: int | None = None) -> Config:
    """The recipe as `sgopd evaluate` reads it. `model`: student, teacher, or a directory's path.

    What it says of training is left out. A replica's ranks hold no shards of the model: they share
    its requests (embedded engine) or devices (servers), whatever TP, PP and CP they come from.

    Raises:
        ConfigError: no such model, random weights, or no benchmark.
    """
    if not evaluation_sets(config.evaluation):
        raise ConfigError(
            "nothing to evaluate on: give --benchmark NAME=FILE, or set evaluation.benchmarks (or "
            "evaluation.data) in the recipe"
        )
    if model == "student" and config.model.student.random_init:
        raise ConfigError(
            "model.student.random_init is true, so the recipe's student has no weights to "
            "evaluate: give --model HF_DIR, such as the hf folder of its run"
        )
    path = {
        "student": config.model.student.hf_path,
        "teacher": config.model.teacher.hf_path,
    }.get(model, model)
    if path is None:
        raise ConfigError("--model teacher: the recipe has no model.teacher.hf_path")
    parallel, rollout, e = config.parallel, config.rollout, config.evaluation
    replica = replica_size(parallel)
    dp = parallel.data_parallel_size or max(1, (world_size or replica) // replica)
    return replace(
        config,
        model=ModelConfig(student=StudentConfig(hf_path=path), dtype=config.model.dtype),
        parallel=ParallelConfig(
            context_parallel_size=replica,
            data_parallel_size=dp,
            distributed_timeout_minutes=parallel.distributed_timeout_minutes,
        ),
        distill=DistillConfig(method="sft", phases=PhasesConfig(enabled=False)),
        rollout=replace(
            rollout,
            vllm=servers_of(rollout.vllm, "teacher" if model == "teacher" else "student"),
            num_prompts=dp,
            max_new_tokens=e.max_new_tokens or rollout.max_new_tokens,
            max_policy_lag=0,
            temperature=1.0,
            tis="auto",
        ),
        evaluation=replace(e, every=0),
    )
