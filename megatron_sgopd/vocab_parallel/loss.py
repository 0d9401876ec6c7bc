"""The distillation loss: statistics, the method's coefficients, gradient, chunk by chunk.

Statistics of a chunk's rows meet in one all-gather over the tensor-parallel group; `coefficients`
turns the merged log-probs into (weight, lambda, additive) per token; then each rank writes the
gradient of its own logits. Backward only hands it over.

A chunk is the whole micro-batch, unless the coefficient function can be asked about some tokens at
a time (`select`): then it is what the cache holds (logits on one rank: each row is read once) or
what is projected at once (hidden states: the gradient of a chunk is made while its logits exist).

Collectives: one a chunk (two for JSD and the per-candidate gate). Arithmetic is fp32 on any input
type, float64 on float64; what is merged and decided per token is float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.vocab_parallel.autograd import HiddenGradient, LogitsGradient
from megatron_sgopd.vocab_parallel.blocks import Chunk, Place, together
from megatron_sgopd.vocab_parallel.candidate import CandidateLambda
from megatron_sgopd.vocab_parallel.choice import Choice, check_models, make_objective
from megatron_sgopd.vocab_parallel.objective import Coefficients, Found, Lambda, Objective
from megatron_sgopd.vocab_parallel.projection import Projection
from megatron_sgopd.vocab_parallel.reverse_kl import ReverseKL
from megatron_sgopd.vocab_parallel.sampled import Sampled
from megatron_sgopd.vocab_parallel.shard import Rows, Shard, is_logprobs
from megatron_sgopd.vocab_parallel.softmax import Columns, Layout


@dataclass(frozen=True)
class Statistics:
    """Per token [T], without gradient; 0 where the mask is 0."""

    student_logprobs: Tensor
    teacher_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    student_entropy: Tensor | None  # None of a top-k divergence, which does not need whole rows


CoefficientFunction = Callable[[Statistics], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class LossResult:
    """`loss` is the differentiable scalar; the rest is for metrics: [T], without gradient."""

    loss: Tensor
    token_losses: Tensor  # before token_scale; 0 where masked out
    statistics: Statistics
    weight: Tensor
    lam: Tensor  # the number, also where the coefficients chose by a bool
    additive: Tensor


def distillation_loss(
    student: Rows,
    teacher: Rows | None,
    *,
    reference: Rows | None = None,
    tokens: Tensor,
    mask: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    coefficients: CoefficientFunction,
    lambdas: Sequence[Lambda] = (1.0, 1.8),
    estimator: str = "sampled",
    temperature: float = 1.0,
    token_scale: Tensor | None = None,
    candidate_lambda: CandidateLambda | None = None,
    divergence: str = "reverse_kl",
    beta: float = 0.5,
    top_k: int | None = None,
    overwrite_student: bool = False,
    chunk_tokens: int | None = None,
    sum_hidden_gradient: bool = True,
    backend: str = "auto",
) -> LossResult:
    """Sum over masked-in tokens of token_scale * (weight D(lambda) - additive log p_student(y)).

    D is -[(T-S) + (lambda-1)(T-R)] log p_student(y), bracket detached (`sampled`), or a divergence
    between the student and softmax(lambda t + (1-lambda) r), exact over the vocabulary
    (`full_vocab`); arXiv 2602.12125, 2606.09304.

    Args:
        student: this rank's logits [T, V]; or (hidden [T, D], head [V, D]), which are projected
            chunk by chunk. Gradients go to whatever of them requires one; a head with a `main_grad`
            gets its own there, in the forward pass, and the loss must not be scaled afterwards.
        teacher, reference: the same; for `sampled` also log-probs [T]. Never differentiated.
        tokens: ids of the sampled tokens, [T]. mask: [T], nonzero where a token is trained on.
        group: the tensor-parallel group, None for one rank. Rank i holds rows [i V, (i + 1) V).
        vocab_size: rows from here on are padding and enter no softmax.
        coefficients: merged statistics -> (weight, lambda, additive), [T] each. lambda is a bool
            (the last of `lambdas` where true) or a number; with `full_vocab` one of `lambdas`. An
            object whose `select(index)` gives the function of some tokens [n] is asked about slices
            of the active tokens instead of once about all T.
        lambdas: at most two, each a number or [T]; `full_vocab` prepares their targets.
        token_scale: [T], the normalisation (1/(B |y_i|) for a mean of means); None is 1.
        candidate_lambda: the per-candidate gate, (a2 [n, V], token indices [n]) -> lambda [n, V],
            in place of the row's lambda; `full_vocab` reverse KL with teacher and reference.
        divergence: of `full_vocab`: reverse_kl, forward_kl or jsd (with `beta`; `divergences.py`).
        top_k: of `full_vocab`: over the teacher's k likeliest tokens and a tail; lambda 1 only.
        overwrite_student: the gradient is written over the student's logits, which saves a copy of
            them. Without gradients nothing is written.
        chunk_tokens: tokens projected at once; None: by bytes, at least 256.
        sum_hidden_gradient: whether backward sums the hidden states' gradient over the group; False
            where it is reduced elsewhere (a reduce-scatter under sequence parallelism).
        backend: "torch", "triton" (NVIDIA GPUs), or "auto".
    Raises:
        ValueError: shapes or options that do not fit, naming both sides; tokens whose divergence is
            infinite, counted.
    """
    models: dict[str, Rows] = {"student": student}
    models |= {k: m for k, m in (("teacher", teacher), ("reference", reference)) if m is not None}
    choice = Choice(estimator, divergence, beta, top_k, tuple(lambdas), candidate_lambda, backend)
    check_models(choice, models)
    shard = Shard.of(
        student, tokens=tokens, mask=mask, group=group, vocab_size=vocab_size,
        temperature=temperature,
    )  # fmt: skip
    task = _Task(make_objective(choice, shard, models), choice, coefficients, token_scale)
    if all(isinstance(m, Tensor) for m in models.values()):
        return _from_logits(task, models, overwrite_student)
    return _from_hidden(task, models, chunk_tokens, group if sum_hidden_gradient else None)


def sampled_logprobs(
    rows: Rows,
    *,
    tokens: Tensor,
    mask: Tensor,
    group: dist.ProcessGroup | None = None,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Log-probs [T] of `tokens` under sharded rows, 0 where the mask is 0; one collective.

    The scoring pass of a frozen model. Arguments as in `distillation_loss`.
    """
    with torch.no_grad():
        shard = Shard.of(
            rows, tokens=tokens, mask=mask, group=group, vocab_size=vocab_size,
            temperature=temperature,
        )  # fmt: skip
        objective = Sampled(shard, Layout(entropy=False), backend=backend)
        models = {"student": rows}
        chunks: Iterator[Chunk]
        if isinstance(rows, Tensor):
            chunks = iter([_whole(shard, {"student": rows.detach()})])
        else:
            projection = Projection(shard, models, chunk_tokens=chunk_tokens, with_gradient=False)
            chunks = projection.chunks(kept=True)
        columns = _joined([objective.statistics(c).storage for c in chunks], objective)
        merged = objective.merge_all(shard.all_gather(columns).double())
        return shard.to_all_tokens(merged.student_logprobs)


