"""Defines an objective: two passes over rows with the method's coefficients between them.

*Statistics*: each rank reduces its shard of every row to a few columns, one all-gather brings them
together, every rank merges them alike. *Gradient*: each rank writes the gradient of its own logits.
An objective is one file: which columns, how they merge into a divergence, and the two passes.

Shapes: n tokens of a chunk, b rows of a block, V valid vocabulary rows of this rank, W ranks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel import backend as back_ends
from megatron_sgopd.vocab_parallel.blocks import (
    Chunk,
    Place,
    Scratch,
    centre,
    destination,
    exponent,
    exponentials,
    load,
    recentre,
    store,
    weighted_sum,
)
from megatron_sgopd.vocab_parallel.shard import Shard
from megatron_sgopd.vocab_parallel.softmax import (
    Columns,
    Layout,
    Merged,
    Softmax,
    mean,
    merge,
    over,
)

Lambda = float | Tensor  # a number, or one per token [T]


def nonzero(values: Tensor) -> Tensor | None:
    """The values, or None where all are 0; on GPUs looking would cost a wait."""
    return values if values.is_cuda or bool(values.any()) else None


def part(values: Tensor | None, block: slice) -> Tensor | None:
    """A block's part of values that may not be there."""
    return None if values is None else values[block]


def is_one(lam: Lambda) -> bool:
    return not isinstance(lam, Tensor) and lam == 1.0


@dataclass(frozen=True)
class Coefficients:
    """Coefficients of a chunk's tokens, float64 [n] each."""

    weight: Tensor
    lam: Tensor
    is_last: Tensor | None  # bool: whose lambda is the last of `lambdas`; None where there is one
    additive: Tensor
    scale: Tensor | None  # None: 1

    def per_logit(self, temperature: float) -> tuple[Tensor, Tensor | None]:
        """(weight, additive) of the gradient with respect to the raw logits; None where all 0."""
        weight, additive = self.weight, nonzero(self.additive)
        if self.scale is not None or temperature != 1.0:
            scale = 1.0 / temperature if self.scale is None else over(self.scale, temperature)
            weight = weight * scale
            additive = None if additive is None else additive * scale
        return weight, additive

    @classmethod
    def joined(cls, parts: Sequence[Coefficients]) -> Coefficients:
        """Join the coefficients of blocks to those of all tokens."""

        def join(values: Sequence[Tensor | None]) -> Tensor | None:
            there = [v for v in values if v is not None]
            return torch.cat(there) if there else None

        return cls(
            torch.cat([p.weight for p in parts]),
            torch.cat([p.lam for p in parts]),
            join([p.is_last for p in parts]),
            torch.cat([p.additive for p in parts]),
            join([p.scale for p in parts]),
        )

    def part(self, tokens: slice) -> Coefficients:
        """Select the coefficients of some of the tokens."""
        return Coefficients(
            self.weight[tokens],
            self.lam[tokens],
            part(self.is_last, tokens),
            self.additive[tokens],
            part(self.scale, tokens),
        )


@dataclass
class Found:
    """Merged statistics of a chunk's tokens, float64 [n] each."""

    layout: Layout
    models: Merged  # of student, teacher and reference, as far as they came as rows, [M, n]
    student_logprobs: Tensor
    teacher_logprobs: Tensor | None
    reference_logprobs: Tensor | None
    # What an objective adds:
    entropy: Tensor | None = None
    expected: Tensor | None = None  # [k, n], of quantities under the student
    targets: tuple[Merged, ...] = ()  # softmaxes of the extrapolated teachers
    divergences: tuple[Tensor, ...] = ()  # one for each of `lambdas`, where one pass gives them

    @cached_property
    def student_total(self) -> Tensor:
        return self.models.softmax.total[0]

    @cached_property
    def student(self) -> Merged:
        return self.models[0]

    @cached_property
    def teacher(self) -> Merged | None:
        return self.models[1] if self.layout.teacher else None

    @cached_property
    def reference(self) -> Merged | None:
        return self.models[self.layout.num_models - 1] if self.layout.reference else None


@dataclass(frozen=True)
class Constants:
    """The parts of each token's gradient e (slope d + bias), less `additive` at the sampled token.

    d is what an objective makes of a row, with `less` times a second row where that is wanted.
    """

    slope: Tensor  # [b, 1], as the next two
    bias: Tensor | None
    less: Tensor | None  # 1 - lambda; None where every lambda is 1
    additive: Tensor | None  # [b]; None where all are 0

    def part(self, block: slice) -> Constants:
        values = (part(v, block) for v in (self.bias, self.less, self.additive))
        return Constants(self.slope[block], *values)


