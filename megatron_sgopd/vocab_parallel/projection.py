"""Logits for one chunk of tokens at a time, from hidden states and shards of LM heads.

Only tokens that are trained on meet a head; the buffers of one chunk are all the logits there ever
are. The gradient of a chunk goes from them straight to the hidden states and to the student's head:
into Megatron's fp32 `main_grad` where the head has one.

Shapes: T tokens, D hidden, V vocabulary rows of this rank, n tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.blocks import Chunk
from megatron_sgopd.vocab_parallel.shard import Rows, Shard

# Logits of one chunk, all models together. CPUs: little more than what 256 tokens need anyway.
# GPUs: 512 rows of 152,000 columns of two models, enough to fill the chip (docs/performance.md).
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 640 * 2**20}
GEMM_ROWS = 128  # a GPU's products go by tiles of so many tokens
LEAST_TOKENS = 256  # of a chunk: what a coefficient function sees at once
HEAD_ROWS = 8192  # of the head at once where logits and gradients are converted


class Projection:
    """The chunks of a micro-batch, with the student's gradients that they add up to."""

    def __init__(
        self,
        shard: Shard,
        models: Mapping[str, Rows],
        *,
        chunk_tokens: int | None,
        with_gradient: bool,
        buffers: int = 1,
        narrows: bool = False,
    ) -> None:
        """`buffers`: how many chunks can be at hand at once.

        `narrows`: the gradient is written in the head's type where that is narrower, in the memory
        of the student's logits; one pass and one copy less.
        """
        self.shard, self.models = shard, models
        student = models["student"]
        self.device = student.device if isinstance(student, Tensor) else student[0].device
        self.size = chunk_tokens or self._default_size(buffers)
        self.size = max(1, min(self.size, len(shard.active)))
        self.num_sets = min(buffers, -(-len(shard.active) // self.size)) or 1
        self._sets = [
            {
                name: torch.empty(self.size, shard.valid, dtype=shard.dtype, device=self.device)
                for name in models
            }
            for _ in range(self.num_sets)
        ]
        self._narrow: torch.dtype | None = None
        if narrows and isinstance(student, tuple) and student[1].itemsize < shard.dtype.itemsize:
            self._narrow = student[1].dtype
        self.hidden_grad: Tensor | None = None
        self.head_grad: Tensor | None = None
        if with_gradient:
            self._prepare_gradients()

    def _default_size(self, buffers: int) -> int:
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        row = max(1, self.shard.valid) * self.shard.dtype.itemsize * len(self.models) * buffers
        size = max(LEAST_TOKENS, CHUNK_BYTES[kind] // row)
        return size if kind == "cpu" else size // GEMM_ROWS * GEMM_ROWS

    def _prepare_gradients(self) -> None:
        student = self.models["student"]
        if isinstance(student, Tensor):
            self.logits_grad = torch.zeros_like(student)
            return
        hidden, head = student
        if hidden.requires_grad:
            self.hidden_grad = torch.zeros_like(hidden, memory_format=torch.contiguous_format)
        main_grad = getattr(head, "main_grad", None) if head.requires_grad else None
        self.in_main_grad = main_grad is not None
        if main_grad is not None:
            self._head_sum: Tensor = main_grad
        elif head.requires_grad:
            self._head_sum = torch.zeros(head.shape, dtype=self.shard.dtype, device=head.device)

    # -- forward -----------------------------------------------------------------------------------

    def chunks(self, *, kept: bool) -> Iterator[Chunk]:
        """The chunks in order. `kept`: the passes may leave results in the buffers.

        Not where a model came as logits: those may hold -inf, and then the pass is taken again.
        """
        shard = self.shard
        kept = kept and all(isinstance(rows, tuple) for rows in self.models.values())
        for number, start in enumerate(range(0, len(shard.active), self.size)):
            part = slice(start, min(start + self.size, len(shard.active)))
            index = shard.active[part]
            n = len(index)
            buffers = {k: b[:n] for k, b in self._sets[number % len(self._sets)].items()}
            for name, out in buffers.items():  # the student first
                self._project(name, index, out, buffers["student"])
            yield Chunk(
                buffers["student"],
                buffers.get("teacher"),
                buffers.get("reference"),
                place=slice(0, n),
                index=index,
                local_token=shard.local_token[part],
                owned=shard.owned[part],
                narrow=self._narrowed(buffers["student"]),
                student_is_scratch=kept,
                frozen_is_scratch=kept,
            )

    def _narrowed(self, student: Tensor) -> Tensor | None:
        """[n, V] in the narrower type, rows where those of the fp32 buffer start."""
        return None if self._narrow is None else student.view(self._narrow)[:, : self.shard.valid]

    def _project(self, name: str, index: Tensor, out: Tensor, student: Tensor) -> None:
        """The logits [n, V] of some tokens under a model, to `out`, in fp32 at least."""
        rows, valid = self.models[name], self.shard.valid
        if isinstance(rows, Tensor):
            out.copy_(rows.detach().index_select(0, index)[:, :valid])
            return
        hidden, head = self._select(rows[0].detach(), index), rows[1].detach()[:valid]
        hidden = hidden.to(head.dtype)
        if head.dtype == out.dtype:
            torch.mm(hidden, head.T, out=out)
        elif out.is_cuda:
            torch.mm(hidden, head.T, out_dtype=out.dtype, out=out)
        else:
            # CPUs give a product in the inputs' type: rounded by its size, which for logits is most
            # of the gradient's error. So a product of what the result lies beyond a rounded guess
            # is made. The student's guess takes a product of its own; for the frozen models the
            # student's logits are one, and the difference is what counts.
            for piece in _slices(valid):
                if name == "student":
                    guess = torch.mm(hidden, head[piece].T)
                else:
                    guess = student[:, piece].to(head.dtype)
                if not _complete(out[:, piece], guess, hidden, head[piece]):  # no good guess
                    _complete(out[:, piece], out[:, piece].to(head.dtype), hidden, head[piece])

    def _select(self, hidden: Tensor, index: Tensor) -> Tensor:
        return hidden if len(index) == len(hidden) else hidden.index_select(0, index)

    # -- backward, in the forward pass -------------------------------------------------------------

    def add_gradient(self, chunk: Chunk) -> None:
        """Adds the gradient [n, V] that a chunk's student buffer holds to what it came from."""
        student = self.models["student"]
        if isinstance(student, Tensor):
            rows = chunk.student.to(student.dtype)
            self.logits_grad[:, : self.shard.valid].index_copy_(0, chunk.index, rows)
            return
        hidden, head = student[0].detach(), student[1].detach()
        states = self._select(hidden, chunk.index).to(head.dtype)
        if chunk.narrow is not None:
            self._add_narrow(chunk.narrow, states, chunk.index)
            return
        grad = chunk.student
        # In the head's own type at once; else a slice of the vocabulary at a time, so that what is
        # converted stays small and its sums are fp32.
        whole = head.dtype == grad.dtype
        product = None
        for piece in [slice(0, self.shard.valid)] if whole else _slices(self.shard.valid):
            part = grad[:, piece].to(head.dtype)
            if self.hidden_grad is not None:
                more = product_in(grad.dtype, part, head[piece])
                product = more if product is None else product.add_(more)
            if student[1].requires_grad and whole and self._head_sum.dtype == part.dtype:
                self._head_sum[piece].addmm_(part.T, states)
            elif student[1].requires_grad:
                self._head_sum[piece] += product_in(self._head_sum.dtype, part.T, states)
        if self.hidden_grad is not None and product is not None:
            self.hidden_grad.index_copy_(0, chunk.index, product.to(hidden.dtype))

    def _add_narrow(self, grad: Tensor, states: Tensor, index: Tensor) -> None:
        """The same of a gradient in the head's type already: two products of full size."""
        student = self.models["student"]
        hidden, head = student[0].detach(), student[1].detach()[: self.shard.valid]
        if self.hidden_grad is not None:
            product = product_in(self.shard.dtype, grad, head)
            self.hidden_grad.index_copy_(0, index, product.to(hidden.dtype))
        if student[1].requires_grad:
            add_product(self._head_sum[: self.shard.valid], grad.T, states)

    def finished_head_grad(self) -> Tensor | None:
        """The head's gradient in its own type; None where it is in `main_grad` or not wanted."""
        student = self.models["student"]
        if isinstance(student, Tensor) or not student[1].requires_grad or self.in_main_grad:
            return None
        return self._head_sum.to(student[1].dtype)


def _complete(out: Tensor, guess: Tensor, hidden: Tensor, head: Tensor) -> bool:
    """Puts hidden head^T to `out`: the guess and the product of what lies beyond it.

    False where that is no smaller than the result: its rounding is no smaller either.
    """
    out.copy_(guess)
    beyond = guess.addmm_(hidden, head.T, beta=-1.0)
    out += beyond
    return _largest(beyond) <= _largest(out)


def _largest(values: Tensor) -> float:
    """The largest absolute value; 0 of nothing."""
    low, high = torch.aminmax(values) if values.numel() else (values.new_zeros(()),) * 2
    return max(-float(low), float(high))


def _slices(rows: int) -> list[slice]:
    return [slice(i, min(i + HEAD_ROWS, rows)) for i in range(0, rows, HEAD_ROWS)]


def product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a b in `dtype`, which GPUs can give for inputs of half precision."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, where GPUs can do so in one product whose inputs are of half precision."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif total.is_cuda and total.dtype == torch.float32:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += product_in(total.dtype, a, b)
