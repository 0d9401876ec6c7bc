"""Draws what a case is measured on: models of a moderate divergence, and their shards.

The student is its parent's logits plus noise, as after some distillation: 0.5 nats to the teacher,
less to the reference. Drawn alike on every rank from one seed.

Shapes: T tokens, V vocabulary rows of this rank, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.bench.cases import Case
from megatron_sgopd.vocab_parallel import Rows

SEED = 20_260_609
LOGIT_STD = 3.0
TEACHER_NOISE, REFERENCE_NOISE = 1.0, 0.3  # in logits: KL is about half its square
TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Batch:
    """One rank's inputs. Rows are logits [T, V] or (hidden [T, D], head [V, D])."""

    student: Rows
    teacher: Rows | None  # None where log-probs are enough
    reference: Rows | None
    teacher_logprobs: Tensor  # [T], of the sampled tokens
    tokens: Tensor  # [T]
    advantages: Tensor  # [T], the verifier's
    vocab: int  # of all ranks
    group: dist.ProcessGroup | None = None

    @property
    def mask(self) -> Tensor:
        """Count every token: the plain forms have no way to leave one out."""
        return torch.ones_like(self.tokens, dtype=torch.bool)

    @property
    def outcome(self) -> sgopd.Outcome:
        """Call every token the student's own and half of them right."""
        none = torch.zeros_like(self.tokens, dtype=torch.bool)
        return sgopd.Outcome(self.advantages, self.advantages > 0, none, imitates=False)

    def select(self, part: slice) -> Batch:
        """Make a batch of some of the tokens."""

        def cut(rows: Any) -> Any:
            if isinstance(rows, tuple):
                return rows[0][part], rows[1]
            return None if rows is None else rows[part]

        return replace(
            self,
            student=cut(self.student),
            teacher=cut(self.teacher),
            reference=cut(self.reference),
            teacher_logprobs=self.teacher_logprobs[part],
            tokens=self.tokens[part],
            advantages=self.advantages[part],
        )

    def shard(self, group: dist.ProcessGroup) -> Batch:
        """Copy this rank's columns of all ranks' logits."""
        rank, width = group.rank(), self.vocab // group.size()

        def cut(rows: Any) -> Any:
            return None if rows is None else rows[:, rank * width : (rank + 1) * width].clone()

        return replace(
            self,
            student=cut(self.student),
            teacher=cut(self.teacher),
            reference=cut(self.reference),
            group=group,
        )


def draw(case: Case, device: str) -> Batch:
    """Draw the whole batch of a case, over all ranks' vocabulary."""
    dtype = TORCH_DTYPES[case.dtype]
    g = torch.Generator(device).manual_seed(SEED)

    def normal(*shape: int, std: float) -> Tensor:
        return torch.empty(*shape, device=device).normal_(generator=g).mul_(std)

    student: Any
    teacher: Any = None
    reference: Any = None
    tokens = torch.randint(0, case.vocab, (case.tokens,), generator=g, device=device)
    if case.form == "fused":
        hidden = normal(case.tokens, case.hidden, std=1.0)
        head = normal(case.vocab, case.hidden, std=LOGIT_STD / case.hidden**0.5)
        noise = normal(case.tokens, case.hidden, std=TEACHER_NOISE / LOGIT_STD)
        student = (hidden.to(dtype), head.to(dtype))
        # A head of its own, as another model has one.
        teacher = (noise.add_(hidden).to(dtype), (head * 1.01).to(dtype))
        logprobs = torch.zeros(case.tokens, device=device)
    else:
        base = normal(case.tokens, case.vocab, std=LOGIT_STD)
        teacher_base = normal(case.tokens, case.vocab, std=TEACHER_NOISE).add_(base)
        logprobs = _logprobs(teacher_base, tokens)
        if case.objective != "sampled":
            teacher = teacher_base.to(dtype)
        if case.has_reference:
            noise = normal(case.tokens, case.vocab, std=REFERENCE_NOISE)
            reference = noise.add_(base).to(dtype)
        student = base.to(dtype)
    advantages = normal(case.tokens, std=1.0)
    return Batch(student, teacher, reference, logprobs, tokens, advantages, case.vocab)


def _logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Go by few rows, so that nothing of full size is left behind."""
    out = [
        x.log_softmax(-1).gather(-1, y[:, None])[:, 0]
        for x, y in zip(logits.split(16), tokens.split(16), strict=True)
    ]
    return torch.cat(out)


class _Handout(torch.autograd.Function):
    """Hands out a buffer as a non-leaf tensor and keeps the gradient that comes back.

    A leaf's AccumulateGrad would add a copy of the gradient to some variants and not to others.
    """

    @staticmethod
    def forward(ctx, anchor: Tensor, buffer: Tensor, gradients: list[Tensor]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.gradients = gradients
        # The same memory and no view of `buffer`: Megatron's cross-entropy writes over its input,
        # which autograd refuses of a view.
        alias = torch.empty(0, dtype=buffer.dtype, device=buffer.device)
        return alias.set_(
            buffer.untyped_storage(), buffer.storage_offset(), buffer.shape, buffer.stride()
        )

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[no-untyped-def]
        ctx.gradients.append(grad)
        return grad.new_zeros(()), None, None


class Student:
    """The student's rows as one variant after the other gets them, and the gradient it left."""

    def __init__(self, rows: Rows) -> None:
        self._buffer = rows[0] if isinstance(rows, tuple) else rows
        self._head: Any = rows[1].detach().requires_grad_() if isinstance(rows, tuple) else None
        self._gradients: list[Tensor] = []

    def rows(self, *, main_grad: bool = False) -> Rows:
        """Give logits, or (hidden, head), that require a gradient; the last one is forgotten.

        `main_grad`: the head has Megatron's fp32 buffer, which holds its gradient.
        """
        self._gradients.clear()
        anchor = torch.zeros((), dtype=self._buffer.dtype, device=self._buffer.device)
        attached = _Handout.apply(anchor.requires_grad_(), self._buffer, self._gradients)
        if self._head is None:
            return attached
        self._head.grad = None
        if hasattr(self._head, "main_grad"):
            del self._head.main_grad
        if main_grad:
            self._head.main_grad = torch.zeros_like(self._head, dtype=torch.float32)
        return attached, self._head

    def gradients(self) -> list[Tensor]:
        """Give that of the logits; or of the hidden states and of the head."""
        assert len(self._gradients) == 1, "one backward, one gradient"
        if self._head is None:
            return list(self._gradients)
        of_head = getattr(self._head, "main_grad", self._head.grad)
        assert of_head is not None, "the head was given no gradient"
        return [*self._gradients, of_head]

    def restore(self, original: Tensor) -> None:
        """Put back what a variant that works in place has overwritten."""
        self._buffer.copy_(original)
