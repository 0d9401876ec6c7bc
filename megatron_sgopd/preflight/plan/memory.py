"""Counts what each rank of a replica holds, all the time and in each phase of a step.

Every figure is in bytes. A phase's peak is what is there all the time, what the phase adds, and the
reserve (`hardware`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import lcm

from megatron_sgopd.config.layout import has_own_layout
from megatron_sgopd.preflight.plan.activations import (
    Arithmetic,
    LossChunks,
    Shape,
    chunk_bytes,
    end_bytes,
    forward_bytes,
    largest_shape,
    working_bytes,
)
from megatron_sgopd.preflight.plan.architecture import Architecture, ModelLayout
from megatron_sgopd.preflight.plan.engines import embedded_bytes, servers_on_a_trainer_gpu
from megatron_sgopd.preflight.plan.hardware import (
    CONTEXT_BYTES,
    FRAGMENTATION_SHARE,
    SLEEPING_SERVER_BYTES,
    Gpu,
)
from megatron_sgopd.preflight.plan.job import Job

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
TOKEN_BYTES = 47  # of a packing.MicroBatch: four int64, three float32, three bool a token
LOGPROB_BYTES = 4
DDP_BUCKET = 40_000_000  # Megatron's smallest bucket, where gradients overlap; elements
ADAM_MOMENTS = 2

Items = dict[str, int]


@dataclass(frozen=True)
class RankMemory:
    """`place` is the rank's number in its replica, `stage` its pipeline stage of the student."""

    stage: int
    place: int
    resident: Items
    phases: dict[str, Items]
    gpu_bytes: int
    parameters: int  # of the student, on this rank

    def total(self, phase: str) -> int:
        return sum(self.items(phase).values())

    def items(self, phase: str) -> Items:
        """Everything there is in a phase, the reserve included."""
        held = self.resident | {
            name: size + self.resident.get(name, 0) for name, size in self.phases[phase].items()
        }
        ours = sum(size for name, size in held.items() if not name.startswith("vllm"))
        return held | {
            "context": CONTEXT_BYTES,
            "fragmentation": int(FRAGMENTATION_SHARE * ours),
        }

    @cached_property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.peak_phase)


def memory_of(
    job: Job, models: dict[str, Architecture], gpu: Gpu, *, fused_norms: bool = True
) -> list[RankMemory]:
    """Every rank of a replica; replicas differ in their data alone."""
    element = ELEMENT_BYTES[job.config.model.dtype]
    estimate = _Estimate(job, models, gpu, Arithmetic(element, fused_norms))
    return [estimate.rank(place) for place in range(job.replica_ranks)]


