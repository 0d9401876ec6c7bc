"""One optimizer step. The only place where normalisation and Megatron's scaling meet.

The step's loss is over the global batch of B rollouts, whatever the micro-batches and the layout:

    seq_mean_token_mean   (1/B) sum_i (1/|y_i|) sum_t l_it
    token_mean            sum_it l_it / sum_i |y_i|

Each token carries its share of that mean as `token_scale`, so that the gradients of all
micro-batches, replicas and context parallel ranks simply add up; Megatron is made to divide by
nothing. (Its own per-token loss divides by an integer token count, which the first form is not.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_sgopd.config.schema import DistillConfig
from megatron_sgopd.distributed.groups import Groups, alignment, gather_objects, sequence_alignment
from megatron_sgopd.metrics import Clock, Sums, add_up, reduced_means
from megatron_sgopd.training.forward import forward
from megatron_sgopd.training.frozen import Frozen, FrozenScores
from megatron_sgopd.training.objective import Objective, Scores, outcome_of, token_metrics
from megatron_sgopd.training.packing import (
    MicroBatch,
    balanced_shares,
    micro_batches,
    num_loss_tokens,
    num_tokens,
    padding_share,
    token_scales,
)
from megatron_sgopd.training.student import Student
from megatron_sgopd.types import Rollout
from megatron_sgopd.vocab_parallel import LossResult, Rows

Observe = Callable[[MicroBatch, LossResult], Any]


@dataclass(frozen=True)
class Work:
    """This rank's part of a micro-batch and, on the last stage, what the frozen models said."""

    part: MicroBatch
    teacher: FrozenScores | None
    reference: FrozenScores | None


@dataclass(frozen=True)
class Prepared:
    """A step's work on this rank, and what preparing it is worth telling."""

    work: list[Work]
    sums: Sums


def train_step(
    student: Student,
    teacher: Frozen | None,
    reference: Frozen | None,
    rollouts: Sequence[Rollout],
    objective: Objective,
    distill: DistillConfig,
    clock: Clock,
) -> dict[str, float]:
    """Scores this replica's rollouts, adds up their gradients and takes one optimizer step.

    Collective over all ranks; every rank of a replica passes the same rollouts. Returns the step's
    metrics, the same on all ranks.
    """
    with clock.span("score"):
        prepared = prepare(teacher, reference, rollouts, objective, distill, student.groups)
    with clock.span("train"):
        loss, sums = accumulate_gradients(student, prepared.work, objective)
        updated, grad_norm = student.update()
    metrics = gather_metrics(student.groups, loss, sums | prepared.sums, prepared.work)
    metrics |= {"train/grad_norm": grad_norm, "train/lr": student.lr}
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
    distill: DistillConfig,
    groups: Groups,
) -> Prepared:
    """Cuts micro-batches, gives each token its share, and lets the frozen models score them."""
    masked, layout = distill.mask_truncated, groups.config
    if layout.micro_batch_tokens is not None:
        rollouts = share_out(rollouts, groups)
    lengths = [num_loss_tokens(r, masked) for r in rollouts]
    counts = torch.tensor([len(lengths), sum(lengths)], device=groups.device)
    dist.all_reduce(counts, group=groups.dp_group)
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    models = [f.model.groups for f in (teacher, reference) if f is not None]
    batches = micro_batches(
        rollouts,
        token_scales(
            rollouts,
            aggregation=distill.loss_agg,
            num_sequences=int(counts[0]),
            num_tokens=int(counts[1]),
            mask_truncated=masked,
        ),
        micro_batch_size=layout.micro_batch_size,
        max_tokens=layout.micro_batch_tokens,
        mask_truncated=masked,
        align=alignment(groups, *models),
        align_sequence=sequence_alignment(groups),
        multiple_of=groups.pp_size if interleaved else 1,
    )
    batches = [b.to(groups.device) for b in batches]
    padded, computed = padding_share(batches, rollouts)
    nobody: list[FrozenScores | None] = [None] * len(batches)
    work = [
        Work(batch.context_shard(groups.cp_rank, groups.cp_size), by_teacher, by_reference)
        for batch, by_teacher, by_reference in zip(
            batches,
            teacher.score(batches, objective) if teacher else nobody,
            reference.score(batches, objective) if reference else nobody,
            strict=True,
        )
    ]
    return Prepared(
        work,
        {
            "packing/padding_share": (torch.tensor(padded), torch.tensor(computed)),
            "packing/micro_batch_tokens": (torch.tensor(computed), torch.tensor(len(batches))),
        },
    )


def share_out(rollouts: Sequence[Rollout], groups: Groups) -> list[Rollout]:
    """Evens out the tokens of the replicas; what a replica gives away travels, the rest stays.

    The labels are on the rollouts already, and the loss is a sum: who trains one does not matter.
    """
    if groups.dp_size == 1:
        return list(rollouts)
    lengths = gather_objects([num_tokens(r) for r in rollouts], groups.dp_group)
    shares, me = balanced_shares(lengths), groups.dp_rank
    kept = {i for replica, i in shares[me] if replica == me}
    given = {(me, i): r for i, r in enumerate(rollouts) if i not in kept}
    offered = {k: r for part in gather_objects(given, groups.dp_group) for k, r in part.items()}
    return [rollouts[i] if replica == me else offered[replica, i] for replica, i in shares[me]]


