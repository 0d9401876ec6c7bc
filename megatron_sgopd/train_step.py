"""One optimizer step. The only place where normalisation and Megatron's scaling meet.

The step's loss is over the global batch of B rollouts, whatever the micro-batches and replicas:

    seq_mean_token_mean   (1/B) sum_i (1/|y_i|) sum_t l_it
    token_mean            sum_it l_it / sum_i |y_i|

Each token carries its share of that mean as `token_scale`, so that the gradients of all
micro-batches and replicas simply add up; Megatron is told to divide by nothing. (Its own per-token
loss divides by an integer token count, which the first form is not.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_sgopd.config.schema import Config
from megatron_sgopd.frozen import Frozen
from megatron_sgopd.loss import Objective, Scores, token_metrics
from megatron_sgopd.metrics import Clock, Sums, add_up, reduced_means
from megatron_sgopd.packing import (
    MicroBatch,
    micro_batches,
    num_loss_tokens,
    num_tokens,
    token_scales,
)
from megatron_sgopd.student import Student
from megatron_sgopd.types import Rollout

EPS_MARGIN = 2.0  # gate.eps "auto": this times the largest |a2| of a self-scoring pass


@dataclass(frozen=True)
class Work:
    """A micro-batch with everything its loss needs; token_scale [R, L]."""

    micro_batch: MicroBatch
    scores: Scores
    token_scale: Tensor


def train_step(
    student: Student,
    teacher: Frozen | None,
    reference: Frozen | None,
    rollouts: Sequence[Rollout],
    objective: Objective,
    config: Config,
    clock: Clock,
) -> dict[str, float]:
    """Scores this replica's rollouts, adds up their gradients and takes one optimizer step.

    Collective over all ranks; every rank of a replica passes the same rollouts. Returns the step's
    metrics, the same on all ranks.
    """
    with clock.span("score"):
        work = prepare(teacher, reference, rollouts, objective, config, student)
    with clock.span("train"):
        loss, sums = accumulate_gradients(student, work, objective)
        student.scheduler.step(1)  # before the update: the first step has a learning rate
        updated, grad_norm, _ = student.optimizer.step()
    metrics = gather_metrics(student, loss, sums, work)
    metrics |= {"train/grad_norm": float(grad_norm or 0.0), "train/lr": student.lr}
    if not updated or not math.isfinite(metrics["train/loss"]):
        raise FloatingPointError(
            f"the step's loss is {metrics['train/loss']} and its gradient norm {grad_norm}: the "
            "weights were not updated in a meaningful way. Lower optimizer.lr, set "
            "distill.adv_clip, or resume from the last checkpoint with other settings"
        )
    return metrics


def prepare(
    teacher: Frozen | None,
    reference: Frozen | None,
    rollouts: Sequence[Rollout],
    objective: Objective,
    config: Config,
    student: Student,
) -> list[Work]:
    """Cuts micro-batches, lets the frozen models score them, and gives each token its share."""
    # Rows of like length share a micro-batch: less padding, the same sums.
    rollouts = sorted(rollouts, key=num_tokens, reverse=True)
    masked = config.distill.mask_truncated
    lengths = [num_loss_tokens(r, masked) for r in rollouts]
    counts = torch.tensor([len(lengths), sum(lengths)], device=student.groups.device)
    dist.all_reduce(counts, group=student.groups.dp_group)
    scales = token_scales(
        rollouts,
        aggregation=config.distill.loss_agg,
        num_sequences=int(counts[0]),
        num_tokens=int(counts[1]),
        mask_truncated=masked,
    )
    size = config.parallel.micro_batch_size
    work = []
    for i, batch in enumerate(
        micro_batches(rollouts, micro_batch_size=size, mask_truncated=masked)
    ):
        batch = batch.to(student.groups.device)
        scores = Scores(
            teacher.score(batch, objective) if teacher else None,
            reference.score(batch, objective) if reference else None,
        )
        rows = torch.tensor(scales[i * size : (i + 1) * size], device=student.groups.device)
        work.append(Work(batch, scores, batch.loss_mask * rows[:, None]))
    return work


def accumulate_gradients(
    student: Student, work: Sequence[Work], objective: Objective, *, forward_only: bool = False
) -> tuple[Tensor, Sums]:
    """Runs Megatron's schedule; afterwards every `main_grad` is the step's gradient.

    Returns this replica's share of the loss (a scalar) and its metric sums.
    """
    student.ddp.zero_grad_buffer()
    student.optimizer.zero_grad()
    rows = {w.micro_batch.input_ids.shape for w in work}
    outputs = get_forward_backward_func()(
        forward_step_func=lambda data, model: forward_step(data, model, student, objective),
        data_iterator=iter(work),
        model=student.ddp,
        num_microbatches=len(work),
        seq_length=max(shape[1] for shape in rows),
        micro_batch_size=max(shape[0] for shape in rows),
        forward_only=forward_only,
    )
    loss = torch.stack([o["loss"] for o in outputs]).sum()
    return loss, add_up(o["sums"] for o in outputs)


def forward_step(  # type: ignore[no-untyped-def]
    data: Iterator[Work], model: torch.nn.Module, student: Student, objective: Objective
):
    """Megatron's forward step: the student's local logits, and the closure that makes the loss."""
    work = next(data)
    batch = work.micro_batch
    logits = model(batch.input_ids, batch.position_ids, None)  # [R, L, V]

    def loss_function(output: Tensor):  # type: ignore[no-untyped-def]
        result = objective.loss(
            output.flatten(0, 1),
            batch,
            work.scores,
            work.token_scale,
            group=student.groups.tp_group,
            vocab_size=student.module.true_vocab_size,
        )
        logged = {
            "loss": result.loss.detach(),
            "sums": token_metrics(objective, batch, result),
        }
        # Megatron's token count; nothing divides by it.
        return result.loss, torch.ones((), dtype=torch.int, device=output.device), logged

    return logits, loss_function


def gather_metrics(
    student: Student, loss: Tensor, sums: Sums, work: Sequence[Work]
) -> dict[str, float]:
    """The step's loss over the global batch and the means of everything counted per token."""
    group, device = student.groups.dp_group, student.groups.device
    total = loss.detach().double().clone()
    dist.all_reduce(total, group=group)
    names: list[list[str]] = [[] for _ in range(group.size())]
    dist.all_gather_object(names, sorted(sums), group=group)
    tokens = torch.tensor(sum(int(w.micro_batch.loss_mask.sum()) for w in work), device=device)
    dist.all_reduce(tokens, group=group)
    means = reduced_means(sums, {n for shard in names for n in shard}, group, device)
    return {"train/loss": total.item(), "train/tokens": float(tokens), **means}


def measure_tie_width(student: Student, rollouts: Sequence[Rollout], config: Config) -> float:
    """gate.eps for `auto`: twice the largest |a2| when the student is its own teacher.

    The teacher's side goes through the real frozen path and the student's through the trainer's
    forward, so that what differs is exactly what must not open the gate.
    """
    objective = Objective.of(config, eps=0.0)
    mirror = Frozen(student.module, student.groups)
    work = prepare(mirror, mirror, rollouts, objective, config, student)
    largest = torch.zeros((), device=student.groups.device)
    with torch.no_grad():
        for w in work:
            batch = w.micro_batch
            logits = student.ddp(batch.input_ids, batch.position_ids, None)
            result = objective.loss(
                logits.flatten(0, 1),
                batch,
                w.scores,
                w.token_scale,
                group=student.groups.tp_group,
                vocab_size=student.module.true_vocab_size,
            )
            stats = result.statistics
            assert stats.teacher_logprobs is not None, "the mirror scored every token"
            a2 = (stats.teacher_logprobs - stats.student_logprobs).abs()
            largest = torch.maximum(largest, a2.max())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return EPS_MARGIN * float(largest)
