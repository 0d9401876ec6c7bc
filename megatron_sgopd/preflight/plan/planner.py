"""Puts a plan together: models, GPUs, memory, time, and what to change where it does not fit."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_sgopd.config.checks import check
from megatron_sgopd.config.schema import Config, ModelConfig, RolloutConfig
from megatron_sgopd.preflight.plan.architecture import Architecture
from megatron_sgopd.preflight.plan.duration import Duration, duration_of
from megatron_sgopd.preflight.plan.engines import EnginePlan, engine_plans
from megatron_sgopd.preflight.plan.hardware import Assumptions, Gpu
from megatron_sgopd.preflight.plan.job import Cluster, Job, make_job
from megatron_sgopd.preflight.plan.known_models import find_architecture
from megatron_sgopd.preflight.plan.memory import RankMemory, memory_of
from megatron_sgopd.preflight.plan.remedies import Remedy, remedies

PROMPT_SHARE = 0.1  # of max_prompt_tokens, where nothing better is known
COMPLETION_SHARE = 0.25  # of max_new_tokens


@dataclass(frozen=True)
class Plan:
    job: Job
    models: dict[str, Architecture]
    gpu: Gpu
    assumed: Assumptions
    ranks: list[RankMemory]
    engines: list[EnginePlan]
    duration: Duration
    changes: list[Remedy] = field(default_factory=list)

    @property
    def fullest(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.peak)

    @property
    def shortages(self) -> dict[str, int]:
        """Bytes that the fullest rank and one GPU of each engine lack; below 0 they have room."""
        lacking = {"fullest rank": self.fullest.peak - self.gpu.memory_bytes}
        for engine in self.engines:
            one = engine.cache_bytes_per_token * engine.max_model_len
            lacking[f"vLLM ({engine.role})"] = one - engine.cache_bytes
        return lacking

    @property
    def missing_bytes(self) -> int:
        """All shortages together; where there is none, minus the room of the fullest rank."""
        lacking = self.shortages
        return sum(x for x in lacking.values() if x > 0) or lacking["fullest rank"]

    @property
    def fits(self) -> bool:
        return self.missing_bytes <= 0


def assumptions_of(rollout: RolloutConfig, given: dict[str, float]) -> Assumptions:
    """The defaults, and what the options say."""
    lengths = {
        "mean_prompt_tokens": PROMPT_SHARE * rollout.max_prompt_tokens,
        "mean_completion_tokens": COMPLETION_SHARE * rollout.max_new_tokens,
    }
    return Assumptions(**(lengths | given))


def make_plan(config: Config, cluster: Cluster, gpu: Gpu, given: dict[str, float]) -> Plan:
    """The plan of a recipe as it is written, with what to change if it does not fit.

    Raises:
        ConfigError: a recipe, a model or a cluster that cannot be.
    """
    check(config, here=False)
    models = _models(config.model)
    plan = _plan(config, cluster, gpu, given, models)
    if plan.fits:
        return plan

    def shortage(changed: Config) -> int:
        return _plan(changed, cluster, gpu, given, models).missing_bytes

    found = remedies(config, shortage, gpus_per_node=cluster.gpus_per_node)
    return Plan(**{**vars(plan), "changes": found})


def _models(recipe: ModelConfig) -> dict[str, Architecture]:
    """Finds the sizes by role; the reference is the student's sibling where it has no path."""
    student = find_architecture(recipe.student.hf_path, "student")
    models = {"student": student, "reference": student}
    for role in ("teacher", "reference"):
        if (path := getattr(recipe, role).hf_path) is not None:
            models[role] = find_architecture(path, role)
    return models


def _plan(
    config: Config,
    cluster: Cluster,
    gpu: Gpu,
    given: dict[str, float],
    models: dict[str, Architecture],
) -> Plan:
    assumed = assumptions_of(config.rollout, given)
    loaded = _as_loaded(models)
    job = make_job(config, cluster, loaded)
    ranks = memory_of(job, loaded, gpu)
    engines = engine_plans(job, models, gpu)
    duration = duration_of(job, loaded, gpu, assumed, ranks, engines)
    return Plan(job, models, gpu, assumed, ranks, engines, duration)


def _as_loaded(models: dict[str, Architecture]) -> dict[str, Architecture]:
    """The trainer gives a frozen model as many vocabulary rows as the student has."""
    rows = models["student"].vocab
    return {role: replace(model, vocab=rows) for role, model in models.items()}