# -- the two halves, with the coefficients between them --------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """What is known of a chunk's tokens in the end, float64 [n] each."""

    found: Found
    coefficients: Coefficients
    losses: Tensor


@dataclass(frozen=True)
class _Task:
    objective: Objective
    choice: Choice
    function: CoefficientFunction
    token_scale: Tensor | None

    @property
    def shard(self) -> Shard:
        return self.objective.shard

    @property
    def sliceable(self) -> bool:
        return hasattr(self.function, "select")

    def ask(self, function: Any, found: Found, places: Place | None) -> Coefficients:
        """The method's coefficients of the tokens at `places`; None: of all active ones.

        All T are shown then, those that are masked out as 0. Log-probs are shown in float64.
        """
        shard, every = self.shard, places is None and not self.shard.all_active
        shown = (
            found.student_logprobs,
            found.teacher_logprobs,
            found.reference_logprobs,
            found.entropy,
        )
        if every:
            shown = tuple(None if v is None else shard.spread(v) for v in shown)  # type: ignore[assignment]
        weight, lam, additive = function(Statistics(*shown))
        if every:
            weight, lam, additive = (v[shard.active] for v in (weight, lam, additive))
        places = shard.active if places is None else places
        values, is_last = self.choice.chosen(lam, places)
        scale = self.token_scale
        scale = torch.ones_like(values) if scale is None else scale[places].double()
        return Coefficients(weight.double(), values, is_last, additive.double(), scale)

    def finish(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, write: bool
    ) -> _Piece:
        """Losses of a chunk and, with `write`, the gradient over its student's rows."""
        divergence = self.objective.divergence(chunk, local, found, c)
        self.refuse_infinite(divergence, found, c)
        losses = _times(c.weight, divergence) - _times(c.additive, found.student_logprobs)
        if write and self.shard.valid:
            self.objective.gradient(chunk, local, found, c, divergence)
        return _Piece(found, c, losses)

    def refuse_infinite(self, divergence: Tensor, found: Found, c: Coefficients) -> None:
        """Raises where the loss is infinite although the student's row has a softmax."""
        logprob = found.student_logprobs
        infinite = ~divergence.isfinite() & (c.weight != 0) & ~found.student.softmax.total.isnan()
        infinite |= logprob.isinf() & (c.additive != 0)
        if bool(infinite.any()):
            raise ValueError(
                f"{int(infinite.sum())} of {len(infinite)} tokens have an infinite "
                f"{self.objective.name}: one model excludes (a logit of -inf) what the other gives "
                "probability to. Exclude the same columns in every model, or mask these tokens"
            )

    def result(self, pieces: Sequence[_Piece], loss: Tensor) -> LossResult:
        """Everything of the pieces as [T]."""

        def joined(values: Sequence[Tensor | None]) -> Tensor | None:
            if any(v is None for v in values):
                return None
            return self.shard.to_all_tokens(torch.cat([v for v in values if v is not None]))

        def all_of(values: Sequence[Tensor]) -> Tensor:
            out = joined(values)
            assert out is not None
            return out

        found = [p.found for p in pieces]
        statistics = Statistics(
            all_of([f.student_logprobs for f in found]),
            joined([f.teacher_logprobs for f in found]),
            joined([f.reference_logprobs for f in found]),
            joined([f.entropy for f in found]),
        )
        return LossResult(
            loss,
            all_of([p.losses for p in pieces]),
            statistics,
            all_of([p.coefficients.weight for p in pieces]),
            all_of([p.coefficients.lam for p in pieces]),
            all_of([p.coefficients.additive for p in pieces]),
        )

    def total(self, pieces: Sequence[_Piece]) -> Tensor:
        sums = [(p.losses * p.coefficients.scale).sum() for p in pieces]
        return torch.stack(sums).sum().to(self.shard.dtype)


