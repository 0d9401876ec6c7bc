"""Combinations of fields that cannot be, found before anything is started; and derived fields."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from megatron_sgopd.config.engines import engine_problems, resolve_engine
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.evaluation import evaluation_problems
from megatron_sgopd.config.layout import (
    check_models,
    layout_problems,
    machine_problems,
    replica_size,
)
from megatron_sgopd.config.load import flatten
from megatron_sgopd.config.schema import (
    Config,
    DistillConfig,
    GateConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    VerifierConfig,
)

NO_TEACHER = ("sft", "grpo")
AT_LEAST_ONE = (
    "num_steps",
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.data_parallel_size",
    "parallel.micro_batch_size",
    "parallel.micro_batch_tokens",
    "parallel.recompute_num_layers",
    "model.teacher.tensor_model_parallel_size",
    "model.teacher.pipeline_model_parallel_size",
    "model.reference.tensor_model_parallel_size",
    "model.reference.pipeline_model_parallel_size",
    "parallel.make_vocab_size_divisible_by",
    "distill.chunk_tokens",
    "distill.top_k",
    "distill.phases.attempts",
    "rollout.num_prompts",
    "rollout.n",
    "rollout.max_prompt_tokens",
    "rollout.max_new_tokens",
    "rollout.max_batch_size",
    "rollout.vllm.num_engines",
    "rollout.vllm.tensor_parallel_size",
    "rollout.vllm.max_concurrency",
    "rollout.vllm.max_restarts",
    "rollout.vllm.cpu_kvcache_gb",
    "verifier.num_workers",
    "verifier.memory_mb",
    "evaluation.k",
    "evaluation.n",
    "evaluation.top_k",
    "evaluation.during_k",
    "evaluation.bootstrap_samples",
    "evaluation.max_problems",
    "evaluation.max_new_tokens",
    "evaluation.during_max_problems",
    "checkpoint.keep",
)
NOT_NEGATIVE = (
    "seed",
    "optimizer.min_lr",
    "optimizer.lr_warmup_steps",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "evaluation.every",
    "checkpoint.every",
    "logging.rollouts_every",
    "logging.rollouts_kept",
    "distill.phases.ce_weight",
    "distill.gate.beta",
    "parallel.hidden_states_budget_mb",
    "rollout.vllm.nodes",
)
ABOVE_ZERO = (
    "optimizer.lr",
    "optimizer.adam_eps",
    "rollout.tis_cap",
    "verifier.timeout_s",
    "parallel.distributed_timeout_minutes",
    "distill.adv_clip",
    "rollout.vllm.bucket_mb",
    "rollout.vllm.mismatch_kl_bound",
    "rollout.vllm.startup_timeout_s",
    "rollout.vllm.request_timeout_s",
    "rollout.vllm.health_timeout_s",
)


def check(config: Config, *, here: bool = True) -> None:
    """Raises ConfigError on the first thing that cannot be, naming keys, values and the remedy.

    `here`: this is the machine that is to run it.
    """
    for problem in problems(config):
        raise ConfigError(problem)
    for problem in machine_problems(config.model) if here else ():
        raise ConfigError(problem)


def problems(config: Config) -> Iterator[str]:
    """Everything wrong with a config, one message each, whatever the machine."""
    yield from _ranges(flatten(config), config.name)
    yield from _sampling(config.rollout, config.distill.method)
    yield from _method(config.distill, config.model, config.rollout.n)
    yield from _divergence(config.distill)
    yield from _gate(config.distill)
    yield from evaluation_problems(config.evaluation)
    yield from _verifier(config.verifier)
    yield from _optimizer(config.optimizer, config.num_steps)
    yield from engine_problems(config)
    yield from layout_problems(config)


def resolve(config: Config, world_size: int | None = None, *, here: bool = True) -> Config:
    """Checks the config and fills what is derived. `world_size`: the job's, where it is known.

    `here`: this is the machine that is to run it.

    Raises:
        ConfigError: see `check`; a world size or a model's heads that the layout cannot take.
    """
    check(config, here=here)
    parallel, rollout = config.parallel, config.rollout
    replica = replica_size(parallel)
    dp = parallel.data_parallel_size or max(1, (world_size or replica) // replica)
    if world_size is not None and dp * replica != world_size:
        raise ConfigError(
            f"{world_size} processes cannot be TP {parallel.tensor_model_parallel_size} x PP "
            f"{parallel.pipeline_model_parallel_size} x CP {parallel.context_parallel_size} x DP "
            f"{dp} = {dp * replica}: start that many, or change parallel.*"
        )
    if rollout.num_prompts % dp:
        raise ConfigError(
            f"rollout.num_prompts is {rollout.num_prompts}, which {dp} data-parallel replicas "
            f"(parallel.data_parallel_size) cannot share equally: use a multiple of {dp}"
        )
    check_models(config.model, config.parallel)
    tis = rollout.tis
    if tis == "auto":
        method = config.distill.method  # grpo has no teacher whose whole vocabulary it could read
        sampled = method == "grpo" or config.distill.estimator == "sampled"
        behind = rollout.max_policy_lag > 0
        tis = "token" if (sampled or behind) and method != "sft" else "none"
    return replace(
        config,
        parallel=replace(parallel, data_parallel_size=dp),
        rollout=resolve_engine(replace(rollout, tis=tis), config.model.dtype),
        evaluation=replace(
            config.evaluation,
            max_new_tokens=config.evaluation.max_new_tokens or rollout.max_new_tokens,
        ),
        logging=replace(config.logging, run_dir=config.logging.run_dir or f"runs/{config.name}"),
    )


def needs_teacher(distill: DistillConfig) -> bool:
    """Tells whether the method learns from a teacher."""
    return distill.method not in NO_TEACHER


def needs_reference(distill: DistillConfig) -> bool:
    """Tells whether the method extrapolates, or its gate reads the reference."""
    gate = distill.gate
    if distill.method == "exopd":
        return distill.lambda_uniform != 1.0
    extrapolates = gate.lambda_high != 1.0 or gate.lambda_low != 1.0
    return distill.method == "sg_opd" and (extrapolates or gate.teacher_signal == "t_minus_r")


def _ranges(values: Mapping[str, Any], name: str) -> Iterator[str]:
    for key in AT_LEAST_ONE:
        if values[key] is not None and values[key] < 1:
            yield f"{key} is {values[key]}; it must be at least 1"
    for key in NOT_NEGATIVE:
        if values[key] is not None and values[key] < 0:
            yield f"{key} is {values[key]}; it must not be negative"
    for key in ABOVE_ZERO:
        if values[key] is not None and values[key] <= 0:
            off = " (null is off)" if key == "distill.adv_clip" else ""
            yield f"{key} is {values[key]}; it must be above 0{off}"
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            yield f"{key} is {value}; a finite number is wanted"
    if not re.fullmatch(r"[\w.+-]+", name) or name in (".", ".."):
        yield f"name is {name!r}; letters, digits and . _ + - only, since it names a folder"


def _sampling(rollout: RolloutConfig, method: str) -> Iterator[str]:
    if rollout.temperature <= 0:
        yield (
            f"rollout.temperature is {rollout.temperature}; training samples, so it must be above 0"
        )
    if rollout.stop_token_ids is not None and not rollout.stop_token_ids:
        yield "rollout.stop_token_ids is []; leave it null for the tokenizer's EOS, or name ids"
    if min(rollout.stop_token_ids or [0]) < 0:
        yield f"rollout.stop_token_ids is {rollout.stop_token_ids}; token ids count from 0"
    if rollout.tis == "token" and method == "sft":
        yield "rollout.tis is 'token' with method sft, whose tokens no engine sampled: set none"


def _method(distill: DistillConfig, model: ModelConfig, n: int) -> Iterator[str]:
    method = distill.method
    if method not in NO_TEACHER and model.teacher.hf_path is None:
        yield (
            f"distill.method is {method!r}, which learns from a teacher, and model.teacher.hf_path "
            "is null: set it to a Hugging Face directory"
        )
    if method in ("grpo", "grpd") and n < 2:
        yield f"distill.method {method!r} compares a group's rollouts; rollout.n is 1: 2 or more"
    if distill.estimator == "full_vocab" and distill.adv_clip is not None:
        yield "distill.adv_clip clips the sampled advantage; full_vocab has none: set it to null"
    if method == "exopd" and distill.lambda_uniform <= 0:
        yield f"distill.lambda_uniform is {distill.lambda_uniform}; it must be above 0"
    if method in NO_TEACHER and model.reference.hf_path is not None:
        yield f"model.reference.hf_path is set, and method {method!r} reads no reference: set null"
    phases = distill.phases
    if phases.enabled and method in NO_TEACHER:
        yield (
            f"distill.phases.enabled is true with method {method!r}, which has no teacher: set "
            "distill.phases.enabled=false"
        )
    if not 0 <= phases.rho0 <= 1:
        yield f"distill.phases.rho0 is {phases.rho0}; a share from 0 to 1 is wanted"
    if not 0 <= phases.hold_frac <= phases.end_frac <= 1:
        yield (
            f"distill.phases has hold_frac {phases.hold_frac} and end_frac {phases.end_frac}; "
            "0 <= hold_frac <= end_frac <= 1 is wanted"
        )


def _divergence(distill: DistillConfig) -> Iterator[str]:
    """Says what does not go with the divergences of `full_vocab` beside reverse KL."""
    if not 0.0 <= distill.jsd_beta <= 1.0:
        yield (
            f"distill.jsd_beta is {distill.jsd_beta}; it lies between 0 (forward KL) and 1 "
            "(reverse KL)"
        )
    if distill.estimator == "sampled":
        if distill.divergence != "reverse_kl":
            yield (
                f"distill.divergence is {distill.divergence!r} with estimator sampled, which reads "
                "one token of a row: set distill.estimator=full_vocab"
            )
        if distill.top_k is not None:
            yield (
                f"distill.top_k is {distill.top_k} with estimator sampled, which reads one token "
                "of a row: set distill.estimator=full_vocab, or top_k to null"
            )
        return
    gated = distill.method == "sg_opd" and distill.gate.full_vocab_mode == "candidate"
    if gated and distill.divergence != "reverse_kl":
        yield (
            f"distill.divergence is {distill.divergence!r} with distill.gate.full_vocab_mode "
            "candidate, which is a reverse KL: set the mode to row"
        )
    if distill.top_k is not None and needs_reference(distill):
        yield (
            f"distill.top_k is {distill.top_k} with method {distill.method!r}, which extrapolates "
            "beyond the teacher or reads the reference: top_k serves lambda 1 (opd, opdvr, grpd)"
        )


def _gate(distill: DistillConfig) -> Iterator[str]:
    gate = distill.gate
    if isinstance(gate.eps, str):
        if gate.eps != "auto":
            yield f"distill.gate.eps is {gate.eps!r}; 'auto' or a number from 0 on"
    elif gate.eps < 0:
        yield f"distill.gate.eps is {gate.eps}; 'auto' or a number from 0 on"
    if distill.estimator == "full_vocab" and gate.forbid_sign_flip:
        yield "distill.gate.forbid_sign_flip reads the sampled advantage; use estimator sampled"
    if gate.full_vocab_mode == "candidate":
        if distill.method != "sg_opd" or distill.estimator != "full_vocab":
            yield (
                f"distill.gate.full_vocab_mode is 'candidate' with distill.method "
                f"{distill.method!r} and estimator {distill.estimator!r}; it needs sg_opd with "
                "full_vocab: change them, or set it to row"
            )
        if gate.teacher_signal != "t_minus_s" or gate.conflict not in ("plain", "interpolate"):
            yield (
                "distill.gate.full_vocab_mode 'candidate' gates T - S with lambda_high and "
                "lambda_low: use teacher_signal t_minus_s and conflict plain or interpolate"
            )
    if distill.method == "sg_opd":
        yield from _lambdas(gate)


def _lambdas(gate: GateConfig) -> Iterator[str]:
    if gate.lambda_high <= 0 or gate.lambda_low < 0:
        yield (
            f"distill.gate has lambda_high {gate.lambda_high} and lambda_low {gate.lambda_low}; "
            "lambda_high above 0 and lambda_low from 0 on are wanted"
        )
    if gate.conflict == "interpolate" and not 0 < gate.lambda_low < 1:
        yield (
            f"distill.gate.conflict is 'interpolate' and lambda_low {gate.lambda_low}; it needs a "
            "lambda_low between 0 and 1, set by hand (none is published)"
        )
    if gate.conflict != "interpolate" and gate.lambda_low != 1.0:
        yield (
            f"distill.gate.conflict is {gate.conflict!r} and lambda_low {gate.lambda_low}; only "
            "'interpolate' takes another lambda_low than 1.0"
        )


def _verifier(verifier: VerifierConfig) -> Iterator[str]:
    name = verifier.name
    if name != "math_verify" and "." not in name.strip("."):
        yield (
            f"verifier.name is {name!r}; 'math_verify', or the dotted path "
            "package.module.function of a function (completion, answer)"
        )


def _optimizer(o: OptimizerConfig, num_steps: int) -> Iterator[str]:
    if o.min_lr > o.lr:
        yield f"optimizer.min_lr {o.min_lr} is above optimizer.lr {o.lr}"
    if o.lr_warmup_steps > num_steps:
        yield (
            f"optimizer.lr_warmup_steps is {o.lr_warmup_steps} and num_steps {num_steps}: "
            "the warm-up would never end"
        )
    for key in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(o, key) < 1:
            yield f"optimizer.{key} is {getattr(o, key)}; from 0 to below 1"
