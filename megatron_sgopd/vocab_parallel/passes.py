"""The two passes over given logits, or over chunks of logits that are projected one by one.

Statistics of a chunk's rows meet in one all-gather; the method's coefficients turn the merged
log-probs into (weight, lambda, additive); then the gradient is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.vocab_parallel.autograd import HiddenGradient, LogitsGradient
from megatron_sgopd.vocab_parallel.blocks import Chunk, together
from megatron_sgopd.vocab_parallel.objective import Coefficients, Objective
from megatron_sgopd.vocab_parallel.projection import Projection
from megatron_sgopd.vocab_parallel.sampled import Sampled
from megatron_sgopd.vocab_parallel.shard import Shard, is_logprobs
from megatron_sgopd.vocab_parallel.softmax import Columns
from megatron_sgopd.vocab_parallel.task import LossResult, Piece, Task


def from_logits(task: Task, models: dict[str, Any], overwrite: bool) -> LossResult:
    """The loss of given logits; `models` also holds log-probs [T] of frozen models."""
    shard, objective, student = task.shard, task.objective, models["student"]
    write = torch.is_grad_enabled() and student.requires_grad
    working = student.detach()
    if write and not overwrite:
        working = working.clone()
    with torch.no_grad():
        valid = {
            name: rows.detach()[:, : shard.valid]
            for name, rows in (models | {"student": working}).items()
            if not is_logprobs(rows)
        }
        # Exponentials may replace logits of their own type: reading them again is quicker.
        kept = write and working.dtype == shard.dtype and isinstance(objective, Sampled)
        whole = replace(whole_chunk(shard, valid), student_is_scratch=kept)
        if write and len(whole) and not kept and _goes_in_one_pass(task, working):
            piece = _one_pass(task, whole)
        else:
            local = objective.statistics(whole)
            gathered = shard.all_gather(local.storage).double()
            found = objective.merge(whole, objective.columns(gathered))
            c = task.ask(task.function, found, None)
            piece = task.finish(whole, local, found, c, write)
        if write:
            _clear_others(working, shard)
        total = task.total([piece])
    loss = LogitsGradient.apply(student, total, working, overwrite) if write else total
    return task.result([piece], loss)


def _goes_in_one_pass(task: Task, student: Tensor) -> bool:
    """Tells whether blocks can go through both passes at once; Triton's kernels take all rows."""
    objective = task.objective
    alone = task.shard.size == 1 and objective.kernels(student) is None
    return task.sliceable and alone and objective.one_pass


def whole_chunk(shard: Shard, matrices: dict[str, Tensor]) -> Chunk:
    """All active tokens as one chunk of the given logits."""
    return Chunk(
        matrices["student"],
        matrices.get("teacher"),
        matrices.get("reference"),
        place=together(shard.active) if not shard.all_active else slice(0, shard.num_tokens),
        index=shard.active,
        local_token=shard.local_token,
        owned=shard.owned,
    )


def _one_pass(task: Task, whole: Chunk) -> Piece:
    """Both passes of a block while the cache holds it: each row is read once. One rank's form.

    The coefficients are asked about a block's tokens at a time. More at once would need scratch of
    as many rows: half of all logits for 256 of 512 tokens.
    """
    objective = task.objective
    local, asked = objective.begin(whole), []
    device = local.storage.device

    @cache  # what is done once a block must not show: views of its columns are made once
    def columns_of(n: int) -> tuple[Columns, Columns]:
        columns = Columns.empty(objective.layout, n, task.shard.dtype, device)
        wide = torch.empty(columns.storage.shape, dtype=torch.float64, device=device)
        return columns, objective.columns(wide[None])

    varied = any(isinstance(lam, Tensor) for lam in objective.lambdas) or bool(objective.logprobs)
    for block in objective.scratch(whole).blocks(len(whole)):
        columns, shards = columns_of(block.stop - block.start)
        stored = local.storage[:, block]
        columns.storage.copy_(stored)  # the sampled tokens' logits
        objective.statistics_of(whole, block, columns)
        stored.copy_(columns.storage)
        shards.storage.copy_(columns.storage)
        places = block if task.shard.all_active else whole.index[block]
        part = replace(whole, index=whole.index[block]) if varied else whole
        found = objective.merge(part, shards, with_loss=False)
        c = task.ask(task.function.select(places), found, places)  # type: ignore[attr-defined]
        asked.append(c)
        objective.block_gradient(whole, block, columns, objective.constants(found, c))
    found = objective.merge(whole, objective.columns(local.storage[None].double()))
    c = Coefficients.joined(asked)
    objective.finish_tokens(whole, found, c)
    return task.finish(whole, local, found, c, write=False)


