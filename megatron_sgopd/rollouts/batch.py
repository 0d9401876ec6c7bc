"""Puts a step's rollouts together: groups with advantages, teacher rollouts mixed in.

Shapes: P prompts of the replica, G = n rollouts per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.config.schema import Config
from megatron_sgopd.rollouts.sampler import Sampler, request_seed
from megatron_sgopd.types import Completion, Engine, Prompt, Rollout


def generate_groups(
    sampler: Sampler, engine: Engine, prompts: Sequence[Prompt], *, step: int, first_prompt: int
) -> list[list[Rollout]]:
    """G student rollouts for each prompt, with the verifier's advantage a1 within the group."""
    config = sampler.config
    n = config.rollout.n
    # Seeds come from the place in the global batch: the same on every data-parallel layout.
    places = range(first_prompt * n, (first_prompt + len(prompts)) * n)
    seeds = [request_seed(config.seed, step, place) for place in places]
    flat = sampler.rollouts(engine, [p for p in prompts for _ in range(n)], seeds)
    return [with_advantages(flat[i : i + n], config) for i in range(0, len(flat), n)]


def with_advantages(group: Sequence[Rollout], config: Config) -> list[Rollout]:
    """Sets a1 of the group's student rollouts; others keep 0."""
    own = [r.is_correct for r in group if r.source == "student"]
    if not own:
        return list(group)
    # "One sample" is the configured G = 1: a group of which one was kept is still a group.
    signal = config.distill.gate.verifier_signal
    advantages = iter(
        sgopd.verifier_advantages(own, signal)
        if len(own) > 1 or config.rollout.n == 1
        else [0.0 if signal != "sign" else 2.0 * own[0] - 1.0]
    )
    return [
        replace(r, verifier_advantage=next(advantages)) if r.source == "student" else r
        for r in group
    ]


@dataclass(frozen=True)
class Batch:
    """A replica's share of a step: what is trained on, and what it came from."""

    groups: list[list[Rollout]]  # P x G, teacher rollouts in their slots
    student_groups: list[list[Rollout]]  # P x G, every student rollout that was sampled
    requested: int = 0  # slots that asked the teacher
    # student accuracy on the prompt ("none", "some", "all") -> (endorsed, asked)
    endorsed: dict[str, tuple[int, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # of its making, by part

    @property
    def rollouts(self) -> list[Rollout]:
        return [r for group in self.groups for r in group]


def mix_teacher_rollouts(
    sampler: Sampler,
    teacher_engine: Engine,
    groups: list[list[Rollout]],
    slots: Sequence[int],
    *,
    step: int,
    first_prompt: int,
) -> Batch:
    """Asks the teacher for the given slots and puts in what the verifier endorses.

    A slot (prompt * n + sample, global) keeps its student rollout where the teacher's is wrong or
    truncated. The displaced student rollouts stay in the group statistics (`group_stats: all`),
    or a1 is computed again over those kept (`kept`).
    """
    config = sampler.config
    n, phases = config.rollout.n, config.distill.phases
    flat = [r for group in groups for r in group]
    own = [s - first_prompt * n for s in slots if 0 <= s - first_prompt * n < len(flat)]
    mixed, open_slots = list(flat), list(own)
    for attempt in range(phases.attempts):
        prompts = [flat[s].prompt for s in open_slots]
        seeds = [
            request_seed(config.seed, step, first_prompt * n + s, "teacher", attempt)
            for s in open_slots
        ]
        asked = sampler.rollouts(teacher_engine, prompts, seeds, "teacher")
        for slot, rollout in zip(open_slots, asked, strict=True):
            if rollout.is_correct:
                mixed[slot] = rollout
        open_slots = [s for s in open_slots if mixed[s].source == "student"]
    regrouped = [mixed[i : i + n] for i in range(0, len(mixed), n)]
    if phases.group_stats == "kept":
        regrouped = [with_advantages(group, config) for group in regrouped]
    bins: dict[str, tuple[int, int]] = {}
    for slot in own:
        group = groups[slot // n]
        name = _accuracy_bin(sum(r.is_correct for r in group) / len(group))
        endorsed, tried = bins.get(name, (0, 0))
        bins[name] = (endorsed + (mixed[slot].source == "teacher"), tried + 1)
    return Batch(regrouped, groups, len(own), bins)


def _accuracy_bin(accuracy: float) -> str:
    """Tells where the student stands on the prompt: none of its rollouts right, some, all."""
    return "none" if accuracy == 0 else "all" if accuracy == 1 else "some"


def batch_metrics(batch: Batch, policy_version: int) -> dict[str, tuple[Tensor, Tensor]]:
    """(sum, count) of what a step logs about its rollouts; the same names on every replica.

    `rollout/*` and `gate/mixed_groups` are over all G student rollouts, the displaced ones too.
    """
    own = [r for group in batch.student_groups for r in group]
    trained = batch.rollouts
    mixed = [0 < sum(r.is_correct for r in group) < len(group) for group in batch.student_groups]
    asked = sum(a for _, a in batch.endorsed.values())
    rows: dict[str, tuple[float, float]] = {
        "rollout/accuracy": (sum(r.is_correct for r in own), len(own)),
        "rollout/length": (sum(len(r.completion.token_ids) for r in own), len(own)),
        "rollout/policy_lag": (
            sum(policy_version - r.completion.policy_version for r in own),
            len(own),
        ),
        "rollout/truncated": (sum(r.completion.finish_reason == "length" for r in own), len(own)),
        "gate/mixed_groups": (sum(mixed), len(mixed)),
        "phases/requested_fraction": (batch.requested, len(trained)),
        "phases/realised_fraction": (sum(r.source == "teacher" for r in trained), len(trained)),
        "phases/endorsement_rate": (sum(e for e, _ in batch.endorsed.values()), asked),
    }
    for name in ("none", "some", "all"):
        rows[f"phases/endorsement_rate_student_{name}"] = batch.endorsed.get(name, (0, 0))
    return {
        name: (torch.tensor(float(total)), torch.tensor(float(count)))
        for name, (total, count) in rows.items()
    }


def solutions_as_rollouts(prompts: Sequence[Prompt]) -> list[Rollout]:
    """The data set's worked solutions, for `sft`. Raises ValueError where one is missing."""
    rollouts = []
    for prompt in prompts:
        ids = prompt.solution_token_ids
        if ids is None:
            raise ValueError(
                f"prompt {prompt.id!r} has no worked solution, which method sft learns from; set "
                "data.solution_field to the field that holds it"
            )
        completion = Completion(ids, (0.0,) * len(ids), "stop", policy_version=-1, seed=0)
        rollouts.append(Rollout(prompt, completion, "dataset", is_correct=True))
    return rollouts
