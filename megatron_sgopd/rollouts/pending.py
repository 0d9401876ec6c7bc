"""Rollouts that were made ahead of their step, in a checkpoint.

Prompts are not stored: they follow from seed and step. A rollout that is in two places (trained on,
and in its group's statistics) is stored once, token ids and log-probs of all of them as one tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from megatron_sgopd.rollouts.batch import Batch
from megatron_sgopd.types import Completion, Prompt, Rollout

Columns = dict[str, Any]


def to_columns(batch: Batch) -> Columns:
    """The batch as tensors, numbers and names alone."""
    rows: dict[int, tuple[int, Rollout]] = {}  # by identity: place and rollout

    def places(groups: Sequence[Sequence[Rollout]]) -> list[list[int]]:
        return [[rows.setdefault(id(r), (len(rows), r))[0] for r in group] for group in groups]

    groups, student_groups = places(batch.groups), places(batch.student_groups)
    rollouts = [r for _, r in rows.values()]
    completions = [r.completion for r in rollouts]
    return {
        "groups": groups,
        "student_groups": student_groups,
        "lengths": [len(c.token_ids) for c in completions],
        "token_ids": torch.tensor([t for c in completions for t in c.token_ids], dtype=torch.int32),
        "logprobs": torch.tensor([p for c in completions for p in c.logprobs], dtype=torch.float64),
        "rows": [
            {
                "finish_reason": r.completion.finish_reason,
                "policy_version": r.completion.policy_version,
                "seed": r.completion.seed,
                "source": r.source,
                "is_correct": r.is_correct,
                "verifier_advantage": r.verifier_advantage,
            }
            for r in rollouts
        ],
        "requested": batch.requested,
        "endorsed": dict(batch.endorsed),
        "seconds": dict(batch.seconds),
    }


def batch_from_columns(columns: Columns, prompts: Sequence[Prompt]) -> Batch:
    """`prompts`: of the batch's groups, in their order."""
    lengths = columns["lengths"]
    token_ids = [tuple(t.tolist()) for t in columns["token_ids"].split(lengths)]
    logprobs = [tuple(p.tolist()) for p in columns["logprobs"].split(lengths)]
    made: dict[int, Rollout] = {}

    def rollout(place: int, prompt: Prompt) -> Rollout:
        if place not in made:
            row = columns["rows"][place]
            made[place] = Rollout(
                prompt,
                Completion(
                    token_ids[place],
                    logprobs[place],
                    row["finish_reason"],
                    row["policy_version"],
                    row["seed"],
                ),
                row["source"],
                row["is_correct"],
                row["verifier_advantage"],
            )
        return made[place]

    def groups(name: str) -> list[list[Rollout]]:
        return [
            [rollout(place, prompt) for place in group]
            for prompt, group in zip(prompts, columns[name], strict=False)  # [] is allowed
        ]

    return Batch(
        groups("groups"),
        groups("student_groups"),
        columns["requested"],
        {name: tuple(count) for name, count in columns["endorsed"].items()},
        columns["seconds"],
    )
