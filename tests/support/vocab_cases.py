"""Rank functions and inputs of vocab_parallel/test_loss: they run in the worker pool."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.vocab_parallel import distillation_loss, sampled_logprobs
from megatron_sgopd.vocab_parallel.reference import distillation_loss_reference

GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
COLLECTIVES = ("all_reduce", GATHER, "all_gather", "broadcast", "reduce_scatter")


@dataclass(frozen=True)
class Case:
    vocab: int = 37
    tokens: int = 19
    estimator: str = "sampled"
    method: str = "sg_opd"
    temperature: float = 1.0
    dtype: str = "float64"
    scale: float = 3.0
    chunk_tokens: int | None = 7
    as_hidden: bool = False  # frozen models as (hidden, head); `sampled` as log-probs
    candidate: bool = False
    divergence: str = "reverse_kl"
    beta: float = 0.5
    top_k: int | None = None
    sliced: bool = False  # coefficients that can be asked about some tokens
    student_as_hidden: bool = False
    overwrite: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Inputs:
    student: Tensor
    teacher: Tensor
    reference: Tensor
    tokens: Tensor
    mask: Tensor
    token_scale: Tensor
    outcome: sgopd.Outcome


def draw(case: Case) -> Inputs:
    """Full rows [T, vocab] in float64; a few rows shifted far away."""
    g = torch.Generator().manual_seed(100 + case.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    student, teacher, reference = (normal(case.tokens, case.vocab) * case.scale for _ in range(3))
    if case.dtype == "float64":
        student[0] += 1000.0
        teacher[1] -= 1000.0
    student, teacher, reference = (
        x.to(getattr(torch, case.dtype)).double() for x in (student, teacher, reference)
    )
    tokens = torch.randint(0, case.vocab, (case.tokens,), generator=g)
    mask = torch.rand(case.tokens, generator=g) > 0.3
    advantage = normal(case.tokens)
    advantage[:3] = 0.0
    outcome = sgopd.Outcome(
        advantage,
        advantage > 0,
        torch.rand(case.tokens, generator=g) > 0.8,
        torch.log_softmax(student / case.temperature, -1).gather(-1, tokens[:, None])[:, 0]
        + 0.1 * normal(case.tokens),
    )
    return Inputs(student, teacher, reference, tokens, mask, normal(case.tokens).abs(), outcome)


def my_shard(x: Tensor, group: dist.ProcessGroup | None, dtype: torch.dtype) -> Tensor:
    """This rank's rows, padded with large garbage that must not enter any softmax."""
    rank, size = (group.rank(), group.size()) if group else (0, 1)
    width = -(-x.shape[-1] // size) + 1
    padded = x.new_full((x.shape[0], width * size), 1e4)
    padded[:, : x.shape[-1]] = x
    return padded[:, rank * width : (rank + 1) * width].to(dtype).contiguous()


def loss_options(case: Case, x: Inputs) -> dict[str, Any]:
    function = sgopd.coefficients(case.method, tis_cap=2.0, lambda_uniform=1.25)
    lambdas = {"sg_opd": (1.0, 1.8), "exopd": (1.25,)}.get(case.method, (1.0,))
    a1 = x.outcome.verifier_advantage[:, None]
    return {
        "tokens": x.tokens,
        "mask": x.mask,
        "coefficients": function.for_batch(x.outcome)
        if case.sliced
        else lambda stats: function(stats, x.outcome),
        "lambdas": lambdas,
        "divergence": case.divergence,
        "beta": case.beta,
        "top_k": case.top_k,
        "estimator": case.estimator,
        "temperature": case.temperature,
        "token_scale": x.token_scale,
        "candidate_lambda": (lambda a2, i: sgopd.candidate_lambda(a1[i], a2))
        if case.candidate
        else None,
    }


def as_head(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows as (hidden [T, T], head [V, T]): the identity is the hidden state."""
    return torch.eye(rows.shape[0], dtype=rows.dtype), rows.T.contiguous()


@contextmanager
def counting_collectives(calls: list[str]):  # type: ignore[no-untyped-def]
    kept = {name: getattr(dist, name) for name in COLLECTIVES}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return kept[name](*args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(dist, name, function)


def compare(case: Case) -> dict[str, Any]:
    """Errors of value and gradient against gathered float64, and the collectives counted."""
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    rank = dist.get_rank()
    x, dtype = draw(case), getattr(torch, case.dtype)
    full = x.student.clone().requires_grad_()
    options = loss_options(case, x)
    reference = None if case.top_k is not None else x.reference
    expected = distillation_loss_reference(full, x.teacher, reference=reference, **options)
    expected.backward()

    shards = [my_shard(rows, group, dtype) for rows in (x.student, x.teacher, x.reference)]
    student = shards[0].clone().requires_grad_()
    given: Any = student * 1.0 if case.overwrite else student
    if case.student_as_hidden:  # the head is the logits themselves
        given = (torch.eye(len(student), dtype=dtype), student.T)
    if case.top_k is not None:
        shards[2] = None
    frozen: list[Any] = [as_head(s) if case.as_hidden and s is not None else s for s in shards[1:]]
    passes: list[str] = []
    scoring = {k: options[k] for k in ("tokens", "mask", "temperature")} | {
        "group": group,
        "vocab_size": case.vocab,
    }
    if case.estimator == "sampled" and case.as_hidden:
        with counting_collectives(passes):
            frozen = [sampled_logprobs(rows, **scoring) for rows in frozen]
    forward: list[str] = []
    backward: list[str] = []
    with counting_collectives(forward):
        result = distillation_loss(
            given,
            frozen[0],
            reference=frozen[1],
            group=group,
            vocab_size=case.vocab,
            chunk_tokens=case.chunk_tokens,
            overwrite_student=case.overwrite,
            **options,
        )
    with counting_collectives(backward):
        result.loss.backward()
    width = shards[0].shape[-1]
    mine = torch.zeros(x.student.shape[0], width, dtype=torch.float64)
    valid = max(0, min(width, case.vocab - rank * width))
    assert full.grad is not None and student.grad is not None
    mine[:, :valid] = full.grad[:, rank * width : rank * width + valid]
    stats = result.statistics
    logp = torch.log_softmax(x.student / case.temperature, -1)
    picked = logp.gather(-1, x.tokens[:, None])[:, 0] * x.mask
    entropy = -(logp.exp() * logp).sum(-1) * x.mask
    return {
        "value": float(
            (result.loss.detach().double() - expected.detach()).abs() / expected.abs().clamp(min=1)
        ),
        "gradient": float((student.grad.double() - mine).abs().max() / full.grad.abs().max()),
        "logprobs": float((stats.student_logprobs.double() - picked).abs().max()),
        "entropy": 0.0
        if stats.student_entropy is None
        else float((stats.student_entropy.double() - entropy).abs().max()),
        "masked": float(student.grad[~x.mask].abs().sum()),
        "padding": float(student.grad[:, valid:].abs().sum()),
        "forward": forward,
        "backward": backward,
        "passes": passes,
    }


class _MySlice(torch.autograd.Function):
    """The rank's slice of a replicated input; gradients of all ranks are put together again."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        size = dist.get_world_size()
        ctx.width = x.shape[-1] // size
        return x.chunk(size, -1)[dist.get_rank()].contiguous()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def, override]
        parts = [torch.empty_like(grad) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, grad.contiguous())
        return torch.cat(parts, -1)


def gradcheck(estimator: str) -> bool:
    """Finite differences of the loss, with coefficients that do not read the student."""
    size, vocab, tokens = dist.get_world_size(), 8, 3
    case = Case(vocab=vocab, tokens=tokens, scale=1.0, seed=5)
    x = draw(case)
    student = torch.randn(
        tokens, vocab, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    ).requires_grad_()
    teacher, reference = x.teacher - x.teacher.mean(-1, keepdim=True), x.reference
    # `sampled` holds its advantage constant, which finite differences would not; cross-entropy
    # and grpo are the parts of it that are plain functions of the student.
    method = "grpo" if estimator == "sampled" else "exopd"
    function = sgopd.coefficients(method, lambda_uniform=1.8)

    def loss(rows: Tensor) -> Tensor:
        return distillation_loss(
            _MySlice.apply(rows),
            None if method == "grpo" else _MySlice.apply(teacher),
            reference=None if method == "grpo" else _MySlice.apply(reference),
            tokens=x.tokens % vocab,
            mask=torch.ones(tokens),
            group=dist.group.WORLD if size > 1 else None,
            vocab_size=vocab,
            coefficients=lambda stats: function(stats, x.outcome),
            lambdas=(1.8,),
            estimator=estimator,
            temperature=1.3,
        ).loss

    return bool(torch.autograd.gradcheck(loss, (student,), atol=1e-8, rtol=1e-6))


def tied_top_k() -> Tensor:
    """The whole gradient of a top-k loss whose teacher has ties at rank k, put together."""
    group = dist.group.WORLD if dist.get_world_size() > 1 else None
    rank, size, vocab = dist.get_rank(), dist.get_world_size(), 8
    student = torch.linspace(-1.0, 1.0, 3 * vocab, dtype=torch.float64).view(3, vocab)
    teacher = torch.zeros(3, vocab, dtype=torch.float64)
    teacher[:, 5] = 1.0  # then seven columns tie for two places
    width = vocab // size
    mine = slice(rank * width, (rank + 1) * width)
    x = student[:, mine].clone().requires_grad_()
    function = sgopd.coefficients("opd")
    outcome = sgopd.Outcome(torch.zeros(3), torch.zeros(3).bool(), torch.zeros(3).bool())
    distillation_loss(
        x,
        teacher[:, mine].contiguous(),
        tokens=torch.tensor([0, 3, 7]),
        mask=torch.ones(3),
        group=group,
        vocab_size=vocab,
        coefficients=function.for_batch(outcome),
        lambdas=(1.0,),
        estimator="full_vocab",
        top_k=3,
    ).loss.backward()
    assert x.grad is not None
    parts = [torch.empty_like(x.grad) for _ in range(size)]
    dist.all_gather(parts, x.grad.contiguous())
    return torch.cat(parts, -1)
