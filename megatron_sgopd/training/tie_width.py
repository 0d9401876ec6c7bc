"""Measures how far apart two scorings of the same weights come out: it must open no gate.

`gate.eps: auto` is measured once, at the start of a run: the student is scored through the frozen
path as if it were its own teacher, and through the trainer's forward pass, in the layout and the
batch shape that training uses. Methods without a gate have no use for it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.config.schema import Config, ParallelConfig
from megatron_sgopd.model.gpt import ShardedModel, build_model
from megatron_sgopd.model.weight_stream import iter_hf_weights, load_stream
from megatron_sgopd.training.frozen import Frozen
from megatron_sgopd.training.objective import Objective
from megatron_sgopd.training.packing import MicroBatch, num_loss_tokens, num_tokens
from megatron_sgopd.training.step import prepare, run_schedule
from megatron_sgopd.training.student import Student
from megatron_sgopd.types import Rollout
from megatron_sgopd.vocab_parallel import LossResult

MARGIN = 2.0  # times the largest |a2| that was seen: a run sees many more tokens
LEAST_TOKENS = 2048  # of each replica


def measure_tie_width(
    student: Student, teacher: Frozen, rollouts: Sequence[Rollout], config: Config
) -> float:
    """Twice the largest |a2| when the student is its own teacher. Collective.

    The teacher's side goes through the real frozen path, in the teacher's layout.
    """
    objective = Objective.from_config(config.distill, config.rollout, eps=0.0).for_statistics()
    copy = _in_layout_of(teacher, student.model, config.model.transformer_impl)
    mirror = Frozen(copy, student.groups)
    sample = enough_tokens(
        rollouts,
        student.groups.config,
        masked=config.distill.mask_truncated,
        seed=config.seed,
        vocab_size=student.model.shared_vocab_size,
    )
    # Megatron multiplies with frozen weights by another routine, in another order of sums: scored
    # as weights that are trained, the student would agree with itself to the bit.
    with student.frozen():
        work = prepare(mirror, None, sample, objective, config.distill, student.groups).work

    def largest_gap(part: MicroBatch, result: LossResult) -> Tensor:
        stats = result.statistics
        assert stats.teacher_logprobs is not None, "the mirror scored every token"
        return (stats.teacher_logprobs - stats.student_logprobs).abs().max()

    seen = run_schedule(student, work, objective, largest_gap, forward_only=True)
    largest = torch.stack([torch.zeros((), device=student.groups.device), *seen]).max()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return MARGIN * float(largest)


def enough_tokens(
    rollouts: Sequence[Rollout],
    layout: ParallelConfig,
    *,
    masked: bool,
    seed: int,
    vocab_size: int,
) -> list[Rollout]:
    """Returns rollouts of a replica, in whole micro-batches, with LEAST_TOKENS loss tokens.

    The student sampled them, near-certain tokens among them. Where there are too few they come
    again with other tokens, which are the improbable ones. `masked`: those cut off do not count.
    """
    own = sum(num_loss_tokens(r, masked) for r in rollouts)
    if own == 0:
        return list(rollouts)
    rng = random.Random(seed)
    chosen: list[Rollout] = []
    count = whole = 0
    while True:
        for rollout in rollouts:
            if layout.micro_batch_tokens is None:
                is_full = len(chosen) % layout.micro_batch_size == 0
            else:
                is_full = whole >= layout.micro_batch_tokens
            if count >= LEAST_TOKENS and is_full:
                return chosen
            chosen.append(rollout)
            count += num_loss_tokens(rollout, masked)
            whole += num_tokens(rollout)
        rollouts = [_with_other_tokens(r, rng, vocab_size) for r in rollouts]


def _with_other_tokens(rollout: Rollout, rng: random.Random, vocab_size: int) -> Rollout:
    tokens = tuple(rng.randrange(vocab_size) for _ in rollout.completion.token_ids)
    return replace(rollout, completion=replace(rollout.completion, token_ids=tokens))


def _in_layout_of(teacher: Frozen, model: ShardedModel, transformer_impl: str) -> ShardedModel:
    """Returns the student's weights under the teacher's layout: a copy, if that is another."""
    groups = teacher.model.groups
    if groups is model.groups:
        return model
    copy = build_model(
        model.hf_config,
        groups,
        dtype=model.dtype,
        transformer_impl=transformer_impl,
        trainable=False,
        shared_vocab_size=model.shared_vocab_size,
    )
    load_stream(copy, iter_hf_weights(model), source="the student")
    return copy
