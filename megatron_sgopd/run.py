"""Puts a run together on this rank: models, engine, verifier, prompts, and where it resumes."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_sgopd import sgopd
from megatron_sgopd.config.evaluation import during_sets, evaluation_sets
from megatron_sgopd.config.load import to_yaml
from megatron_sgopd.config.schema import Config
from megatron_sgopd.data.problems import load_problems
from megatron_sgopd.data.rendering import load_tokenizer, render, stop_token_ids
from megatron_sgopd.data.stream import PromptStream, share
from megatron_sgopd.distributed.groups import Groups, any_rank, initialize
from megatron_sgopd.evaluation.benchmarks import Benchmark, load_benchmarks
from megatron_sgopd.metrics import MetricsWriter
from megatron_sgopd.model.checkpoint_files import RECIPE, list_checkpoints
from megatron_sgopd.model.hf_location import read_hf_config, resolve_hf_dir
from megatron_sgopd.model.hf_writer import MARK
from megatron_sgopd.model.model_card import Origin, mark, origin_of
from megatron_sgopd.model.weight_stream import iter_hf_weights
from megatron_sgopd.preflight.recipe_check import require_agreement
from megatron_sgopd.rollouts.engine_jobs import Jobs, OnEveryRank, OnFirstRank
from megatron_sgopd.rollouts.make_engine import make_engine
from megatron_sgopd.rollouts.offline_engine import TeacherPool
from megatron_sgopd.rollouts.pending import of_columns
from megatron_sgopd.rollouts.sampler import Sampler, make_sampler
from megatron_sgopd.rollouts.vllm_servers.engine import VllmEngine
from megatron_sgopd.run_folder import prepare_run_dir
from megatron_sgopd.training.checkpoint import Companions, TrainState, load_checkpoint
from megatron_sgopd.training.frozen import Frozen
from megatron_sgopd.training.load_models import (
    Vocabulary,
    load_reference,
    load_student,
    load_teacher,
)
from megatron_sgopd.training.objective import Objective
from megatron_sgopd.training.student import Student, make_student
from megatron_sgopd.training.weight_sync import Guard, push_weights
from megatron_sgopd.types import Engine, Prompt, Rollout


@dataclass
class Run:
    """Everything the loop holds on this rank."""

    config: Config
    dir: Path
    groups: Groups
    state: TrainState
    tokenizer: Any
    student_dir: Path  # config, tokenizer
    hf_config: Any
    student: Student
    teacher: Frozen | None
    reference: Frozen | None
    sampler: Sampler
    stream: PromptStream
    engine: Engine | None
    writer: MetricsWriter | None  # rank 0 only
    benchmarks: list[Benchmark]
    during_benchmarks: list[Benchmark]
    resumed: bool
    jobs: Jobs = field(default_factory=OnEveryRank)  # how engines are asked
    guard: Guard | None = None  # of vLLM engines
    teacher_engine: Engine | None = None
    row: tuple[dict[str, float], Sequence[Rollout]] | None = None  # of a step not yet logged
    begun: int | None = None  # the step whose rollouts are being made
    signalled: bool = False

    @property
    def is_first(self) -> bool:
        return self.groups.rank == 0

    @property
    def shows(self) -> bool:
        """Whether this rank draws progress bars."""
        return self.is_first and self.config.logging.progress

    def say(self, message: str) -> None:
        if self.is_first:
            print(message, flush=True)

    def objective(self) -> Objective:
        return Objective.of(self.config, self.state.gate_eps or 0.0)

    def prompts_of(self, step: int) -> tuple[list[Prompt], int]:
        """This replica's prompts of a step and the global position of the first."""
        prompts = share(self.stream.take(step), self.groups.dp_rank, self.groups.dp_size)
        return prompts, self.groups.dp_rank * len(prompts)

    def teacher_fraction(self, step: int) -> float:
        phases = self.config.distill.phases
        if not phases.enabled or self.teacher is None:
            return 0.0
        return sgopd.teacher_fraction(
            step,
            num_steps=self.config.num_steps,
            rho0=phases.rho0,
            hold_frac=phases.hold_frac,
            end_frac=phases.end_frac,
        )

    def engines(self) -> list[Engine]:
        """That a job may ask."""
        return [e for e in (self.engine, self.teacher_engine) if e is not None]

    def push_weights(self) -> dict[str, float]:
        """The student's weights to its engine, and the proof that they are there. Collective."""
        assert self.engine is not None, "asked for by methods that sample"
        self.jobs.settle()  # no completion of two policies
        push_weights(self.student.model, self.engine, self.state.policy_version)
        if self.guard is None or not isinstance(self.engine, VllmEngine):
            return {}
        probed = self.guard.check(self.engine, self.state.policy_version)
        return probed | self.engine.incidents()

    def open_teacher_engine(self) -> None:
        """The engine with the teacher's weights, if it is not there yet. Collective."""
        if self.teacher_engine is not None:
            return
        assert self.teacher is not None, "phased teacher sampling has a teacher"
        if (source := self.config.distill.phases.source) != "engine":
            field = self.config.data.problem_field
            self.teacher_engine = TeacherPool.load(
                source, self.stream.prompts, self.tokenizer, field
            )
            return
        path = resolve_hf_dir(self.config.model.teacher.hf_path or "")
        config, model = self.config, self.teacher.model
        embedded = config.rollout.engine == "embedded"  # which gets its weights from the model
        engine = make_engine(
            config,
            self.groups,
            model.hf_config if embedded else read_hf_config(path),
            path,
            "teacher",
            model.shared_vocab_size,
        )
        if embedded:
            with self.teacher.at_hand():
                engine.push_weights(lambda: iter_hf_weights(model), 0)
        self.teacher_engine = engine

    def close_teacher_engine(self) -> None:
        """Gives its memory back once the teacher fraction has faded to 0."""
        if self.teacher_engine is not None:
            self.teacher_engine.close()
            self.teacher_engine = None

    def set_gate_eps(self, eps: float) -> None:
        """Fixes the measured tie width for the rest of the run, in the checkpoint and on disk."""
        self.state.gate_eps = eps
        if self.is_first:
            gate = replace(self.config.distill.gate, eps=eps)
            config = replace(self.config, distill=replace(self.config.distill, gate=gate))
            (self.dir / "config.yaml").write_text(to_yaml(config), encoding="utf-8")

    def origin(self) -> Origin:
        return origin_of(self.config.model.student.hf_path, self.student_dir)

    def recipe(self) -> str:
        """Resolved, with what was measured."""
        return (self.dir / "config.yaml").read_text(encoding="utf-8")

    def companions(self) -> Companions | None:
        """Of its checkpoints, on the rank that writes them."""
        if not self.is_first:
            return None
        return Companions(self.student_dir, {RECIPE: self.recipe(), MARK: mark(self.origin())})

    def stop_requested(self) -> bool:
        """Whether any rank got SIGTERM or SIGUSR1, or RUN_DIR/STOP exists. Collective."""
        flag = self.signalled or (self.is_first and (self.dir / "STOP").exists())
        return any_rank(flag, self.groups)

    def log(self, spans: Mapping[str, float]) -> None:
        """The step's row to metrics.jsonl; now and then a sample of its rollouts. Rank 0."""
        row, self.row = self.row, None
        if self.writer is None or row is None:
            return
        metrics, rollouts = row
        self.writer.write(self.state.step, {**metrics, **spans})
        logging, step = self.config.logging, self.state.step
        if logging.rollouts_every and (step == 1 or step % logging.rollouts_every == 0):
            path = self.dir / "rollouts" / f"step-{step:06d}.jsonl"
            path.parent.mkdir(exist_ok=True)
            rows = [self._rollout_row(r) for r in rollouts[: logging.rollouts_kept]]
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")

    def _rollout_row(self, rollout: Rollout) -> dict[str, Any]:
        return {
            "step": self.state.step,
            "prompt": rollout.prompt.text,
            "completion": self.sampler.decode(rollout.completion.token_ids),
            "answer": rollout.prompt.answer,
            "is_correct": rollout.is_correct,
            "source": rollout.source,
            "verifier_advantage": rollout.verifier_advantage,
        }

    def set_status(self, status: str) -> None:
        if self.is_first:
            (self.dir / "status").write_text(status + "\n", encoding="utf-8")

    def close(self) -> None:
        self.close_teacher_engine()
        if self.engine is not None:
            self.engine.close()
        if self.sampler.verifier is not None:
            self.sampler.verifier.close()
        if self.writer is not None:
            self.writer.close()