class Objective(ABC):
    """A divergence with its passes in plain PyTorch; a subclass says which columns it needs."""

    name: str
    num_buffers: int  # scratch blocks that its passes use at once
    scratch_share = 1.0  # of what an objective's buffers may take
    one_pass = False  # whether blocks can go through both passes at once (`block_gradient`)
    triton_sums: str | None = None  # which sums its Triton kernels make; None: it has no kernels
    keeps = False  # whether the gradient pass can use what the first left in a chunk's matrices

    def __init__(
        self,
        shard: Shard,
        layout: Layout,
        lambdas: Sequence[Lambda] = (),
        *,
        logprobs: Mapping[str, Tensor] | None = None,
        backend: str = "auto",
    ) -> None:
        """`logprobs`: {"teacher" or "reference": [T]} of models that came as log-probs."""
        back_ends.check(backend, self.name, self.triton_sums is not None)
        self.backend = backend
        self.shard, self.layout = shard, layout
        self.lambdas = tuple(lambdas)
        self.extrapolated = tuple(lam for lam in self.lambdas if not is_one(lam))
        self.logprobs = logprobs or {}
        self.temperature = shard.temperature
        self.c = exponent(shard.temperature)
        self.careful = False  # whether some logits are -inf; found by the statistics pass
        self._scratch: Scratch | None = None

    def kernels(self, student: Tensor) -> ModuleType | None:
        """`triton_kernels` where they take the passes over such logits; None: plain PyTorch."""
        return back_ends.kernels(self.backend, self.triton_sums is not None, student)

    # -- the first pass ----------------------------------------------------------------------------

    def statistics(self, chunk: Chunk) -> Columns:
        """This shard's columns of a chunk; may leave intermediate results in its scratch."""
        if (kernels := self.kernels(chunk.student)) is not None:
            self.careful = True  # they do not say whether they had to be
            return kernels.statistics(self, chunk)
        columns = self.begin(chunk)
        self._statistics(chunk, columns)
        if not self.careful and not columns.sums_are_finite():
            self.repair(chunk, columns)
        return columns

    def begin(self, chunk: Chunk) -> Columns:
        """Columns of a chunk with the sampled tokens' logits filled in."""
        columns = Columns.empty(self.layout, len(chunk), self.shard.dtype, chunk.local_token.device)
        for name in ("student", "teacher", "reference"):
            softmax: Softmax | None = getattr(columns, name)
            if softmax is not None:
                assert softmax.token is not None
                softmax.token.copy_(chunk.tokens_of(getattr(chunk, name)))
        return columns

    def statistics_of(self, chunk: Chunk, block: slice, columns: Columns) -> None:
        """The first pass of one block alone, again with care where a logit is -inf."""
        self.block_statistics(chunk, block, columns)
        if not self.careful and not columns.sums_are_finite():
            self.careful = True
            self.block_statistics(chunk, block, columns)
        self.scratch(chunk).hold(chunk, block)

    def repair(self, chunk: Chunk, columns: Columns) -> None:
        """Takes the pass again with care for logits of -inf, from here on for every chunk."""
        if not chunk.frozen_is_scratch:  # else what was read is gone, and was no finite product
            self.careful = True
            self._statistics(chunk, columns)

    def _statistics(self, chunk: Chunk, columns: Columns) -> None:
        scratch = self.scratch(chunk)
        for block in scratch.blocks(len(chunk)):
            self.block_statistics(chunk, block, columns.at(block))
            scratch.hold(chunk, block)

    @abstractmethod
    def block_statistics(self, chunk: Chunk, block: slice, columns: Columns) -> None:
        """Fills the columns of a block, which are `columns`."""

    def columns(self, storage: Tensor) -> Columns:
        """Statistics [..., C, n] by name."""
        return Columns(storage, self.layout)

    def no_columns(self) -> Tensor:
        """Statistics [C, 0] of no token."""
        shard = self.shard
        columns = Columns.empty(self.layout, 0, shard.dtype, shard.active.device)
        return columns.storage

    def merge_all(self, gathered: Tensor) -> Found:
        """Statistics of all active tokens from [W, C, N] in float64."""
        shard = self.shard
        tokens = (shard.active, shard.local_token, shard.owned)
        nothing = gathered.new_empty(0, 0)  # merging reads no logits
        chunk = Chunk(nothing, None, None, slice(0, 0), *tokens)
        return self.merge(chunk, self.columns(gathered))

    def merge(self, chunk: Chunk, shards: Columns, with_loss: bool = True) -> Found:
        """Shards [W, C, n] in float64 -> statistics over the whole vocabulary.

        Without `with_loss` only what coefficients and gradient are made of.
        """
        models = merge(shards.models, self.temperature)
        student, *others = models.logprobs(self.temperature).unbind(0)
        of_rows = iter(others)
        layout = self.layout
        teacher = next(of_rows) if layout.teacher else self._given("teacher", chunk)
        reference = next(of_rows) if layout.reference else self._given("reference", chunk)
        found = Found(layout, models, student, teacher, reference)
        self.complete(chunk, shards, found)
        if with_loss:
            self.add_entropy(shards, found)
            self.add_divergences(chunk, shards, found)
        return found

    def _given(self, name: str, chunk: Chunk) -> Tensor | None:
        """The log-probs of a model that came as such."""
        given = self.logprobs.get(name)
        return None if given is None else given[chunk.index].double()

    def complete(self, chunk: Chunk, shards: Columns, found: Found) -> None:  # noqa: B027
        """Adds the objective's own statistics."""

    def add_entropy(self, shards: Columns, found: Found) -> None:
        """Adds the student's entropy, where its sum was made."""
        if shards.entropy is not None:
            student = found.student
            centred = mean(shards.entropy, shards.student, student, student.shift)
            found.entropy = student.log_total - over(centred, self.temperature)

    def add_divergences(  # noqa: B027
        self, chunk: Chunk, shards: Columns, found: Found
    ) -> None:
        """Adds one for each of `lambdas`, where a single pass gives them."""

    # -- between the passes ------------------------------------------------------------------------

    @abstractmethod
    def divergence(self, chunk: Chunk, local: Columns, found: Found, c: Coefficients) -> Tensor:
        """D of the chosen lambda, [n]. May take a pass and a collective of its own."""

    def choose(self, values: Sequence[Tensor], c: Coefficients) -> Tensor:
        """Each token's value of its lambda, [n]."""
        if c.is_last is None:
            return values[-1]
        return torch.where(c.is_last, values[-1], values[0])

    # -- the second pass ---------------------------------------------------------------------------

    @abstractmethod
    def gradient(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, divergence: Tensor
    ) -> None:
        """Writes scale * (weight dD - additive d log p(y)) over the student's rows."""

    def constants(self, found: Found, c: Coefficients) -> Constants:
        """Compute what tokens' gradients are made with; for objectives with `one_pass`."""
        raise NotImplementedError

    def block_gradient(
        self, chunk: Chunk, block: slice, columns: Columns, constants: Constants
    ) -> None:
        """Write a block's gradient from its tokens' constants; for objectives with `one_pass`."""
        raise NotImplementedError

    def finish_tokens(self, chunk: Chunk, found: Found, c: Coefficients) -> None:  # noqa: B027
        """Completes the gradient at the sampled tokens when all blocks are written."""

    def finish(self, chunk: Chunk, block: slice, out: Tensor, additive: Tensor | None) -> None:
        """Puts a block in its place, the additive term [b] subtracted at the sampled tokens."""
        if additive is not None:
            chunk.subtract_at_tokens(out, block, additive)
        store(chunk.student, chunk.rows(block), out)

    # -- what blocks have in common ----------------------------------------------------------------

    def scratch(self, chunk: Chunk) -> Scratch:
        if self._scratch is None:
            self._scratch = Scratch(
                self.num_buffers,
                self.shard.valid,
                self.shard.dtype,
                chunk.student.device,
                limit=len(chunk),  # of the first chunk, which is the longest
                share=self.scratch_share,
            )
        return self._scratch

    def student_block(
        self, chunk: Chunk, block: slice, columns: Columns, a: Tensor | None, e: Tensor
    ) -> Tensor:
        """The student's softmax: x - m to `a`, its exponentials to `e`, which it gives.

        Where the student's matrix is scratch, the exponentials replace its logits. Without `a`,
        x - m is not kept.
        """
        rows = chunk.rows(block)
        x = load(chunk.student, rows, e if a is None else a)
        if chunk.student_is_scratch:
            e = destination(chunk.student, rows, e)
        a = e if a is None else a
        exponentials(centre(x, columns.student, a), self.c, columns.student, e)
        if chunk.student_is_scratch:
            store(chunk.student, rows, e)
        return e

    def entropy_sum(self, a: Tensor, e: Tensor, columns: Columns, product: Tensor) -> None:
        """The sum of e (x - m), from which the entropy comes; `product` may be `a`."""
        if columns.entropy is not None:
            weighted_sum(a, e, columns.entropy, product, self.careful)

    def extrapolate(self, lam: Lambda, chunk: Chunk, block: slice) -> Lambda:
        """lambda - 1 of a block: a number or [b, 1]."""
        if isinstance(lam, Tensor):
            return (lam[chunk.index[block]].to(self.shard.dtype) - 1.0)[:, None]
        return lam - 1.0

    def again(self, model: Tensor, rows: Place, softmax: Softmax, out: Tensor) -> Tensor:
        """A block's logits minus the maximum that the first pass found, to `out`."""
        return recentre(load(model, rows, out), softmax, out)

    def own(self, merged: Merged) -> tuple[Tensor | float, Tensor | float]:
        """(weight, shift) of this rank's shard in a merged softmax: 1 and 0 of a single one."""
        if merged.weight is None or merged.shift is None:
            return 1.0, 0.0
        assert self.shard.group is not None
        rank = self.shard.group.rank()
        return merged.weight[rank], merged.shift[rank]
