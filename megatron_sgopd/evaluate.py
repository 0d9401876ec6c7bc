"""avg@k, pass@k and greedy accuracy of what an engine holds, on a set of problems.

Replicas share the problems; the records come together on every rank and rank 0 writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sgopd.jobs import Jobs
from megatron_sgopd.rollout import Sampler, request_seed
from megatron_sgopd.types import Engine, Prompt, Request, Rollout

EVALUATION_SEED = 42  # as in the paper's protocol: the same samples' seeds for every model


def evaluate(
    sampler: Sampler,
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    k: int,
    greedy: bool,
    jobs: Jobs,
    advance: Callable[[int], object] = lambda count: None,
) -> list[dict[str, Any]]:
    """One record a problem, in order: id, problem, answer, num_samples, is_correct, completions, …

    Seeds come from EVALUATION_SEED, the run's seed and the problem's id, so that two models
    evaluated under one seed draw the same uniforms. Collective over all ranks. `advance` is told
    how many problems of this replica are done.
    """
    groups = sampler.groups
    share = [p for i, p in enumerate(prompts) if i % groups.dp_size == groups.dp_rank]
    records = []
    # A slice at a time: bounded memory, and a bar that moves.
    largest = -(-len(prompts) // groups.dp_size)  # every replica takes as many slices
    for start in range(0, largest, problems_at_once := max(1, 512 // k)):
        part = share[start : start + problems_at_once]
        records += jobs.run(partial(_evaluate_part, sampler, engine, part, k, greedy))
        advance(len(part))
    gathered: list[Any] = [None] * groups.dp_size
    dist.all_gather_object(gathered, records, group=groups.dp_group)
    by_id = {record["id"]: record for shard in gathered for record in shard}
    return [by_id[p.id] for p in prompts]


def _evaluate_part(
    sampler: Sampler, engine: Engine, prompts: Sequence[Prompt], k: int, greedy: bool
) -> list[dict[str, Any]]:
    sampled = _answers(sampler, engine, [(p, i) for p in prompts for i in range(k)])
    firsts = _answers(sampler, engine, [(p, -1) for p in prompts]) if greedy else []
    records = []
    for i, prompt in enumerate(prompts):
        mine = sampled[i * k : (i + 1) * k]
        record: dict[str, Any] = {
            "id": prompt.id,
            "problem": prompt.text,
            "answer": prompt.answer,
            "num_samples": k,
            "num_correct": sum(r.is_correct for r in mine),
            "is_correct": [r.is_correct for r in mine],
            "completions": [sampler.decode(r.completion.token_ids) for r in mine],
            "lengths": [len(r.completion.token_ids) for r in mine],
            "truncated": sum(r.completion.finish_reason == "length" for r in mine),
        }
        if greedy:
            record["greedy_is_correct"] = firsts[i].is_correct
            record["greedy"] = sampler.decode(firsts[i].completion.token_ids)
        records.append(record)
    return records


def _answers(
    sampler: Sampler, engine: Engine, asked: Sequence[tuple[Prompt, int]]
) -> list[Rollout]:
    """Labelled answers; sample -1 is the greedy one."""
    config = sampler.config
    limit = config.evaluation.max_new_tokens or config.rollout.max_new_tokens
    requests = [
        Request(
            prompt_token_ids=prompt.token_ids,
            seed=request_seed(EVALUATION_SEED, config.seed, prompt.id, sample),
            max_new_tokens=limit,
            temperature=0.0 if sample < 0 else config.evaluation.temperature,
            stop_token_ids=sampler.stop_token_ids,
        )
        for prompt, sample in asked
    ]
    return sampler.label([p for p, _ in asked], engine.stream(requests), "student")


def write_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """One JSON object a line, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records), encoding="utf-8"
    )
    temporary.replace(path)
