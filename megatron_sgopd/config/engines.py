"""Checks what a recipe asks of its rollout engine before anything is started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal
from urllib.parse import urlsplit

from megatron_sgopd.config.schema import (
    Config,
    DistillConfig,
    RolloutConfig,
    TeacherServersConfig,
    VllmConfig,
)

PROBE_PROMPT, PROBE_LENGTH = 272, 16  # tokens of the guard's fixed sequences (docs/vllm.md)
MOST_OF_A_GPU = 0.95  # of its memory, for servers
# Where a run's servers are, which may differ each time it is resumed.
PLACES = tuple(
    f"rollout.vllm.{key}" for key in ("urls", "teacher.urls", "nodes", "host", "port", "devices")
)
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def engine_problems(config: Config) -> Iterator[str]:
    rollout, vllm = config.rollout, config.rollout.vllm
    if not 0 <= rollout.max_policy_lag <= 1:
        yield f"rollout.max_policy_lag is {rollout.max_policy_lag}; 0 (on-policy) or 1"
    if rollout.engine != "vllm":
        if rollout.max_policy_lag:
            yield (
                "rollout.max_policy_lag is 1 with rollout.engine 'embedded', which decodes in the "
                "trainer's own ranks and cannot run while they train: set engine vllm, or lag 0"
            )
        return
    evaluated = config.evaluation.data or config.evaluation.benchmarks
    if config.distill.method == "sft" and not evaluated:
        yield "rollout.engine is 'vllm' with method sft and no evaluation: nothing to generate"
    if rollout.max_policy_lag and vllm.colocated:
        yield (
            "rollout.max_policy_lag is 1 with rollout.vllm.colocated, where engines sleep while "
            "the trainer trains: give the engines devices of their own, or set the lag to 0"
        )
    if rollout.max_policy_lag and rollout.tis == "none":
        yield (
            "rollout.tis is 'none' with rollout.max_policy_lag 1: rollouts of an older policy need "
            "importance sampling; set rollout.tis to token or auto"
        )
    yield from _servers(vllm)
    yield from _teacher_servers(vllm, asked=samples_teacher(config.distill))
    needed = rollout.max_prompt_tokens + rollout.max_new_tokens
    if vllm.max_model_len is not None and vllm.max_model_len < needed:
        yield (
            f"rollout.vllm.max_model_len is {vllm.max_model_len} and rollout.max_prompt_tokens + "
            f"max_new_tokens {needed}: at least that many, or null"
        )


def _servers(vllm: VllmConfig) -> Iterator[str]:
    yield from _urls("rollout.vllm.urls", vllm.urls)
    if vllm.nodes and vllm.colocated:
        yield (
            f"rollout.vllm.nodes is {vllm.nodes} with rollout.vllm.colocated: servers have nodes "
            "of their own or share the trainer's; set one of them"
        )
    if vllm.nodes and not vllm.urls and vllm.num_engines % vllm.nodes:
        yield (
            f"rollout.vllm.num_engines is {vllm.num_engines} and rollout.vllm.nodes {vllm.nodes}, "
            "which cannot share them equally: use a multiple"
        )
    if vllm.urls and vllm.colocated:
        yield "rollout.vllm.colocated starts its own servers; set rollout.vllm.urls to null"
    if vllm.colocated and vllm.weight_transfer == "nccl":
        yield (
            "rollout.vllm.weight_transfer is 'nccl' with rollout.vllm.colocated, and NCCL takes "
            "one rank of a group on a GPU: set weight_transfer to auto or ipc"
        )
    if vllm.port is not None and not 0 < vllm.port < 65536:
        yield f"rollout.vllm.port is {vllm.port}; 1 to 65535, or null for a free one"
    if vllm.devices is not None and len(vllm.devices) != vllm.num_engines:
        yield (
            f"rollout.vllm.devices has {len(vllm.devices)} entries and num_engines is "
            f"{vllm.num_engines}: one for each server, such as '4,5'"
        )
    if not 0 < vllm.gpu_memory_utilization <= 1:
        yield (
            f"rollout.vllm.gpu_memory_utilization is {vllm.gpu_memory_utilization}; a share above "
            "0 and up to 1"
        )
    if vllm.transfer_folder is not None and vllm.weight_transfer != "file":
        yield (
            "rollout.vllm.transfer_folder is read by weight_transfer 'file' alone, which is "
            f"{vllm.weight_transfer!r}"
        )


def _urls(name: str, urls: list[str] | None) -> Iterator[str]:
    for url in urls or []:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            yield f"{name} has {url!r}; http://HOST:PORT is wanted"
    if urls is not None and not urls:
        yield f"{name} is []; name servers, or set null to have them started"


def _teacher_servers(student: VllmConfig, *, asked: bool) -> Iterator[str]:
    teacher = servers_of(student, "teacher")
    yield from _urls("rollout.vllm.teacher.urls", teacher.urls)
    if twice := sorted(set(student.urls or []) & set(teacher.urls or [])):
        yield (
            f"{twice[0]} is in rollout.vllm.urls and in rollout.vllm.teacher.urls: a server holds "
            "one model, and the student's is given new weights after each step"
        )
    if teacher.devices is not None and len(teacher.devices) != teacher.num_engines:
        yield (
            f"the teacher's servers (rollout.vllm.teacher) have {len(teacher.devices)} entries of "
            f"devices and num_engines is {teacher.num_engines}: one for each"
        )
    if student.nodes and not teacher.urls and teacher.num_engines % student.nodes:
        yield (
            f"rollout.vllm.teacher.num_engines is {teacher.num_engines} and rollout.vllm.nodes "
            f"{student.nodes}, which cannot share them equally: use a multiple"
        )
    shared = bool(student.colocated or student.nodes or student.devices is not None)
    shared = shared and teacher.devices == student.devices and not teacher.urls
    both = student.gpu_memory_utilization + teacher.gpu_memory_utilization
    if shared and both > MOST_OF_A_GPU and asked:
        yield (
            "rollout.vllm.gpu_memory_utilization of the student's and the teacher's servers, which "
            f"share devices while the teacher is asked, add up to {both:.2f}; at most "
            f"{MOST_OF_A_GPU}: set rollout.vllm.teacher.gpu_memory_utilization, or "
            "rollout.vllm.teacher.devices to GPUs of their own"
        )


def samples_teacher(distill: DistillConfig) -> bool:
    """Tells whether a teacher's engine is asked at some time of the run."""
    phases = distill.phases
    return phases.enabled and phases.rho0 > 0 and phases.source == "engine"


