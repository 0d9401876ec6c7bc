"""Decides who gets which GPUs: the trainer, engines of their own; some stay idle."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from megatron_sgopd.config.checks import needs_reference, needs_teacher, resolve
from megatron_sgopd.config.engines import samples_teacher, servers_of
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.layout import (
    frozen_layout,
    has_own_layout,
    recompute_problem,
    replica_size,
)
from megatron_sgopd.config.schema import (
    Config,
    DistillConfig,
    ParallelConfig,
    RolloutConfig,
    VllmConfig,
)
from megatron_sgopd.preflight.plan.architecture import Architecture, ModelLayout, check_fits

# Methods that see the statistics of a whole micro-batch at once: those that sgopd.METHODS, which
# imports torch, does not call `token_local`.
WHOLE_BATCH: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Cluster:
    nodes: int
    gpus_per_node: int

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node


@dataclass(frozen=True)
class Job:
    """A resolved recipe on a cluster."""

    config: Config
    cluster: Cluster
    trainer_gpus: int
    engine_gpus: int  # of the student's servers, where they have GPUs of their own
    teacher_engine_gpus: int
    notes: tuple[str, ...] = field(default=())

    @property
    def idle_gpus(self) -> int:
        used = self.trainer_gpus + self.engine_gpus + self.teacher_engine_gpus
        return self.cluster.gpus - used

    @property
    def replicas(self) -> int:
        return self.config.parallel.data_parallel_size or 1

    @property
    def replica_ranks(self) -> int:
        return replica_size(self.config.parallel)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt and completion."""
        return self.config.rollout.max_prompt_tokens + self.config.rollout.max_new_tokens

    @property
    def rollouts_per_replica(self) -> int:
        rollout = self.config.rollout
        each = 1 if self.config.distill.method == "sft" else rollout.n
        return rollout.num_prompts // self.replicas * each

    @property
    def is_token_local(self) -> bool:
        """Tells whether a chunk's gradient is made while its logits exist."""
        return self.config.distill.method not in WHOLE_BATCH

    @property
    def uses_vllm(self) -> bool:
        return self.config.rollout.engine == "vllm"

    @property
    def asks_teacher_engine(self) -> bool:
        distill = self.config.distill
        return samples_teacher(distill) and needs_teacher(distill)

    def roles(self) -> tuple[str, ...]:
        """The frozen models there are."""
        wanted = {"teacher": needs_teacher, "reference": needs_reference}
        return tuple(role for role, needed in wanted.items() if needed(self.config.distill))

    def layout_of(self, role: str) -> ModelLayout:
        p = self.config.parallel
        if role != "student" and has_own_layout(frozen := getattr(self.config.model, role)):
            tp, pp = frozen_layout(frozen, p)
            shared = p.sequence_parallel and tp > 1
            own = ModelLayout(tp, pp, 1, 1, shared, p.make_vocab_size_divisible_by)
            same = self._student_layout()
            return same if (tp, pp, 1, 1) == (same.tp, same.pp, same.vpp, same.cp) else own
        return self._student_layout()

    def _student_layout(self) -> ModelLayout:
        p = self.config.parallel
        return ModelLayout(
            p.tensor_model_parallel_size,
            p.pipeline_model_parallel_size,
            p.virtual_pipeline_model_parallel_size or 1,
            p.context_parallel_size,
            p.sequence_parallel,
            p.make_vocab_size_divisible_by,
        )


def make_job(config: Config, cluster: Cluster, models: dict[str, Architecture]) -> Job:
    """Shares the cluster out and resolves the recipe for the trainer's part of it.

    Raises:
        ConfigError: a recipe that cannot be, models that do not fit the layout, GPUs that the
            layout or the engines cannot take.
    """
    notes: list[str] = []
    engines = _engine_gpus(config.rollout, cluster, notes)
    teachers = _teacher_engine_gpus(config.rollout, config.distill)
    set_apart = config.rollout.vllm.nodes * cluster.gpus_per_node
    trainer = _trainer_gpus(config.parallel, cluster, max(set_apart, engines) + teachers)
    resolved = resolve(config, trainer, here=False)
    job = Job(resolved, cluster, trainer, engines, teachers)
    for role in ("student", *job.roles()):
        check_fits(models[role], job.layout_of(role), role)
    if problem := recompute_problem(resolved.parallel, models["student"].num_layers):
        raise ConfigError(problem)
    if job.idle_gpus:
        notes.append(
            f"{job.idle_gpus} of {cluster.gpus} GPUs stay idle: the trainer uses {trainer} (DP "
            f"{job.replicas}), engines of their own {engines + teachers}; leave "
            "parallel.data_parallel_size null, set rollout.vllm.num_engines, or give fewer nodes"
        )
    return replace(job, notes=tuple(notes))


