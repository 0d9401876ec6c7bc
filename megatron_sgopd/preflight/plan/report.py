"""A plan as text and as JSON; JSON names carry their units (docs/planning.md lists them)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from megatron_sgopd.preflight.plan.engines import EnginePlan
from megatron_sgopd.preflight.plan.hardware import (
    CONTEXT_BYTES,
    FRAGMENTATION_SHARE,
    GIB,
    SERVER_OVERHEAD_BYTES,
    SLEEPING_SERVER_BYTES,
    UNCERTAINTY,
)
from megatron_sgopd.preflight.plan.memory import RankMemory
from megatron_sgopd.preflight.plan.planner import Plan
from megatron_sgopd.preflight.plan.remedies import Changes

RESERVE = ("context", "fragmentation")  # the last rows of the table


def as_json(plan: Plan) -> dict[str, Any]:
    """Everything the text says, and more."""
    job, duration = plan.job, plan.duration
    return {
        "fits": plan.fits,
        "missing_bytes": plan.missing_bytes,
        "shortages_bytes": plan.shortages,
        "recipe": job.config.name,
        "cluster": {
            "nodes": job.cluster.nodes,
            "gpus_per_node": job.cluster.gpus_per_node,
            "trainer_gpus": job.trainer_gpus,
            "engine_gpus": job.engine_gpus,
            "teacher_engine_gpus": job.teacher_engine_gpus,
            "idle_gpus": job.idle_gpus,
            "data_parallel_size": job.replicas,
        },
        "gpu": asdict(plan.gpu),
        "models": {
            role: asdict(model)
            | {"parameters": model.num_parameters(), "supported_by_trainer": model.is_supported}
            | {"layout": asdict(job.layout_of(role))}
            for role, model in plan.models.items()
            if role == "student" or role in job.roles()
        },
        "memory": {
            "fullest_rank": plan.ranks.index(plan.fullest),
            "peak_phase": plan.fullest.peak_phase,
            "peak_bytes": plan.fullest.peak,
            "ranks": [_rank_json(rank) for rank in plan.ranks],
        },
        "engines": [asdict(engine) | {"fits": engine.fits} for engine in plan.engines],
        "time": {
            "phases_seconds": duration.phases,
            "step_seconds": duration.step_seconds,
            "tokens_per_step": duration.tokens,
            "tokens_per_second_and_gpu": duration.tokens / duration.step_seconds / job.cluster.gpus,
            "decode_tokens_per_second_and_engine": duration.decode_tokens_per_second,
            "uncertainty": UNCERTAINTY,
        },
        "assumptions": asdict(plan.assumed)
        | {
            "context_bytes": CONTEXT_BYTES,
            "fragmentation_share": FRAGMENTATION_SHARE,
            "vllm_overhead_bytes": SERVER_OVERHEAD_BYTES,
            "vllm_asleep_bytes": SLEEPING_SERVER_BYTES,
        },
        "changes": [
            {"set": change.changes, "missing_bytes_after": change.missing_bytes}
            for change in plan.changes
        ],
        "notes": list(notes(plan)),
    }


def _rank_json(rank: RankMemory) -> dict[str, Any]:
    return {
        "place": rank.place,
        "stage": rank.stage,
        "parameters": rank.parameters,
        "peak_phase": rank.peak_phase,
        "peak_bytes": rank.peak,
        "phases_bytes": {phase: rank.items(phase) for phase in rank.phases},
    }


def lines(plan: Plan) -> Iterator[str]:
    """The plan for a terminal."""
    yield from _head(plan)
    yield ""
    yield from _memory(plan)
    for engine in plan.engines:
        yield ""
        yield from _engine(engine)
    yield ""
    yield from _time(plan)
    yield ""
    yield from (f"note: {note}" for note in notes(plan))
    yield from _verdict(plan)


def _head(plan: Plan) -> Iterator[str]:
    job, cluster = plan.job, plan.job.cluster
    yield (
        f"{job.config.name} on {cluster.nodes} x {cluster.gpus_per_node} {plan.gpu.name} of "
        f"{plan.gpu.memory_bytes / GIB:.1f} GiB: trainer {job.trainer_gpus}, engines "
        f"{job.engine_gpus + job.teacher_engine_gpus or 'on the same'}, idle {job.idle_gpus}"
    )
    for role in ("student", *job.roles()):
        model, layout = plan.models[role], job.layout_of(role)
        cut = f"TP {layout.tp} x PP {layout.pp}"
        cut += f" x VPP {layout.vpp}" if layout.vpp > 1 else ""
        cut += f" x CP {layout.cp}" if layout.cp > 1 else ""
        cut += f" x DP {job.replicas}" if role == "student" else ""
        sizes = (
            f"L {model.num_layers}, h {model.hidden}, heads {model.heads}/{model.kv_heads} x "
            f"{model.head_dim}, f {model.ffn}, V {model.vocab}{', tied' if model.tied else ''}"
        )
        yield f"{role:<10} {model.num_parameters() / 1e9:7.2f} B  {cut}; {sizes}; {model.source}"
    p = job.config.parallel
    batch = (
        f"packed to {p.micro_batch_tokens} tokens"
        if p.micro_batch_tokens is not None
        else f"{p.micro_batch_size} rows of {job.longest} tokens"
    )
    yield (
        f"{'step':<10} {job.rollouts_per_replica * job.replicas} rollouts of at most "
        f"{job.longest} tokens; micro-batches {batch}; recompute {p.recompute_granularity}; "
        f"{job.config.model.dtype}; {job.config.distill.estimator}"
    )


def _memory(plan: Plan) -> Iterator[str]:
    """The fullest rank of each stage, each at its own peak."""
    stages = [
        max((r for r in plan.ranks if r.stage == stage), key=lambda rank: rank.peak)
        for stage in sorted({rank.stage for rank in plan.ranks})
    ]
    yield "memory, GiB" + " " * 9 + "".join(f"{f'stage {r.stage}':>14}" for r in stages)
    held = [rank.items(rank.peak_phase) for rank in stages]
    names = list(dict.fromkeys(name for items in held for name in items if name not in RESERVE))
    names += RESERVE
    for name in names:
        row = [items.get(name, 0) for items in held]
        if any(row):
            yield f"  {name:<18}" + "".join(f"{x / GIB:14.2f}" for x in row)
    yield f"  {'peak':<18}" + "".join(f"{rank.peak / GIB:14.2f}" for rank in stages)
    yield f"  {'in phase':<18}" + "".join(f"{rank.peak_phase:>14}" for rank in stages)
    fullest = plan.fullest
    others = ", ".join(f"{phase} {fullest.total(phase) / GIB:.1f}" for phase in fullest.phases)
    yield f"  the fullest rank by phase: {others}"


def _engine(engine: EnginePlan) -> Iterator[str]:
    where = "on the trainer's GPUs" if engine.colocated else "on GPUs of their own"
    yield (
        f"vLLM, {engine.role}: {engine.num_engines} x TP {engine.tensor_parallel} {where}; a GPU "
        f"gives {engine.gpu_share_bytes / GIB:.1f} GiB = weights "
        f"{engine.weights_bytes / GIB:.1f} + overhead {engine.overhead_bytes / GIB:.1f} + cache "
        f"{engine.cache_bytes / GIB:.1f}"
    )
    yield (
        f"  room for {engine.sequences_that_fit} sequences of {engine.max_model_len} tokens at "
        f"once, asked for {engine.sequences_asked}"
    )


def _time(plan: Plan) -> Iterator[str]:
    duration, a = plan.duration, plan.assumed
    total = sum(duration.phases.values())
    yield f"time of a step: about {duration.step_seconds:.0f} s ({UNCERTAINTY})"
    for phase, seconds in duration.phases.items():
        yield f"  {phase:<14}{seconds:10.1f} s {100 * seconds / total:5.1f} %"
    yield (
        f"  assumed: {a.mean_prompt_tokens:.0f} + {a.mean_completion_tokens:.0f} tokens a rollout "
        f"(mean); {plan.gpu.flops_per_s / 1e12:.0f} TFLOP/s x {a.train_mfu} (train) or "
        f"{a.score_mfu} (score); {plan.gpu.memory_bytes_per_s / 1e9:.0f} GB/s x "
        f"{a.decode_bandwidth_share} (decode); network {a.network_bytes_per_s / 1e9:.0f} GB/s x "
        f"{a.network_share} a GPU"
    )


def notes(plan: Plan) -> Iterator[str]:
    yield from plan.job.notes
    for role in ("student", *plan.job.roles()):
        if not plan.models[role].is_supported:
            yield (
                f"the {role} is a mixture of experts, counted by formula (experts cut over TP): "
                "the trainer does not support it yet"
            )
    for engine in plan.engines:
        if engine.fits and engine.sequences_that_fit < engine.sequences_asked:
            yield (
                f"vLLM ({engine.role}) will keep requests of the longest kind waiting: "
                f"{engine.sequences_that_fit} of {engine.sequences_asked} fit at once"
            )
    if plan.job.layout_of("student").tp > plan.job.cluster.gpus_per_node:
        yield "tensor parallelism spans nodes: training will be far slower than estimated"


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.fits:
        room = -plan.missing_bytes
        yield f"It fits: {room / GIB:.1f} GiB of {plan.gpu.memory_bytes / GIB:.1f} are left."
        return
    yield "It does not fit:"
    for who, lacking in plan.shortages.items():
        if lacking > 0:
            why = ", which would not start without room for one sequence" if "vLLM" in who else ""
            yield f"  {who} lacks {lacking / GIB:.1f} GiB{why}"
    if not plan.changes:
        yield "  No change that was tried helps: use more GPUs, or GPUs with more memory."
        return
    yield "What to change, one on top of the other:"
    for change in plan.changes:
        state = (
            f"fits, {-change.missing_bytes / GIB:.1f} GiB left"
            if change.missing_bytes <= 0
            else f"{change.missing_bytes / GIB:.1f} GiB missing in all"
        )
        yield f"  {settings(change.changes)}    ({state})"
    if plan.changes[-1].missing_bytes > 0:
        yield "  That is not enough: use more GPUs, or GPUs with more memory."


def settings(changes: Changes) -> str:
    """Writes settings as on the command line."""
    words = {None: "null", True: "true", False: "false"}
    shown = ((k, words[v] if v is None or isinstance(v, bool) else v) for k, v in changes.items())
    return " ".join(f"{key}={value}" for key, value in shown)
