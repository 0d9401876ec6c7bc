"""Rollout engines: the memory they take or get, and how many sequences find room in it."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sgopd.config.engines import servers_of
from megatron_sgopd.config.schema import VllmConfig
from megatron_sgopd.preflight.plan.architecture import Architecture
from megatron_sgopd.preflight.plan.hardware import SERVER_OVERHEAD_BYTES, Gpu
from megatron_sgopd.preflight.plan.job import Job


@dataclass(frozen=True)
class EnginePlan:
    """One role's vLLM servers, per GPU of one server; bytes."""

    role: str
    num_engines: int
    tensor_parallel: int
    colocated: bool
    gpu_share_bytes: int  # gpu_memory_utilization of the GPU
    weights_bytes: int
    overhead_bytes: int
    cache_bytes: int  # what is left for keys and values; negative where nothing is
    cache_bytes_per_token: int
    max_model_len: int
    sequences_that_fit: int  # of max_model_len tokens each, in one engine's cache
    sequences_asked: int  # at once, of one engine

    @property
    def fits(self) -> bool:
        """vLLM refuses to start without room for one sequence."""
        return self.sequences_that_fit >= 1


def engine_plans(job: Job, models: dict[str, Architecture], gpu: Gpu) -> list[EnginePlan]:
    """The student's servers and, while phased sampling asks it, the teacher's."""
    if not job.uses_vllm:
        return []
    roles = ["student", *(["teacher"] if job.asks_teacher_engine else [])]
    return [_engine_plan(job, role, models[role], gpu) for role in roles]


def _engine_plan(job: Job, role: str, model: Architecture, gpu: Gpu) -> EnginePlan:
    vllm = servers_of(job.config.rollout.vllm, role)
    tp = vllm.tensor_parallel_size
    element = 4 if vllm.dtype == "float32" else 2
    share = int(vllm.gpu_memory_utilization * gpu.memory_bytes)
    weights = -(-model.num_parameters() * element // tp)
    cache = share - weights - SERVER_OVERHEAD_BYTES
    per_token = cache_bytes_per_token(model, tp, element)
    length = vllm.max_model_len or job.longest
    room = max(0, cache) // (per_token * length)
    together = job.replicas * min(vllm.max_concurrency, job.rollouts_per_replica)
    return EnginePlan(
        role=role,
        num_engines=vllm.num_engines,
        tensor_parallel=tp,
        colocated=vllm.colocated,
        gpu_share_bytes=share,
        weights_bytes=weights,
        overhead_bytes=SERVER_OVERHEAD_BYTES,
        cache_bytes=cache,
        cache_bytes_per_token=per_token,
        max_model_len=length,
        sequences_that_fit=room,
        sequences_asked=-(-together // vllm.num_engines),
    )


def cache_bytes_per_token(model: Architecture, tp: int, element_bytes: int) -> int:
    """Keys and values of all layers on one of `tp` ranks; heads are repeated where too few."""
    heads = -(-model.kv_heads // tp)
    return 2 * model.num_layers * heads * model.head_dim * element_bytes


def servers_on_a_trainer_gpu(job: Job) -> dict[str, VllmConfig]:
    """Colocated servers of the fullest trainer GPU, by role."""
    vllm = job.config.rollout.vllm
    if not job.uses_vllm or not vllm.colocated:
        return {}
    servers = {"student": vllm}
    teacher = servers_of(vllm, "teacher")
    if job.asks_teacher_engine and not teacher.urls and teacher.devices == vllm.devices:
        servers["teacher"] = teacher
    return servers


def embedded_bytes(job: Job, model: Architecture, element_bytes: int) -> int:
    """Cache and logits of the embedded engine, which decodes a rank's share unsharded."""
    rollout = job.config.rollout
    share = -(-job.rollouts_per_replica // job.replica_ranks)
    batch = min(rollout.max_batch_size, share)
    cache = cache_bytes_per_token(model, 1, element_bytes) * job.longest * batch
    return cache + batch * model.vocab * (4 + element_bytes)