def _trainer_gpus(p: ParallelConfig, cluster: Cluster, taken: int) -> int:
    """Counts the GPUs of whole replicas on a cluster of which engines have `taken` some."""
    replica, left = replica_size(p), cluster.gpus - taken
    shape = (
        f"TP {p.tensor_model_parallel_size} x PP {p.pipeline_model_parallel_size} x CP "
        f"{p.context_parallel_size}"
    )
    needed = replica * (p.data_parallel_size or 1)
    if left < needed:
        without = f", {taken} of them set apart for engines," if taken else ""
        raise ConfigError(
            f"{cluster.nodes} x {cluster.gpus_per_node} GPUs{without} leave {left} for the "
            f"trainer, which needs {shape} x DP {p.data_parallel_size or 1} = {needed}: give more "
            "nodes, or lower parallel.* or the number of engines"
        )
    if p.data_parallel_size is None and left % replica:
        raise ConfigError(
            f"the trainer's {left} GPUs are no multiple of {shape} = {replica} (a replica), so "
            f"that {left % replica} would be left over: change parallel.*, the engines or the "
            "nodes"
        )
    return needed if p.data_parallel_size else left


def _own_gpus(vllm: VllmConfig) -> int:
    """GPUs of servers that share none with the trainer."""
    if vllm.devices and not vllm.urls:
        return sum(len(entry.split(",")) for entry in vllm.devices)
    return (len(vllm.urls) if vllm.urls else vllm.num_engines) * vllm.tensor_parallel_size


def _engine_gpus(rollout: RolloutConfig, cluster: Cluster, notes: list[str]) -> int:
    """Counts the GPUs of the student's servers that are not the trainer's."""
    vllm = rollout.vllm
    if rollout.engine != "vllm" or vllm.colocated:
        if vllm.nodes:
            raise ConfigError(
                f"rollout.vllm.nodes is {vllm.nodes}, and the recipe's engines "
                f"({'colocated' if vllm.colocated else rollout.engine}) run on the "
                "trainer's GPUs: set rollout.engine=vllm rollout.vllm.colocated=false, or nodes=0"
            )
        return 0
    for role in ("student", "teacher"):
        tp = servers_of(vllm, role).tensor_parallel_size
        if cluster.gpus_per_node % tp:
            raise ConfigError(
                f"the {role}'s vLLM servers have tensor_parallel_size {tp}, and a node has "
                f"{cluster.gpus_per_node} GPUs: a server lives on one node; use a divisor of that"
            )
    if vllm.nodes:
        _check_engine_nodes(vllm, cluster)
    elif vllm.urls is None and vllm.devices is None:
        notes.append(
            "rollout.vllm.devices is null without colocated: the engines are counted on GPUs of "
            "their own, and the trainer will ask for their names (or for nodes or urls)"
        )
    return _own_gpus(vllm)


def _check_engine_nodes(vllm: VllmConfig, cluster: Cluster) -> None:
    if vllm.nodes >= cluster.nodes:
        raise ConfigError(
            f"rollout.vllm.nodes is {vllm.nodes} of {cluster.nodes} nodes: leave at least one to "
            "the trainer"
        )
    there = vllm.nodes * cluster.gpus_per_node
    for role in ("student", "teacher"):
        asked = _own_gpus(servers_of(vllm, role))
        if asked > there:
            raise ConfigError(
                f"the {role}'s vLLM servers need {asked} GPUs, and rollout.vllm.nodes "
                f"{vllm.nodes} have {there}: fewer engines, or more nodes"
            )


def _teacher_engine_gpus(rollout: RolloutConfig, distill: DistillConfig) -> int:
    """Counts the GPUs of the teacher's servers that are neither the trainer's nor the student's."""
    vllm, asked = rollout.vllm, samples_teacher(distill) and needs_teacher(distill)
    if rollout.engine != "vllm" or not asked:
        return 0
    teacher = servers_of(vllm, "teacher")
    beside = vllm.urls is None and teacher.devices == vllm.devices
    if teacher.urls is None and (beside or vllm.nodes):
        return 0
    return _own_gpus(teacher)
