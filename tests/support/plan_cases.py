"""What a real tiny student, teacher and reference take on CPU, measured, for the planner's tests.

Live bytes are those of the tensors' storages; peaks are the CPU allocator's own events, recorded by
torch's profiler, so that temporaries inside an operator count too.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from megatron_sgopd.config.schema import (
    Config,
    DistillConfig,
    FrozenConfig,
    GateConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PhasesConfig,
    RolloutConfig,
    StudentConfig,
)
from megatron_sgopd.distributed.groups import Groups, inner_groups
from megatron_sgopd.model.gpt import build_model
from megatron_sgopd.model.hf_location import read_hf_config
from megatron_sgopd.training.forward import forward
from megatron_sgopd.training.frozen import Frozen
from megatron_sgopd.training.objective import Objective
from megatron_sgopd.training.step import accumulate_gradients, prepare
from megatron_sgopd.training.student import Student, make_student
from megatron_sgopd.types import Completion, Prompt, Rollout
from tests.support.layouts import layout

PROMPT = 8


@dataclass(frozen=True)
class PlanCase:
    """A recipe small enough to run; every rollout is as long as it may be."""

    student: str
    teacher: str
    parallel: tuple[tuple[str, Any], ...] = ()  # fields of ParallelConfig
    frozen: tuple[tuple[str, Any], ...] = ()  # of the teacher's and the reference's config
    estimator: str = "sampled"
    dtype: str = "bfloat16"
    new_tokens: int = 88
    num_prompts: int = 2
    chunk_tokens: int | None = 32  # several chunks a micro-batch
    offload_optimizer: bool = False

    def config(self) -> Config:
        return Config(
            name="plan",
            model=ModelConfig(
                student=StudentConfig(hf_path=self.student),
                teacher=FrozenConfig(hf_path=self.teacher, **dict(self.frozen)),
                reference=FrozenConfig(**dict(self.frozen)),
                dtype=self.dtype,  # type: ignore[arg-type]
            ),
            parallel=ParallelConfig(**{"make_vocab_size_divisible_by": 8, **dict(self.parallel)}),
            distill=DistillConfig(
                estimator=self.estimator,  # type: ignore[arg-type]
                chunk_tokens=self.chunk_tokens,
                gate=GateConfig(eps=0.0),
                phases=PhasesConfig(enabled=False),
            ),
            rollout=RolloutConfig(
                num_prompts=self.num_prompts,
                n=2,
                max_prompt_tokens=PROMPT,
                max_new_tokens=self.new_tokens,
            ),
            optimizer=OptimizerConfig(offload=self.offload_optimizer),
        )


def peak_of(function: Callable[[], Any]) -> tuple[int, Any]:
    """(most bytes allocated at once beyond those before, the function's value)."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        value = function()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(events) > 10, "the profiler saw the allocator"
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak, value


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Of the different storages behind the tensors."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def rollouts_of(case: PlanCase, groups: Groups, vocab: int) -> list[Rollout]:
    """This replica's: one token longer than the longest, since inputs are one shorter."""
    rng = random.Random(groups.dp_rank)
    rollouts = []
    for i in range(2 * case.num_prompts // groups.dp_size):
        answer = tuple(rng.randrange(vocab) for _ in range(case.new_tokens + 1))
        prompt = tuple(rng.randrange(vocab) for _ in range(PROMPT))
        completion = Completion(answer, (-3.0,) * len(answer), "stop", 0, i)
        rollouts.append(Rollout(Prompt("p", prompt, "1"), completion, "student", True, 1.0))
    return rollouts


@contextmanager
def groups_of(case: PlanCase) -> Iterator[Groups]:
    fields = {"make_vocab_size_divisible_by": 8, **dict(case.parallel)}
    with layout(tp=fields.pop("tensor_model_parallel_size", 1), **fields) as groups:
        yield groups


def make_parts(case: PlanCase, groups: Groups) -> tuple[Student, dict[str, Frozen]]:
    """The student under Megatron's buffers and optimizer, and the frozen models."""
    config, dtype = case.config(), getattr(torch, case.dtype)
    teacher = config.model.teacher
    own = inner_groups(
        groups, teacher.tensor_model_parallel_size, teacher.pipeline_model_parallel_size
    )
    hf = {role: read_hf_config(Path(getattr(case, role))) for role in ("student", "teacher")}
    student = make_student(
        build_model(hf["student"], groups, dtype=dtype, trainable=True),
        config.optimizer,
        config.num_steps,
    )
    budget = config.parallel.hidden_states_budget_mb
    limit = None if budget is None else budget * 2**20
    frozen = {
        role: Frozen(build_model(sizes, own, dtype=dtype, trainable=False), groups, False, limit)
        for role, sizes in (("teacher", hf["teacher"]), ("reference", hf["student"]))
    }
    return student, frozen


def objective_of(config: Config) -> Objective:
    return Objective.from_config(config.distill, replace(config.rollout, tis="token"), 0.0)


def live_bytes(case: PlanCase) -> dict[str, int]:
    """What this rank's models and optimizer hold after an update (on gradients of zero)."""
    with groups_of(case) as groups:
        student, frozen = make_parts(case, groups)
        student.zero_grad()
        student.update()
        ddp = [buffer for chunk in student.ddp for buffer in chunk.buffers]
        return {
            "stage": groups.pp_rank,
            "parameters": sum(p.numel() for p in student.model.parameters()),
            "weights": storage_bytes(student.model.parameters()),
            "gradients": storage_bytes(buffer.grad_data for buffer in ddp),
            "optimizer": sum(t.nbytes for t in student._optimizer_tensors() if t.numel() > 1),
            **{role: storage_bytes(f.model.parameters()) for role, f in frozen.items()},
        }


def peaks(case: PlanCase) -> dict[str, int]:
    """Of this rank's scoring and training; loss and schedule are the trainer's own."""
    config = case.config()
    with groups_of(case) as groups:
        student, frozen = make_parts(case, groups)
        objective = objective_of(config)
        rollouts = rollouts_of(case, groups, student.model.true_vocab_size)

        def score() -> Any:
            return prepare(*frozen.values(), rollouts, objective, config.distill, groups)

        prepared = score()  # what is made once: Megatron's buffers, rotary tables
        accumulate_gradients(student, prepared.work, objective)
        score_peak, prepared = peak_of(score)
        train_peak, _ = peak_of(lambda: accumulate_gradients(student, prepared.work, objective))
        return {"score": score_peak, "train": train_peak}


def saved_bytes(case: PlanCase) -> int:
    """What one forward pass of a micro-batch keeps for backward on this rank, weights aside."""
    config = case.config()
    with groups_of(case) as groups:
        hf = read_hf_config(Path(case.student))
        model = build_model(hf, groups, dtype=getattr(torch, case.dtype), trainable=True)
        rollouts = rollouts_of(case, groups, hf.vocab_size)
        work = prepare(None, None, rollouts, objective_of(config), config.distill, groups).work
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if (place := tensor.untyped_storage().data_ptr()) not in weights:
                kept[place] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = forward(model.last_chunk, work[0].part)
        assert logits.requires_grad
        return storage_bytes(kept.values())


def build_refusal(case: PlanCase) -> str | None:
    """What building the student says; None where it is built."""
    with groups_of(case) as groups:
        try:
            make_parts(case, groups)
        except ValueError as error:
            return str(error)
    return None
