"""A divergence over the teacher's k likeliest tokens and one outcome for all others.

k + 1 outcomes with proper probabilities P (student) and Q (teacher), so that no divergence is ever
negative. The tail's mass is summed and never 1 - the others' sum, which rounds below 0. With a_o =
dD / dP_o, outcome o moves by m_o = P_o (a_o - sum P a): its own column's gradient where it is one
token, and shared out in proportion to p_v over the columns of the tail.

Each rank sends its k best teacher logits with their ids and the student's logits there, and the
softmax of what is left; merged, the k best of all ranks are taken (ties by the lower id, alike on
every rank) and the rest joins the tail. One collective of 3 k + 6 numbers a token.

Shapes: n tokens, k outcomes beside the tail, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.blocks import Chunk, destination, load
from megatron_sgopd.vocab_parallel.objective import Coefficients, Found, Objective, part
from megatron_sgopd.vocab_parallel.softmax import Columns, Layout, Merged, Softmax

REVERSE, FORWARD = 1.0, 0.0  # values of beta that are special cases


@dataclass(frozen=True)
class Outcomes:
    """The k + 1 outcomes of each token, float64."""

    ids: Tensor  # [n, k] vocabulary ids of the teacher's best
    student: Tensor  # [n, k + 1] log P
    teacher: Tensor  # [n, k + 1] log Q
    log_tail: Tensor  # [n], log of the sum of exp(x / temperature) over the student's tail


class TopK(Objective):
    """Reverse KL, forward KL or JSD over the teacher's top k and a tail."""

    name = "divergence over the teacher's top k"
    num_buffers = 2
    k: int
    beta: float  # 1: reverse KL, 0: forward KL, between: JSD

    def block_statistics(self, chunk: Chunk, block: slice, columns: Columns) -> None:
        raise AssertionError("its columns are not one per softmax: see statistics")

    def no_columns(self) -> Tensor:
        return self.shard.active.new_empty(6 + 3 * self.k, 0, dtype=self.shard.dtype)

    def columns(self, storage: Tensor) -> Columns:
        return Columns(storage, Layout(teacher=True, entropy=False))

    def statistics(self, chunk: Chunk) -> Columns:
        """Columns: 6 of tails and sampled tokens, then k teacher logits, ids, student logits."""
        n, device = len(chunk), chunk.owned.device
        storage = torch.empty(6 + 3 * self.k, n, dtype=self.shard.dtype, device=device)
        columns = self.columns(storage)
        assert chunk.teacher is not None and columns.teacher is not None
        for softmax, matrix in (
            (columns.student, chunk.student),
            (columns.teacher, chunk.teacher),
        ):
            assert softmax.token is not None
            softmax.token.copy_(chunk.tokens_of(matrix))
        best = storage[6:].unflatten(0, (3, self.k))
        scratch = self.scratch(chunk)
        for block in scratch.blocks(n):
            x, t = scratch.buffers(block.stop - block.start)
            rows = chunk.rows(block)
            x = x.copy_(load(chunk.student, rows, x))
            t = t.copy_(load(chunk.teacher, rows, t))
            values, ids = _best(t, self.k)
            width = values.shape[-1]
            best[0, :width, block] = values.T
            best[1, :width, block] = (ids + self.shard.first).to(storage.dtype).T
            best[2, :width, block] = x.gather(-1, ids).T
            best[0, width:, block] = -torch.inf  # a shard of fewer rows than k
            best[1, width:, block] = -1.0
            best[2, width:, block] = -torch.inf
            for softmax, matrix in ((columns.student, x), (columns.teacher, t)):
                matrix.scatter_(-1, ids, -torch.inf)
                _softmax(matrix, softmax, block, self.temperature)
        return columns

    def merge(self, chunk: Chunk, shards: Columns, with_loss: bool = True) -> Found:
        tau = self.temperature
        best = shards.storage[:, 6:].unflatten(1, (3, self.k)).movedim(-1, 0)  # [n, W, 3, k]
        t, ids, x = best.transpose(1, 2).flatten(2).unbind(1)  # [n, W k]
        order = torch.argsort(ids, dim=-1, stable=True)
        t, ids, x = (v.gather(-1, order) for v in (t, ids, x))
        order = torch.argsort(t, dim=-1, descending=True, stable=True)  # ties: the lower id
        t, ids, x = (v.gather(-1, order) for v in (t, ids, x))
        log_tails, log_totals = [], []
        assert shards.teacher is not None
        for candidates, tail in ((x, shards.student), (t, shards.teacher)):
            pieces = [candidates[:, self.k :] / tau, (tail.maximum / tau + tail.total.log()).T]
            log_tails.append(torch.cat(pieces, -1).logsumexp(-1))
            log_totals.append(
                torch.logaddexp(log_tails[-1], (candidates[:, : self.k] / tau).logsumexp(-1))
            )
        logs = [
            torch.cat([v[:, : self.k] / tau, tail[:, None]], -1) - total[:, None]
            for v, tail, total in zip((x, t), log_tails, log_totals, strict=True)
        ]
        self.outcomes = Outcomes(ids[:, : self.k].long(), logs[0], logs[1], log_tails[0])
        totals = torch.stack(log_totals)
        tokens = [s.token.amax(0) for s in (shards.student, shards.teacher) if s.token is not None]
        softmax = Softmax(totals * tau, torch.ones_like(totals), torch.stack(tokens))
        models = Merged(softmax, torch.zeros_like(totals), None, None)
        student, teacher = models.logprobs(tau).unbind(0)
        return Found(self.layout, models, student, teacher, None)

    def divergence(self, chunk: Chunk, local: Columns, found: Found, c: Coefficients) -> Tensor:
        return self._value_and_moves()[0]

    def _value_and_moves(self) -> tuple[Tensor, Tensor]:
        """D [n] and its derivative with respect to the outcomes' logits, m, [n, k + 1].

        m of the forward KL is P - Q: formed as P times a slope of Q / P it would be lost where P is
        small. What rounding leaves of a divergence below 0 is 0.
        """
        log_p, log_q = self.outcomes.student, self.outcomes.teacher
        p, q = log_p.exp(), log_q.exp()

        def expected(weights: Tensor, log_ratio: Tensor) -> Tensor:
            return (weights * log_ratio).masked_fill(weights == 0, 0.0).sum(-1)

        if self.beta == FORWARD:
            return expected(q, log_q - log_p).clamp(min=0.0), p - q
        if self.beta == REVERSE:
            slope = log_p - log_q
            value = expected(p, slope)
        else:
            d = (log_q - log_p).nan_to_num(0.0).clamp(-700.0, 700.0)
            mixture = torch.log1p(self.beta * torch.expm1(d))  # log m - log p
            slope = -(1.0 - self.beta) * mixture
            value = self.beta * expected(q, d - mixture) + expected(p, slope)
        slope = slope.masked_fill(p == 0, 0.0)
        return value.clamp(min=0.0), p * (slope - (p * slope).sum(-1, keepdim=True))

    def gradient(
        self, chunk: Chunk, local: Columns, found: Found, c: Coefficients, divergence: Tensor
    ) -> None:
        dtype, tau = self.shard.dtype, self.temperature
        weight, additive = c.per_logit(tau)
        moves = weight[:, None] * self._value_and_moves()[1]
        moves = torch.where(weight[:, None] == 0, 0.0, moves)  # of an infinite divergence
        if additive is not None:
            moves = moves + additive[:, None] * self.outcomes.student.exp()
        # A column of the tail has exp((x - centre) / tau) of the tail's move; what the centre loses
        # in fp32 goes into the factor. A student without a tail has no column that moves with it.
        log_tail = self.outcomes.log_tail
        exact = (log_tail * tau).masked_fill(log_tail == -torch.inf, 0.0)
        centre = exact.to(dtype)[:, None]
        of_tail = moves[:, -1] * ((centre[:, 0].double() - exact) / tau).exp()
        of_tail = of_tail.to(dtype)[:, None]
        at_best = moves[:, :-1].to(dtype)
        columns = self.outcomes.ids - self.shard.first
        own = (columns >= 0) & (columns < self.shard.valid) & (self.outcomes.ids >= 0)
        scratch = self.scratch(chunk)
        for block in scratch.blocks(len(chunk)):
            x, _ = scratch.buffers(block.stop - block.start)
            rows = chunk.rows(block)
            if self.shard.valid == 0:
                continue
            x = torch.sub(load(chunk.student, rows, x), centre[block], out=x)
            # Above the centre are the best alone, which are set below.
            x.clamp_(max=0.0).mul_(1.0 / tau).exp_().mul_(of_tail[block])
            out = destination(chunk.student, rows, x)
            row, best = own[block].nonzero(as_tuple=True)
            x[row, columns[block][row, best]] = at_best[block][row, best]
            out.copy_(x)
            self.finish(chunk, block, out, part(additive, block))


def _best(t: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of each row and their columns; at the k-th value the lower columns count."""
    k = min(k, t.shape[-1])
    values, ids = t.topk(k, -1)
    if k == 0 or k == t.shape[-1]:
        return values, ids
    smallest = values[:, -1:]
    tied = (t == smallest).sum(-1, keepdim=True) > (values == smallest).sum(-1, keepdim=True)
    if bool(tied.any()):
        order = torch.argsort(t, dim=-1, descending=True, stable=True)[:, :k]
        values, ids = t.gather(-1, order), order
    return values, ids


def _softmax(x: Tensor, softmax: Softmax, block: slice, temperature: float) -> None:
    if x.shape[-1] == 0:
        softmax.maximum[block] = -torch.inf
        softmax.total[block] = 0.0
        return
    maximum = x.amax(-1)
    centred = x.sub_(maximum.masked_fill(maximum == -torch.inf, 0.0)[:, None])
    softmax.maximum[block] = maximum
    softmax.total[block] = centred.div_(temperature).exp_().sum(-1)
