"""Teacher and reference: GPTs on the student's ranks, without gradient, optimizer or DDP buffers.

A frozen model scores a step's micro-batches before the student's schedule. What it hands over is
small: for `sampled` one log-probability a token; for `full_vocab` its final hidden states, kept as
sequence shards, and the LM-head rows that face the student's; never logits. So it may have its own
width, depth and layout.

Shapes: R x L tokens of a micro-batch, T = R * L; D hidden; V vocabulary rows of a rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_sgopd.config.layout import padded_vocab_size
from megatron_sgopd.distributed.groups import Groups
from megatron_sgopd.model.gpt import ShardedModel
from megatron_sgopd.training.forward import forward
from megatron_sgopd.training.hidden_states import HiddenStates, StoredStates
from megatron_sgopd.training.objective import Objective
from megatron_sgopd.training.offload import Offloader
from megatron_sgopd.training.packing import MicroBatch, context_columns
from megatron_sgopd.vocab_parallel import Rows, sampled_logprobs

BLOCK = 4  # micro-batches a copy's stages hold at once before they are handed over


@dataclass(frozen=True)
class FrozenScores:
    """Holds a micro-batch's log-probs [T], or its hidden states and head rows, for the loss."""

    logprobs: Tensor | None = None
    states: StoredStates | None = None
    head: Tensor | None = None

    def take(self, *, last: bool = True) -> Rows:
        """The rows as the loss takes them; hidden states are gone after the last time."""
        if self.logprobs is not None:
            return self.logprobs
        assert self.states is not None and self.head is not None, "full_vocab hands over both"
        return (self.states.take() if last else self.states.look()), self.head