def accumulate_gradients(
    student: Student, work: Sequence[Work], objective: Objective
) -> tuple[Tensor, Sums]:
    """Runs Megatron's schedule; afterwards every `main_grad` is the step's gradient.

    Returns this rank's share of the loss (a scalar; 0 but on the last stage) and its metric sums.
    """
    student.zero_grad()
    sums = batch_sums(student, work, objective)

    def observe(part: MicroBatch, result: LossResult) -> Any:
        return result.loss.detach(), token_metrics(objective, part, result)

    seen = run_schedule(student, work, objective, observe, sums=sums)
    loss = sum((loss for loss, _ in seen), torch.zeros((), device=student.groups.device))
    return loss, add_up(sums for _, sums in seen)


def batch_sums(student: Student, work: Sequence[Work], objective: Objective) -> Tensor | None:
    """The method's own sums [k] over the step's global batch, by a forward pass; mostly None.

    Known on the last stage, whose ranks are the only ones to need them. Collective over it.
    """
    summarize = objective.function.method.summarize
    if summarize is None:
        return None

    def observe(part: MicroBatch, result: LossResult) -> Tensor:
        return summarize(result.statistics, outcome_of(part))

    seen = run_schedule(student, work, objective.for_statistics(), observe, forward_only=True)
    if not seen:
        return None
    total = torch.stack(seen).sum(0)
    for group in (student.groups.dp_group, student.groups.cp_group):
        dist.all_reduce(total, group=group)
    return total


def run_schedule(
    student: Student,
    work: Sequence[Work],
    objective: Objective,
    observe: Observe,
    *,
    forward_only: bool = False,
    sums: Tensor | None = None,
) -> list[Any]:
    """Returns what `observe` makes of each micro-batch's result, on the last stage; [] elsewhere.

    The last stage hands over hidden states and the loss projects them itself, chunk by chunk, so
    that a micro-batch's logits never exist as a whole and masked tokens never meet the head. With
    `forward_only` nothing is written and the frozen models' hidden states can be read again.
    """
    groups = student.groups

    def forward_step(data: Iterator[Work], chunk: torch.nn.Module):  # type: ignore[no-untyped-def]
        """Megatron's: this chunk's output, and the closure that makes the loss of the last."""
        item = next(data)
        output = forward(chunk, item.part)

        def loss_function(output: Tensor):  # type: ignore[no-untyped-def]
            result = objective.loss(
                _student_rows(student, output),
                item.part,
                Scores(
                    item.teacher.take(last=not forward_only) if item.teacher else None,
                    item.reference.take(last=not forward_only) if item.reference else None,
                ),
                group=groups.tp_group,
                vocab_size=student.model.shared_vocab_size,
                # Under sequence parallelism the gather's backward reduces and scatters at once.
                sum_hidden_gradient=not student.model.last_chunk.config.sequence_parallel,
                batch_sums=sums,
            )
            # Megatron's token count; nothing divides by it.
            count = torch.ones((), dtype=torch.int, device=output.device)
            return result.loss, count, {"seen": observe(item.part, result)}

        return output, loss_function

    chunks = list(student.ddp)
    # Forward only, nothing may be written: the loss makes its gradients in the forward pass.
    with (
        student.model.last_chunk.returning_hidden_states(),
        torch.set_grad_enabled(not forward_only),
    ):
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(work) for _ in chunks],
            model=chunks,
            num_microbatches=len(work),
            seq_length=work[0].part.shape[1],  # pipeline stages tell each other the real shapes
            micro_batch_size=work[0].part.shape[0],
            forward_only=forward_only,
        )
    return [o["seen"] for o in outputs]


def _student_rows(student: Student, hidden: Tensor) -> Rows:
    """The student's (hidden [T, D], LM-head shard) with gradients to both."""
    groups, model = student.groups, student.model.last_chunk
    if model.config.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(
            hidden, tensor_parallel_output_grad=True, group=groups.tp_group
        )
    head = model.lm_head_weight()
    student.wait_for(head)
    return hidden.transpose(0, 1).flatten(0, 1), head


def gather_metrics(
    groups: Groups, loss: Tensor, sums: Sums, work: Sequence[Work]
) -> dict[str, float]:
    """The step's loss over the global batch and the means of everything counted per token.

    The ranks that compute the same tokens' loss have one speaker (`Groups.counts_tokens`).
    """
    device, speaks = groups.device, groups.counts_tokens
    own = sums if speaks else {}
    tokens = sum(int(w.part.loss_mask.sum()) for w in work) if speaks else 0
    total = torch.stack(
        [
            loss.detach().double()
            if speaks
            else torch.zeros((), dtype=torch.double, device=device),
            torch.tensor(float(tokens), dtype=torch.double, device=device),
        ]
    )
    dist.all_reduce(total)
    names = gather_objects(sorted(own))
    means = reduced_means(own, {n for some in names for n in some}, None, device)
    return {"train/loss": total[0].item(), "train/tokens": total[1].item(), **means}