@dataclass(frozen=True)
class _Estimate:
    job: Job
    models: dict[str, Architecture]
    gpu: Gpu
    kind: Arithmetic

    @property
    def student(self) -> Architecture:
        return self.models["student"]

    @property
    def layout(self) -> ModelLayout:
        return self.job.layout_of("student")

    @property
    def shards(self) -> int:
        """Ranks that share the distributed optimizer's state."""
        p = self.job.config.parallel
        return self.job.replicas * self.layout.cp if p.use_distributed_optimizer else 1

    @cached_property
    def shape(self) -> Shape:
        return largest_shape(self.job.config.parallel, self.job.longest)

    @cached_property
    def step_tokens(self) -> int:
        """Counts a replica's tokens, if every rollout were as long as it may be."""
        return self.job.rollouts_per_replica * self.job.longest

    @cached_property
    def micro_batches(self) -> int:
        p = self.job.config.parallel
        if p.micro_batch_tokens is not None:
            return -(-self.step_tokens // p.micro_batch_tokens)
        return -(-self.job.rollouts_per_replica // p.micro_batch_size)

    @property
    def full_vocab(self) -> bool:
        return self.job.config.distill.estimator == "full_vocab"

    def rank(self, place: int) -> RankMemory:
        stage = place // (self.layout.tp * self.layout.cp)
        resident = self._trained(stage)
        for role in self.job.roles():
            resident |= self._frozen(role, place, stage)
        servers = 0
        if self.job.config.rollout.engine == "embedded":
            resident |= self._embedded()
        else:
            servers = len(servers_on_a_trainer_gpu(self.job))
        if servers:
            resident["vllm_asleep"] = servers * SLEEPING_SERVER_BYTES
        phases = {
            "generate": self._generate(),
            **{f"score_{role}": self._score(role, place, stage) for role in self.job.roles()},
            "train": self._train(stage),
            "update": self._update(stage),
            "push_weights": self._push(),
        }
        count = self.layout.stage_parameters(self.student, stage)
        return RankMemory(stage, place, resident, phases, self.gpu.memory_bytes, count)

    # -- what is there all the time ---------------------------------------------------------------

    def _trained(self, stage: int) -> Items:
        config, b = self.job.config, self.kind.element_bytes
        buffers = [
            self._buffer_elements(tensors, stage, chunk)
            for chunk, tensors in enumerate(self.layout.stage_tensors(self.student, stage))
        ]
        optimizer = self.optimizer_bytes(stage)
        return {
            "weights": sum(buffers) * b,
            "gradients": sum(buffers) * (4 if config.parallel.grad_reduce_in_fp32 else b),
            "optimizer": 0 if config.optimizer.offload else optimizer,
        }

    def _buffer_elements(self, tensors: list[int], stage: int, chunk: int) -> int:
        """Megatron's gradient buffer of a chunk, which holds the weights too when they are shared.

        A distributed optimizer's parameters begin at multiples of 64 elements, its buckets end at
        multiples of the ranks and of 128.
        """
        p = self.job.config.parallel
        if not p.use_distributed_optimizer:
            return sum(tensors)
        bucketed = p.overlap_grad_reduce and stage == 0 and chunk == 0
        largest = max(DDP_BUCKET, 1_000_000 * self.shards) if bucketed else None
        multiple = lcm(self.shards, 128)
        end = begin = 0
        for size in reversed(tensors):
            end = -(-end // 64) * 64 + size
            if largest is not None and end - begin >= largest:
                begin = end = -(-end // multiple) * multiple
        return -(-end // multiple) * multiple

    def optimizer_bytes(self, stage: int) -> int:
        """Adam's moments, and fp32 weights where the model's are not."""
        copies = ADAM_MOMENTS + (0 if self.kind.element_bytes == 4 else 1)
        return 4 * copies * self._optimizer_elements(stage)

    def _optimizer_elements(self, stage: int) -> int:
        return -(-self.layout.stage_parameters(self.student, stage) // self.shards)

    def _frozen(self, role: str, place: int, stage: int) -> Items:
        """Weights, and the head rows that face the student's where the layouts differ."""
        b = self.kind.element_bytes
        model, frozen = self.models[role], getattr(self.job.config.model, role)
        items = {role: self._frozen_weights(role, place)}
        if frozen.offload:
            ends = not self._has_own_layout(role) and stage == self.layout.pp - 1
            items[role] = self._head_bytes(role) if ends else 0
        if self._has_own_layout(role) and self.full_vocab:
            rows = self.layout.vocab_rows(model)
            items[f"{role}_head_rows"] = rows * model.hidden * b
        return items

    def _frozen_weights(self, role: str, place: int) -> int:
        layout, stage = self.job.layout_of(role), self._frozen_stage(role, place)
        return layout.stage_parameters(self.models[role], stage) * self.kind.element_bytes

    def _frozen_stage(self, role: str, place: int) -> int:
        """The pipeline stage of a frozen model that a rank of the replica holds."""
        layout = self.job.layout_of(role)
        shared = layout.tp if self._has_own_layout(role) else layout.tp * layout.cp
        return place // shared % layout.pp

    def _head_bytes(self, role: str) -> int:
        model = self.models[role]
        return self.layout.vocab_rows(model) * model.hidden * self.kind.element_bytes

    def _has_own_layout(self, role: str) -> bool:
        own = has_own_layout(getattr(self.job.config.model, role))
        return own and self.job.layout_of(role) != self.layout

    def _embedded(self) -> Items:
        """The engine's whole model on each rank; the teacher's beside it while it is asked."""
        b = self.kind.element_bytes
        items = {"engine": self.student.num_parameters() * b}
        if self.job.asks_teacher_engine:
            items["teacher_engine"] = self.models["teacher"].num_parameters() * b
        return items

    # -- what the phases add ----------------------------------------------------------------------

    def _generate(self) -> Items:
        if self.job.config.rollout.engine == "embedded":
            return {"engine_cache": embedded_bytes(self.job, self.student, self.kind.element_bytes)}
        on_this_gpu = servers_on_a_trainer_gpu(self.job)
        asleep = len(on_this_gpu) * SLEEPING_SERVER_BYTES
        shares = sum(v.gpu_memory_utilization for v in on_this_gpu.values())
        # What a server holds asleep is part of its share.
        return {"vllm": int(shares * self.gpu.memory_bytes) - asleep} if on_this_gpu else {}

    def _score(self, role: str, place: int, stage: int) -> Items:
        """A frozen model reads the step's micro-batches; what it hands over piles up."""
        config, model = self.job.config, self.models[role]
        layout, b = self.job.layout_of(role), self.kind.element_bytes
        tokens = self.shape.tokens(layout)
        items = self._handed_over(stage) | {"batches": self._batches()}
        if getattr(config.model, role).offload:
            items[role] = self._frozen_weights(role, place) - self._frozen(role, place, stage)[role]
        forward = forward_bytes(model, layout, self.shape, self.kind)
        scored = 0
        if self._frozen_stage(role, place) == layout.pp - 1 and not self.full_vocab:
            # What the final norm gave and what is handed over to the head, beside the logits.
            states = (tokens // layout.sequence_shards + tokens) * model.hidden * b
            chunks = self._chunks(layout.vocab_rows(model), 1, 1)
            scored = states + chunks.scoring_bytes(tokens, model.hidden, b)
        return items | {"frozen_forward": max(forward, scored)}

    def _batches(self) -> int:
        whole = self.step_tokens * TOKEN_BYTES
        return whole + (whole // self.layout.cp if self.layout.cp > 1 else 0)

    def _handed_over(self, stage: int) -> Items:
        """Counts what the student's last stage keeps: log-probs, or shards of hidden states."""
        if stage != self.layout.pp - 1 or not self.job.roles():
            return {}
        tokens = -(-self.step_tokens // self.layout.cp)
        if not self.full_vocab:
            return {"logprobs": tokens * LOGPROB_BYTES * len(self.job.roles())}
        budget = self.job.config.parallel.hidden_states_budget_mb
        total = 0
        for role in self.job.roles():
            width = self.models[role].hidden * self.kind.element_bytes
            all_states = -(-tokens // self.layout.tp) * width
            total += all_states if budget is None else min(all_states, int(budget * 2**20))
        return {"hidden_states": total}

    def _train(self, stage: int) -> Items:
        config, b = self.job.config, self.kind.element_bytes
        layout, last = self.layout, stage == self.layout.pp - 1
        layers = layout.chunk_layers(self.student)[stage]
        kept = [
            chunk_bytes(self.student, layout, self.shape, self.kind, config.parallel, n)
            for n in layers
        ]
        tokens = self.shape.tokens(layout)
        sent = tokens // layout.sequence_shards * self.student.hidden * b
        saved = 0
        for chunk in in_flight(layout, stage, self.micro_batches):
            saved += kept[chunk].saved
            saved += 0 if last and chunk == layout.vpp - 1 else sent  # kept for the next stage
        work = working_bytes(self.student, layout, self.shape, b)
        work += max(self.student.layer_tensors(layout.tp)) * b + max(k.recomputed for k in kept)
        if stage == 0:  # the embedding's gradient, when its micro-batch is done
            work = max(work, layout.vocab_rows(self.student) * self.student.hidden * b)
        items = self._handed_over(stage) | {"batches": self._batches(), "activations": saved}
        if not last:
            return items | {"working": work}
        end = end_bytes(self.student, layout, self.shape, self.kind)
        items["activations"] += end
        logits = self._logits_workspace()
        # By the time a layer passes gradients on, the loss and what the end kept are gone.
        return items | {"logits": logits, "working": max(0, work - logits - end)}

    def _logits_workspace(self) -> int:
        """Counts what the loss takes: a chunk's logits, what making them and their gradient takes,
        and whole hidden states: the student's and their gradient, the frozen models'.
        """
        b, layout = self.kind.element_bytes, self.layout
        tokens, hidden = self.shape.tokens(layout), self.student.hidden
        roles = self.job.roles() if self.full_vocab else ()
        sets = 2 if layout.tp > 1 and self.job.is_token_local else 1
        chunks = self._chunks(layout.vocab_rows(self.student), 1 + len(roles), sets)
        total = chunks.training_bytes(tokens, hidden, b) + tokens * hidden * b
        # One row in one piece is read where it lies; other states are put together first.
        several = self.shape.rows > 1
        if several or layout.sequence_shards > 1:
            total += tokens * hidden * b
        spilled = self.job.config.parallel.hidden_states_budget_mb is not None
        if several or layout.tp > 1 or spilled:
            total += sum(tokens * self.models[role].hidden * b for role in roles)
        return total

    def _chunks(self, rows: int, models: int, sets: int) -> LossChunks:
        device = "cuda" if self.kind.fused_norms else "cpu"
        return LossChunks(rows, models, sets, self.job.config.distill.chunk_tokens, device)

    def _update(self, stage: int) -> Items:
        """AdamW over many tensors at once holds one more fp32 value of each; so do the gradients
        where they are not added up in fp32."""
        config = self.job.config
        elements = self._optimizer_elements(stage)
        items = self._handed_over(stage) | {
            "batches": self._batches(),
            "adam_scratch": 4 * elements,
        }
        if config.optimizer.offload:
            items["optimizer"] = self.optimizer_bytes(stage)
        if not config.parallel.grad_reduce_in_fp32 and self.kind.element_bytes != 4:
            items["fp32_gradients"] = 4 * elements
        return items

    def _push(self) -> Items:
        """A bucket and the largest gathered weight, beside an engine that is awake."""
        model = self.student
        largest = max(model.vocab, 3 * model.ffn) * model.hidden * self.kind.element_bytes
        bucket = int(self.job.config.rollout.vllm.bucket_mb * 2**20) if self.job.uses_vllm else 0
        items = {"push_buffers": largest + bucket}
        return items | (self._generate() if self.job.uses_vllm else {})


def in_flight(layout: ModelLayout, stage: int, micro_batches: int) -> Iterator[int]:
    """The chunks of the forward passes whose activations a stage holds at most, 1F1B."""
    total = micro_batches * layout.vpp
    if layout.vpp == 1:
        count = layout.pp - stage
    else:
        count = 2 * (layout.pp - stage - 1) + (layout.vpp - 1) * layout.pp + 1
    for i in range(min(count, total)):
        yield i // layout.pp % layout.vpp
