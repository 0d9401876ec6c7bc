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

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.vocab_parallel.blocks import Chunk
from megatron_sgopd.vocab_parallel.candidate import CandidateLambda
from megatron_sgopd.vocab_parallel.choice import Choice, check_models, lambdas_from, make_objective
from megatron_sgopd.vocab_parallel.objective import Lambda
from megatron_sgopd.vocab_parallel.passes import from_hidden, from_logits, joined, whole_chunk
from megatron_sgopd.vocab_parallel.projection import Projection
from megatron_sgopd.vocab_parallel.sampled import Sampled
from megatron_sgopd.vocab_parallel.shard import Rows, Shard, check_inputs
from megatron_sgopd.vocab_parallel.softmax import Layout
from megatron_sgopd.vocab_parallel.task import CoefficientFunction, LossResult, Task


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
    student_entropy: bool = True,
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
            object whose `select(places)` gives the function of some tokens (`places`: a slice, or
            their indices [n]) is asked about a few at a time instead of once about all T.
        lambdas: at most two, each a number or [T]; `full_vocab` prepares their targets.
        token_scale: [T], the normalisation (1/(B |y_i|) for a mean of means); None is 1.
        candidate_lambda: the per-candidate gate, (a2 [n, V], token indices [n]) -> lambda [n, V],
            in place of the row's lambda; `full_vocab` reverse KL with teacher and reference.
        divergence: of `full_vocab`: reverse_kl, forward_kl or jsd (with `beta`; `divergences.py`).
        top_k: of `full_vocab`: over the teacher's k likeliest tokens and a tail; lambda 1 only.
        overwrite_student: the gradient is written over the student's logits, which saves a copy of
            them; they are gone even where the call is then refused. Without gradients nothing is
            written.
        student_entropy: whether `statistics` has the student's entropy; from the same pass, at a
            cost of two operations an element. JSD and the per-candidate gate always have it.
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
    choice = Choice(
        estimator, divergence, beta, top_k, lambdas_from(lambdas), candidate_lambda, backend,
        entropy=student_entropy,
    )  # fmt: skip
    per_token = {"token_scale": token_scale}
    per_token |= {f"lambdas[{i}]": lam for i, lam in enumerate(choice.lambdas)}  # type: ignore[misc]
    check_inputs(models, tokens, mask, per_token)
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(
            f"chunk_tokens is {chunk_tokens}; one token or more is wanted (None: auto)"
        )
    check_models(choice, models)
    shard = Shard.from_rows(
        student, tokens=tokens, mask=mask, group=group, vocab_size=vocab_size,
        temperature=temperature,
    )  # fmt: skip
    task = Task(make_objective(choice, shard, models), choice, coefficients, token_scale)
    if all(isinstance(m, Tensor) for m in models.values()):
        return from_logits(task, models, overwrite_student)
    return from_hidden(task, models, chunk_tokens, group if sum_hidden_gradient else None)


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
    check_inputs({"student": rows}, tokens, mask)
    with torch.no_grad():
        shard = Shard.from_rows(
            rows, tokens=tokens, mask=mask, group=group, vocab_size=vocab_size,
            temperature=temperature,
        )  # fmt: skip
        objective = Sampled(shard, Layout(entropy=False), backend=backend)
        models = {"student": rows}
        chunks: Iterator[Chunk]
        if isinstance(rows, Tensor):
            chunks = iter([whole_chunk(shard, {"student": rows.detach()[:, : shard.valid]})])
        else:
            projection = Projection(shard, models, chunk_tokens=chunk_tokens, with_gradient=False)
            chunks = projection.chunks(kept=True)
        columns = joined([objective.statistics(c).storage for c in chunks], objective)
        merged = objective.merge_all(shard.all_gather(columns).double())
        return shard.to_all_tokens(merged.student_logprobs)