@dataclass(frozen=True)
class Frozen:
    """A frozen model that holds its weights, and the student's layout it scores for."""

    model: ShardedModel
    student: Groups
    offload: bool = False
    hidden_states_budget: float | None = None  # bytes on the device; None: no limit

    def score(
        self, batches: Sequence[MicroBatch], objective: Objective
    ) -> list[FrozenScores | None]:
        """Scores each whole micro-batch; None but on the student's last stage.

        Collective over the replica.
        """
        store = HiddenStates(self.student.tp_group, self.student.device, self.hidden_states_budget)
        with self.on_device():
            if self.model.groups is self.student:
                return self._score_beside_the_student(batches, objective, store)
            return self._score_apart(batches, objective, store)

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """Brings the weights to the device inside, where they are offloaded."""
        if not self.offload:
            yield
            return
        with self._offloader.on_device(self._offloaded):
            yield

    def offload_weights(self) -> None:
        """Takes the weights off the device until they are needed, if the recipe says so."""
        if self.offload:
            self._offloader.offload(self._offloaded)

    @cached_property
    def _offloader(self) -> Offloader:
        return Offloader(self.student.device)

    @cached_property
    def _offloaded(self) -> list[Tensor]:
        """All weights but the LM head, which the student's loss projects with."""
        kept = set()
        if self.model.groups is self.student and self.student.is_last_stage:
            kept.add(self.model.last_chunk.lm_head_weight())
        return [p for p in self.model.parameters() if p not in kept]

    def _score_beside_the_student(
        self, batches: Sequence[MicroBatch], objective: Objective, store: HiddenStates
    ) -> list[FrozenScores | None]:
        """Scores in the student's own layout: each rank scores its part, and keeps it."""
        groups = self.student
        parts = [b.context_shard(groups.cp_rank, groups.cp_size) for b in batches]

        def score_part(part: MicroBatch, hidden: Tensor) -> FrozenScores:
            stored = store.put(hidden, part.shape[1])
            return self._scores(part, stored, objective)

        outputs: Sequence[FrozenScores | None] = run_forward(self.model, parts, score_part)
        return list(outputs) if groups.is_last_stage else [None] * len(batches)

    def _scores(self, part: MicroBatch, stored: StoredStates, objective: Objective) -> FrozenScores:
        if objective.estimator == "full_vocab":
            return FrozenScores(states=stored, head=self.student_head)
        return FrozenScores(logprobs=self._logprobs(part, stored.take(), objective))

    def _logprobs(self, part: MicroBatch, hidden: Tensor, objective: Objective) -> Tensor:
        """Log-probs [T] of the targets, 0 where masked; one collective of the model's TP."""
        return sampled_logprobs(
            (hidden, self.model.last_chunk.lm_head_weight().detach()),
            tokens=part.targets.flatten(),
            mask=part.loss_mask.flatten(),
            group=self.model.groups.tp_group,
            vocab_size=self.model.shared_vocab_size,
            temperature=objective.temperature,
            chunk_tokens=objective.chunk_tokens,
        )

    def _score_apart(
        self, batches: Sequence[MicroBatch], objective: Objective, store: HiddenStates
    ) -> list[FrozenScores | None]:
        """Scores in a layout of its own: copies share the micro-batches, then broadcast scores."""
        own = self.model.groups
        if objective.estimator == "full_vocab":
            _ = self.student_head  # collective: all ranks at once
        scores: list[FrozenScores | None] = []
        for start in range(0, len(batches), block := BLOCK * own.num_copies):
            some = batches[start : start + block]
            kept = HiddenStates(own.tp_group, own.device, None)

            def whole(
                part: MicroBatch, hidden: Tensor, kept: HiddenStates = kept
            ) -> Tensor:  # what the student gets of a micro-batch
                states = kept.put(hidden, part.shape[1]).take()
                if objective.estimator == "full_vocab":
                    return states
                return self._logprobs(part, states, objective)

            outputs = run_forward(self.model, some[own.copy :: own.num_copies], whole)
            for i, batch in enumerate(some):
                rows = outputs[i // own.num_copies] if self._broadcasts(i) else None
                scores.append(self._broadcast_scores(batch, rows, i, objective, store))
        return scores

    def _broadcasts(self, index: int) -> bool:
        """Tells whether this rank broadcasts the scores of a block's micro-batch."""
        groups = self.model.groups
        return groups.counts_tokens and index % groups.num_copies == groups.copy

    def _broadcast_scores(
        self,
        batch: MicroBatch,
        scored: Tensor | None,
        index: int,
        objective: Objective,
        store: HiddenStates,
    ) -> FrozenScores | None:
        """Broadcasts one micro-batch's rows over the replica; its last stage keeps its part."""
        student, (rows, length) = self.student, batch.shape
        source = self._sources[index % self.model.groups.num_copies]
        full = objective.estimator == "full_vocab"
        if scored is None:
            width = (self.model.hf_config.hidden_size,) if full else ()
            dtype = self.model.dtype if full else torch.float32
            scored = torch.empty((rows * length, *width), dtype=dtype, device=student.device)
        scored = scored.contiguous()
        dist.broadcast(scored, src=source, group=student.replica_group)
        if not student.is_last_stage:
            return None
        if student.cp_size > 1:
            columns = context_columns(length, batch.cu_seqlens, student.cp_rank, student.cp_size)
            scored = scored.unflatten(0, (rows, length))[:, columns.to(scored.device)].flatten(0, 1)
        if not full:
            return FrozenScores(logprobs=scored)
        states = scored.unflatten(0, (rows, -1)).transpose(0, 1)  # [L, R, D]
        return FrozenScores(states=store.put(states, states.shape[0]), head=self.student_head)

    @cached_property
    def _sources(self) -> list[int]:
        """The global rank that speaks for each copy, by the copy's number."""
        groups = self.model.groups
        place = (groups.copy, dist.get_rank()) if groups.counts_tokens else None
        places: list[tuple[int, int] | None] = [None] * self.student.replica_group.size()
        dist.all_gather_object(places, place, group=self.student.replica_group)
        return [rank for _, rank in sorted(p for p in places if p is not None)]

    @cached_property
    def student_head(self) -> Tensor:
        """The LM-head rows [V, D] this rank's loss needs: as many as the student's, zero-padded.

        Under the student's tensor parallelism they are the model's own; otherwise they are brought
        together from its first copy, one shard at a time. Collective over the replica then.
        """
        own, student = self.model.groups, self.student
        if own is student:
            return self.model.last_chunk.lm_head_weight().detach()
        place = None
        if own.is_last_stage and own.copy == 0:
            place = (own.tp_rank, dist.get_rank())
        places: list[tuple[int, int] | None] = [None] * student.replica_group.size()
        dist.all_gather_object(places, place, group=student.replica_group)
        each = _padded_rows(self.model, student)
        first = student.tp_rank * each
        head = torch.zeros(
            each, self.model.hf_config.hidden_size, dtype=self.model.dtype, device=student.device
        )
        for shard, source in sorted(p for p in places if p is not None):
            shard_rows = self._head_shard(source, student)
            begin = shard * shard_rows.shape[0]
            low, high = max(first, begin), min(first + each, begin + shard_rows.shape[0])
            if low < high:
                head[low - first : high - first] = shard_rows[low - begin : high - begin]
        return head

    def _head_shard(self, source: int, student: Groups) -> Tensor:
        """One tensor parallel rank's rows of the model's head, on all ranks of the replica."""
        own = self.model.groups
        rows = _padded_rows(self.model, own)
        if dist.get_rank() == source:
            shard = self.model.last_chunk.lm_head_weight().detach().contiguous()
        else:
            shard = torch.empty(
                rows, self.model.hf_config.hidden_size, dtype=self.model.dtype, device=own.device
            )
        dist.broadcast(shard, src=source, group=student.replica_group)
        return shard


def _padded_rows(model: ShardedModel, groups: Groups) -> int:
    """Vocabulary rows of one tensor parallel rank under the groups' layout, padding included."""
    divisible_by, size = groups.config.make_vocab_size_divisible_by, groups.tp_size
    return padded_vocab_size(model.true_vocab_size, divisible_by, size) // size


@torch.no_grad()
def run_forward(
    model: ShardedModel,
    parts: Sequence[MicroBatch],
    use: Callable[[MicroBatch, Tensor], Any],
) -> list[Any]:
    """Runs this rank's parts of the micro-batches through the stages, forward only.

    `use(part, hidden states)` is called on the last stage, where its answers come back in order;
    elsewhere the list is empty.
    """
    if not parts:
        return []
    groups = model.groups
    was_training = [chunk.training for chunk in model.chunks]

    def step(data: Iterator[MicroBatch], chunk: torch.nn.Module):  # type: ignore[no-untyped-def]
        part = next(data)
        return forward(chunk, part), lambda hidden, non_loss_data: use(part, hidden)

    for chunk in model.chunks:
        chunk.eval()
    schedule = get_forward_backward_func(
        groups.pp_size, groups.config.virtual_pipeline_model_parallel_size
    )
    with model.last_chunk.returning_hidden_states():
        outputs = schedule(
            forward_step_func=step,
            data_iterator=[iter(parts) for _ in model.chunks],
            model=list(model.chunks),
            num_microbatches=len(parts),
            seq_length=parts[0].shape[1],  # stages tell each other the real shapes
            micro_batch_size=parts[0].shape[0],
            forward_only=True,
            collect_non_loss_data=True,
            p2p_communicator=P2PCommunicator(groups.pp_group, model.chunks[0].config)
            if groups.pp_size > 1
            else None,
            pg_collection=groups.collection,
        )
    for chunk, training in zip(model.chunks, was_training, strict=True):
        chunk.train(training)
    return list(outputs)