def _times(factor: Tensor, value: Tensor) -> Tensor:
    """factor * value, 0 where the factor is 0 whatever the value."""
    return torch.where(factor == 0, 0.0, factor * value)


def _from_logits(task: _Task, models: dict[str, Any], overwrite: bool) -> LossResult:
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
        kept = write and working.dtype == shard.dtype and isinstance(objective, Sampled)
        whole = replace(_whole(shard, valid), student_is_scratch=kept)
        if task.sliceable and shard.size == 1 and objective.one_pass and write and len(whole):
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


def _whole(shard: Shard, matrices: dict[str, Tensor]) -> Chunk:
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


def _one_pass(task: _Task, whole: Chunk) -> _Piece:
    """Both passes of a block while the cache holds it: each row is read once. One rank's form.

    The coefficients are asked about a block's tokens at a time. More at once would need scratch of
    as many rows: half of all logits for 256 of 512 tokens.
    """
    objective = task.objective
    assert isinstance(objective, ReverseKL)
    local, asked = objective.begin(whole), []
    varied = any(isinstance(lam, Tensor) for lam in objective.lambdas)
    for block in objective.scratch(whole).blocks(len(whole)):
        columns = local.at(block, objective.layout)
        objective.statistics_of(whole, block, columns)
        places = block if task.shard.all_active else whole.index[block]
        part = replace(whole, index=whole.index[block]) if varied else whole
        shards = objective.columns(columns.storage[None].double())
        found = objective.merge(part, shards, with_entropy=False)
        c = task.ask(task.function.select(places), found, places)  # type: ignore[attr-defined]
        asked.append(c)
        divergence = objective.divergence(part, columns, found, c)
        constants = objective.constants(found, c, divergence)
        objective.block_gradient(whole, block, columns, constants)
    found = objective.merge(whole, objective.columns(local.storage[None].double()))
    c = Coefficients.joined(asked)
    return task.finish(whole, local, found, c, write=False)


def _clear_others(working: Tensor, shard: Shard) -> None:
    """Zeroes the gradient of masked tokens and of padding."""
    working[:, shard.valid :] = 0
    if not shard.all_active:
        masked = torch.ones(shard.num_tokens, dtype=torch.bool, device=working.device)
        masked[shard.active] = False
        working[masked] = 0


def _from_hidden(
    task: _Task,
    models: dict[str, Any],
    chunk_tokens: int | None,
    reduce_over: dist.ProcessGroup | None,
) -> LossResult:
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


def _chunk_by_chunk(task: _Task, projection: Projection, write: bool) -> list[_Piece]:
    """Statistics and gradient of a chunk while its logits exist: 4 products of head size.

    With several ranks the next chunk is projected while this one's statistics travel.
    """
    objective, shard = task.objective, task.shard
    pieces: list[_Piece] = []

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


def _twice(task: _Task, projection: Projection, write: bool) -> list[_Piece]:
    """Statistics of all chunks first, for functions that see the whole micro-batch at once.

    Every model is projected again for the gradient: 6 products of head size.
    """
    objective, shard = task.objective, task.shard
    locals_ = [objective.statistics(chunk) for chunk in projection.chunks(kept=objective.keeps)]
    own = _joined([local.storage for local in locals_], objective)
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


def _joined(parts: Sequence[Tensor], objective: Objective) -> Tensor:
    """Columns [C, n] of all chunks as [C, N]."""
    return torch.cat(list(parts), -1) if parts else objective.no_columns()


def _nothing(task: _Task, projection: Projection) -> _Piece:
    """Of a micro-batch that trains on no token: tensors of length 0."""
    objective = task.objective
    found = objective.merge_all(objective.no_columns()[None].double())
    empty = found.student_logprobs
    return _Piece(found, Coefficients(empty, empty, None, empty, empty), empty)