def assemble(config: Config) -> Run:
    """Builds the run of a resolved recipe on this rank, resuming from its newest checkpoint."""
    groups = initialize(config.parallel, seed=config.seed)
    run_dir = Path(config.logging.run_dir or "")
    checkpoints = list_checkpoints(run_dir)
    prepare_run_dir(config, run_dir, groups, resuming=bool(checkpoints))
    require_agreement(config, run_dir)

    student_dir = resolve_hf_dir(config.model.student.hf_path)
    hf_config, tokenizer = read_hf_config(student_dir), load_tokenizer(student_dir)
    stop_ids = config.rollout.stop_token_ids or stop_token_ids(tokenizer, student_dir)
    sampler = make_sampler(config, groups, tokenizer, stop_ids)
    final, during = _benchmarks(config, tokenizer)  # what is wrong with them is said now

    objective = Objective.of(config, eps=0.0)
    vocabulary = Vocabulary.of(config)
    model = load_student(config, groups, vocabulary, trainable=True)
    teacher = load_teacher(config, groups, vocabulary) if objective.needs_teacher else None
    reference = load_reference(config, groups, vocabulary) if objective.needs_reference else None
    student = make_student(model, config)

    state = TrainState(world_size=groups.world_size, seed=config.seed, name=config.name)
    if config.distill.gate.eps != "auto":
        state.gate_eps = float(config.distill.gate.eps)
    pending = None
    if checkpoints:
        state, pending = load_checkpoint(
            checkpoints[-1], student, seed=config.seed, name=config.name
        )
    engine = None
    if config.distill.method != "sft" or final:
        engine = make_engine(config, groups, hf_config, student_dir, "student", vocabulary.shared)
    problems = load_problems(
        config.data.train,
        problem_field=config.data.problem_field,
        answer_field=config.data.answer_field,
        solution_field=config.data.solution_field if config.distill.method == "sft" else None,
        min_difficulty=config.data.min_difficulty,
    )
    prompts = render(problems, tokenizer, config.data, config.rollout.max_prompt_tokens)
    run = Run(
        config=config,
        dir=run_dir,
        groups=groups,
        state=state,
        tokenizer=tokenizer,
        student_dir=student_dir,
        hf_config=hf_config,
        student=student,
        teacher=teacher,
        reference=reference,
        sampler=sampler,
        benchmarks=final,
        during_benchmarks=during,
        stream=PromptStream(
            prompts,
            seed=config.seed,
            shuffle=config.data.shuffle,
            num_prompts=config.rollout.num_prompts,
        ),
        engine=engine,
        writer=MetricsWriter(run_dir / "metrics.jsonl", state.step) if groups.rank == 0 else None,
        resumed=bool(checkpoints),
    )
    if isinstance(engine, VllmEngine):
        run.jobs = OnFirstRank(groups, run.engines, config.rollout.vllm.max_restarts)
        run.guard = Guard(student, config)
    if pending is not None:
        run.jobs.hand_back(of_columns(pending, run.prompts_of(state.step)[0]))
        run.begun = state.step
    if engine is not None:
        if config.rollout.vllm.colocated and groups.device.type == "cpu":
            run.say(f"{config.name}: vLLM on CPUs takes the calls to sleep and frees no memory")
        run.push_weights()
    if dropped := len(problems) - len(prompts):
        run.say(
            f"{config.name}: left out {dropped} of {len(problems)} prompts, which are longer than "
            f"rollout.max_prompt_tokens {config.rollout.max_prompt_tokens}"
        )
    if state.gate_eps is not None:
        run.set_gate_eps(state.gate_eps)
    run.set_status("running")
    _listen_for_signals(run)
    return run


def _benchmarks(config: Config, tokenizer: Any) -> tuple[list[Benchmark], list[Benchmark]]:
    """Of the full evaluations, and of those during training."""
    e = config.evaluation
    during = during_sets(e) if e.every else {}
    return (
        load_benchmarks(evaluation_sets(e), config, tokenizer, e.max_problems),
        load_benchmarks(during, config, tokenizer, e.during_max_problems),
    )


def _listen_for_signals(run: Run) -> None:
    """SIGTERM and SIGUSR1 ask for a checkpoint after this step."""

    def note(number: int, frame: object) -> None:
        run.signalled = True

    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, note)
