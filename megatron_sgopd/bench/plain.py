"""The objectives in plain PyTorch on whole logits, differentiated by autograd.

What every variant's time is divided by; in float64, block by block, what its gradient is compared
with. Arithmetic is fp32 on any input type, float64 on float64. Each is the sum over all tokens.

Shapes: T tokens, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.bench.cases import JSD_BETA, LAMBDA_HIGH, Case
from megatron_sgopd.bench.inputs import Batch
from megatron_sgopd.distributed.collectives import all_gather
from megatron_sgopd.vocab_parallel import Rows

Objective = Callable[[Tensor, Batch], Tensor]  # student logits [T, V], and the rest -> scalar


def reverse_kl(student: Tensor, batch: Batch) -> Tensor:
    """Compute KL(student || teacher)."""
    return _kl(_wide(student).log_softmax(-1), _wide(batch.teacher).log_softmax(-1))


def forward_kl(student: Tensor, batch: Batch) -> Tensor:
    """Compute KL(teacher || student)."""
    return _kl(_wide(batch.teacher).log_softmax(-1), _wide(student).log_softmax(-1))


def jsd(student: Tensor, batch: Batch, beta: float = JSD_BETA) -> Tensor:
    """Compute beta KL(q || m) + (1 - beta) KL(p || m), m = (1 - beta) p + beta q; q teacher."""
    p, q = _wide(student).log_softmax(-1), _wide(batch.teacher).log_softmax(-1)
    m = torch.logaddexp(p + math.log(1 - beta), q + math.log(beta))
    return beta * _kl(q, m) + (1 - beta) * _kl(p, m)


def gated_reverse_kl(student: Tensor, batch: Batch) -> Tensor:
    """Compute the KL to the extrapolated teacher where the gate of the sampled token is open."""
    p = _wide(student).log_softmax(-1)
    t, r = _wide(batch.teacher), _wide(batch.reference)
    here = batch.tokens[:, None]
    a2 = (t.log_softmax(-1) - p.detach()).gather(-1, here)
    gate = sgopd.sign_consistency_gate(batch.advantages[:, None], a2)
    lam = torch.where(gate, t.new_tensor(LAMBDA_HIGH), t.new_tensor(1.0))
    return _kl(p, (t + (lam - 1.0) * (t - r)).log_softmax(-1))


def candidate(student: Tensor, batch: Batch) -> Tensor:
    """Compute -E_student of the detached advantage with a gate per vocabulary entry."""
    p = _wide(student).log_softmax(-1)
    t, r = (_wide(x).log_softmax(-1) for x in (batch.teacher, batch.reference))
    a2 = t - p.detach()
    lam = sgopd.candidate_lambda(batch.advantages[:, None], a2, lambda_high=LAMBDA_HIGH)
    return -(p.exp() * (a2 + (lam - 1.0) * (t - r))).sum()


def sampled(student: Tensor, batch: Batch) -> Tensor:
    """Compute -(T - S) log p_student of the sampled token, the bracket detached."""
    p = _wide(student).log_softmax(-1).gather(-1, batch.tokens[:, None])[:, 0]
    return -((batch.teacher_logprobs.to(p.dtype) - p.detach()) * p).sum()


OBJECTIVES: dict[str, Objective] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "gated_reverse_kl": gated_reverse_kl,
    "candidate": candidate,
    "sampled": sampled,
}


def loss(case: Case, student: Rows, batch: Batch) -> Tensor:
    """Compute the case's objective as one does without a vocabulary-parallel loss."""
    objective = OBJECTIVES[case.objective]
    if isinstance(student, tuple):
        assert isinstance(batch.teacher, tuple), "both models as hidden states"
        hidden, head = batch.teacher
        return objective(student[0] @ student[1].T, replace(batch, teacher=hidden @ head.T))
    if batch.group is None:
        return objective(student, batch)
    frozen = {
        name: _GatherColumns.apply(rows, batch.group)
        for name in ("teacher", "reference")
        if (rows := getattr(batch, name)) is not None
    }
    return objective(_GatherColumns.apply(student, batch.group), replace(batch, **frozen))


class _GatherColumns(torch.autograd.Function):
    """Megatron's gather of vocabulary-parallel logits: all columns forward, its own backward."""

    @staticmethod
    def forward(ctx, shard: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group, ctx.width = group, shard.shape[1]
        return torch.cat(list(all_gather(shard, group)), dim=1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        start = ctx.group.rank() * ctx.width
        return grad[:, start : start + ctx.width].contiguous(), None


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p.exp() * (p - q)).sum()


def _wide(x: Rows | None) -> Tensor:
    """Convert to the dtype of the arithmetic."""
    assert isinstance(x, Tensor), "the objective reads logits of this model"
    return x if x.dtype == torch.float64 else x.float()