def _clear_others(working: Tensor, shard: Shard) -> None:
    """Zeroes the gradient of masked tokens and of padding."""
    working[:, shard.valid :] = 0
    if not shard.all_active:
        masked = torch.ones(shard.num_tokens, dtype=torch.bool, device=working.device)
        masked[shard.active] = False
        working[masked] = 0


def from_hidden(
    task: Task,
    models: dict[str, Any],
    chunk_tokens: int | None,
    reduce_over: dist.ProcessGroup | None,
) -> LossResult:
    """The loss of hidden states and heads, or of a mixture of those and logits."""
    shard, student = task.shard, models["student"]
    inputs = (student,) if isinstance(student, Tensor) else student
    write = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with torch.no_grad():
        rows = {k: m for k, m in models.items() if not is_logprobs(m)}
        projection = Projection(
            shard,
            rows,
            chunk_tokens=chunk_tokens,
            with_gradient=write,
            buffers=2 if task.sliceable and shard.size > 1 else 1,
            narrows=task.objective.kernels(inputs[-1]) is not None,
        )
        run = _chunk_by_chunk if task.sliceable else _twice
        pieces = run(task, projection, write)
        total = task.total(pieces)
    if not write:
        return task.result(pieces, total)
    if isinstance(student, Tensor):
        loss = LogitsGradient.apply(student, total, projection.logits_grad, False)
    else:
        loss = HiddenGradient.apply(
            *student,
            total,
            projection.hidden_grad,
            projection.finished_head_grad(),
            projection.in_main_grad,
            reduce_over,
        )
    return task.result(pieces, loss)


def _chunk_by_chunk(task: Task, projection: Projection, write: bool) -> list[Piece]:
    """Statistics and gradient of a chunk while its logits exist: 4 products of head size.

    With several ranks the next chunk is projected while this one's statistics travel.
    """
    objective, shard = task.objective, task.shard
    pieces: list[Piece] = []

    def complete(chunk: Chunk, local: Columns, gathered: Any) -> None:
        found = objective.merge(chunk, objective.columns(gathered().double()))
        function = task.function.select(chunk.index)  # type: ignore[attr-defined]
        c = task.ask(function, found, chunk.index)
        pieces.append(task.finish(chunk, local, found, c, write))
        if write:
            projection.add_gradient(chunk)

    waiting: list[tuple[Chunk, Columns, Any]] = []
    for chunk in projection.chunks(kept=objective.keeps):
        local = objective.statistics(chunk)
        waiting.append((chunk, local, shard.begin_all_gather(local.storage)))
        if len(waiting) == projection.num_sets:  # its buffers are needed for the next chunk
            complete(*waiting.pop(0))
    for each in waiting:
        complete(*each)
    return pieces or [_nothing(task, projection)]


def _twice(task: Task, projection: Projection, write: bool) -> list[Piece]:
    """Statistics of all chunks first, for functions that see the whole micro-batch at once.

    Every model is projected again for the gradient: 6 products of head size.
    """
    objective, shard = task.objective, task.shard
    locals_ = [objective.statistics(chunk) for chunk in projection.chunks(kept=objective.keeps)]
    own = joined([local.storage for local in locals_], objective)
    gathered = shard.all_gather(own).double()
    c = task.ask(task.function, objective.merge_all(gathered), None)
    pieces, start = [], 0
    for chunk, local in zip(projection.chunks(kept=False), locals_, strict=True):
        part = slice(start, start + len(chunk))
        found = objective.merge(chunk, objective.columns(gathered[..., part]))
        pieces.append(task.finish(chunk, local, found, c.part(part), write))
        if write:
            projection.add_gradient(chunk)
        start = part.stop
    return pieces or [_nothing(task, projection)]


def joined(parts: Sequence[Tensor], objective: Objective) -> Tensor:
    """Columns [C, n] of all chunks as [C, N]."""
    return torch.cat(list(parts), -1) if parts else objective.no_columns()


def _nothing(task: Task, projection: Projection) -> Piece:
    """Make the result of a micro-batch that trains on no token: tensors of length 0."""
    objective = task.objective
    found = objective.merge_all(objective.no_columns()[None].double())
    empty = found.student_logprobs
    return Piece(found, Coefficients(empty, empty, None, empty, None), empty, empty.bool())