def servers_of(vllm: VllmConfig, role: str) -> VllmConfig:
    """The settings of the student's or the teacher's servers."""
    if role != "teacher":
        return vllm
    own = {key: value for key, value in vars(vllm.teacher).items() if value is not None}
    if vllm.urls:  # servers that somebody else started say nothing about those to start here
        own = {"num_engines": 1, **own}
    if vllm.teacher.urls:
        own["num_engines"] = len(vllm.teacher.urls)
    return replace(vllm, **{"urls": None, "port": None, "teacher": TeacherServersConfig(), **own})


def resolve_engine(rollout: RolloutConfig, dtype: Literal["float32", "bfloat16"]) -> RolloutConfig:
    """Fills the fields of a vLLM engine that are derived from others."""
    vllm = rollout.vllm
    if rollout.engine != "vllm":
        return rollout
    length = max(rollout.max_prompt_tokens + rollout.max_new_tokens, PROBE_PROMPT + PROBE_LENGTH)
    engines = len(vllm.urls) if vllm.urls else vllm.num_engines
    return replace(
        rollout,
        vllm=replace(
            vllm,
            dtype=dtype if vllm.dtype == "auto" else vllm.dtype,
            max_model_len=vllm.max_model_len or length,
            num_engines=engines,
        ),
    )
