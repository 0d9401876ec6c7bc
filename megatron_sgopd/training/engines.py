"""The engines of a run: the student's, and the teacher's while phased teacher sampling asks it.

Collective over all ranks, but for what the properties say: every rank calls the same methods at the
same points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_sgopd.config.schema import Config
from megatron_sgopd.distributed.groups import Groups
from megatron_sgopd.model.hf_location import resolve_hf_dir
from megatron_sgopd.model.weight_stream import iter_hf_weights
from megatron_sgopd.rollouts.engine_jobs import make_jobs
from megatron_sgopd.rollouts.make_engine import make_engine
from megatron_sgopd.rollouts.offline_engine import TeacherPool
from megatron_sgopd.training.frozen import Frozen
from megatron_sgopd.training.student import Student
from megatron_sgopd.training.weight_sync import Guard, push_weights
from megatron_sgopd.types import Engine, Prompt


class Engines:
    """Holds the engines, the work they are asked for, and the guard of the weights they hold."""

    def __init__(
        self,
        config: Config,
        groups: Groups,
        student_engine: Engine | None,
        student: Student,
        make_teacher_engine: Callable[[], Engine],
    ) -> None:
        """`student_engine` is None for methods that sample nothing."""
        self.student = student_engine
        self.teacher: Engine | None = None
        self.jobs = make_jobs(
            student_engine, groups, self.open_ones, config.rollout.vllm.max_restarts
        )
        self.begun: int | None = None  # the step whose rollouts are being made
        self._model, self._make_teacher = student.model, make_teacher_engine
        is_remote = student_engine is not None and not student_engine.every_rank_asks
        self._guard = Guard(student, config) if is_remote else None

    def open_ones(self) -> list[Engine]:
        """Lists the engines that a job may ask."""
        return [engine for engine in (self.student, self.teacher) if engine is not None]

    def push_weights(self, policy_version: int) -> dict[str, float]:
        """Gives the student's engine its weights and proves that they are there; metrics of it.

        Raises:
            StaleWeights: the engine does not answer with them.
        """
        if self.student is None:
            return {}
        self.jobs.wait_until_idle()  # no completion of two policies
        push_weights(self._model, self.student, policy_version)
        if self._guard is None:
            return {}
        return self._guard.check(self.student, policy_version) | self.student.incidents()

    def begin(self, step: int, job: Callable[[], Any], *, with_teacher: bool) -> None:
        """Begins to make a step's rollouts; the teacher's engine is there only as long as asked."""
        if with_teacher and self.teacher is None:
            self.teacher = self._make_teacher()
        elif not with_teacher:
            self._close_teacher()
        for engine in self.open_ones():
            engine.wake_up()
        self.jobs.begin(job)
        self.begun = step

    def set_result(self, step: int, made: Any) -> None:
        """Takes a step's rollouts that are made already, in place of a job begun."""
        self.jobs.set_result(made)
        self.begun = step

    def made_ahead(self) -> Any:
        """Waits for the rollouts that were begun ahead of their step and keeps them; None: none."""
        if self.begun is None:
            return None
        made = self.jobs.result()
        self.jobs.set_result(made)
        return made

    def result(self) -> Any:
        """Returns what was begun, and lets the engines make room for the trainer."""
        made = self.jobs.result()
        self.begun = None
        for engine in self.open_ones():
            engine.sleep()
        return made

    def close(self) -> None:
        """Ends the servers that this run started, and frees embedded engines."""
        self._close_teacher()
        if self.student is not None:
            self.student.close()

    def _close_teacher(self) -> None:
        if self.teacher is not None:
            self.teacher.close()
            self.teacher = None


def make_teacher_engine(
    config: Config, groups: Groups, teacher: Frozen | None, prompts: list[Prompt], tokenizer: Any
) -> Engine:
    """Makes what phased teacher sampling asks: an engine with the teacher's weights, or a file.

    Raises:
        ValueError: the file of rollouts that were sampled before cannot be used.
    """
    if (source := config.distill.phases.source) != "engine":
        return TeacherPool.load(source, prompts, tokenizer, config.data.problem_field)
    assert teacher is not None, "phased teacher sampling has a teacher"
    path = resolve_hf_dir(config.model.teacher.hf_path or "")
    model = teacher.model
    engine = make_engine(config, groups, model.hf_config, path, "teacher", model.shared_vocab_size)
    if engine.awaits_weights:
        with teacher.on_device():
            engine.push_weights(lambda: iter_hf_weights(model), 0)
    return engine
