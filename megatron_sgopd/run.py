"""Puts a run together on this rank: models, engines, verifier, prompts, and where it resumes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sgopd import sgopd
from megatron_sgopd.config.evaluation import during_sets, evaluation_sets
from megatron_sgopd.config.schema import Config, DataConfig
from megatron_sgopd.data.problems import load_problems
from megatron_sgopd.data.rendering import load_tokenizer, render, stop_token_ids
from megatron_sgopd.data.stream import PromptStream, share
from megatron_sgopd.distributed.groups import Groups, any_rank, initialize
from megatron_sgopd.evaluation.benchmarks import Benchmark, load_benchmarks
from megatron_sgopd.metrics import StepLog
from megatron_sgopd.model.checkpoint_files import list_checkpoints
from megatron_sgopd.model.hf_location import read_hf_config, resolve_hf_dir
from megatron_sgopd.model.model_card import Origin, origin_of
from megatron_sgopd.preflight.recipe_check import require_agreement
from megatron_sgopd.rollouts.make_engine import make_engine
from megatron_sgopd.rollouts.pending import batch_from_columns
from megatron_sgopd.rollouts.sampler import Sampler, make_sampler
from megatron_sgopd.run_folder import (
    StopRequest,
    claim_run_folder,
    read_recipe,
    set_status,
    write_recipe,
)
from megatron_sgopd.training.checkpoint import TrainState, load_checkpoint
from megatron_sgopd.training.engines import Engines, make_teacher_engine
from megatron_sgopd.training.load_models import Models, load_models
from megatron_sgopd.training.objective import Objective
from megatron_sgopd.types import Engine, Prompt


@dataclass
class Run:
    """Everything the loop holds on this rank."""

    config: Config
    folder: Path
    state: TrainState
    models: Models
    engines: Engines
    sampler: Sampler
    stream: PromptStream
    benchmarks: dict[str, list[Benchmark]]  # "final", "during"
    log: StepLog | None  # rank 0's
    stop_asked: StopRequest

    @property
    def groups(self) -> Groups:
        return self.models.student.groups

    @property
    def is_first(self) -> bool:
        return self.groups.rank == 0

    @property
    def shows_progress(self) -> bool:
        return self.is_first and self.config.logging.progress

    def say(self, message: str) -> None:
        """Prints a line, on rank 0."""
        if self.is_first:
            print(f"{self.config.name}: {message}", flush=True)

    def objective(self) -> Objective:
        """Makes the method's objective with the tie width that is known by now."""
        return Objective.from_config(
            self.config.distill, self.config.rollout, self.state.gate_eps or 0.0
        )

    def prompts_of(self, step: int) -> tuple[list[Prompt], int]:
        """Returns this replica's prompts of a step and the global position of the first."""
        prompts = share(self.stream.take(step), self.groups.dp_rank, self.groups.dp_size)
        return prompts, self.groups.dp_rank * len(prompts)

    def teacher_fraction(self, step: int) -> float:
        """Returns the share of the rollout slots that ask the teacher at a step (method.md)."""
        phases = self.config.distill.phases
        if not phases.enabled or self.models.teacher is None:
            return 0.0
        return sgopd.teacher_fraction(
            step,
            num_steps=self.config.num_steps,
            rho0=phases.rho0,
            hold_frac=phases.hold_frac,
            end_frac=phases.end_frac,
        )

    def set_gate_eps(self, eps: float) -> None:
        """Fixes the measured tie width for the rest of the run, in the checkpoint and on disk."""
        self.state.gate_eps = eps
        if self.is_first:
            gate = replace(self.config.distill.gate, eps=eps)
            distill = replace(self.config.distill, gate=gate)
            write_recipe(self.folder, replace(self.config, distill=distill))

    def origin(self) -> Origin:
        """Returns where the student comes from, for what is exported."""
        return origin_of(self.config.model.student.hf_path, self.models.student_dir)

    def recipe(self) -> str:
        """Returns the resolved recipe's text, with what was measured."""
        return read_recipe(self.folder)

    def stop_requested(self) -> bool:
        """Tells whether any rank was asked to stop. Collective."""
        return any_rank(self.stop_asked(), self.groups)

    def set_status(self, status: str) -> None:
        """Writes what the run is, on rank 0."""
        if self.is_first:
            set_status(self.folder, status)

    def close(self) -> None:
        """Ends the engines and the verifier, and closes the metrics."""
        self.engines.close()
        if self.sampler.verifier is not None:
            self.sampler.verifier.close()
        if self.log is not None:
            self.log.close()


def start_run(config: Config) -> Run:
    """Builds the run of a resolved recipe on this rank, resuming from its newest checkpoint.

    The order matters: what is refused is refused before models are built, and every rank makes the
    same collective calls.

    Raises:
        ValueError: the folder is another run's, or models, data and recipe do not agree.
    """
    groups = initialize(config.parallel, seed=config.seed)
    folder = Path(config.logging.run_dir or "")
    checkpoints = list_checkpoints(folder)
    if groups.rank == 0:
        claim_run_folder(config, folder, resuming=bool(checkpoints))
    dist.barrier()
    require_agreement(config, folder)

    student_dir = resolve_hf_dir(config.model.student.hf_path)
    tokenizer = load_tokenizer(student_dir)
    stop_ids = config.rollout.stop_token_ids or stop_token_ids(tokenizer, student_dir)
    benchmarks = _benchmarks(config, tokenizer)

    models = load_models(config, groups, student_dir)
    state = TrainState(world_size=groups.world_size, seed=config.seed, name=config.name)
    if config.distill.gate.eps != "auto":
        state.gate_eps = float(config.distill.gate.eps)
    pending = None
    if checkpoints:
        state, pending = load_checkpoint(
            checkpoints[-1], models.student, seed=config.seed, name=config.name
        )
    engine = _student_engine(config, groups, models, samples=bool(benchmarks["final"]))
    sampler = make_sampler(config, groups, tokenizer, stop_ids, engine)
    solutions, limit = config.distill.method == "sft", config.rollout.max_prompt_tokens
    prompts, dropped = _prompts(config.data, tokenizer, solutions=solutions, limit=limit)
    if dropped and groups.rank == 0:
        print(
            f"{config.name}: left out {dropped} of {dropped + len(prompts)} prompts, which are "
            f"longer than rollout.max_prompt_tokens {limit}",
            flush=True,
        )
    run = Run(
        config=config,
        folder=folder,
        state=state,
        models=models,
        engines=Engines(
            config,
            groups,
            engine,
            models.student,
            partial(make_teacher_engine, config, groups, models.teacher, prompts, tokenizer),
        ),
        sampler=sampler,
        stream=PromptStream(
            prompts,
            seed=config.seed,
            shuffle=config.data.shuffle,
            num_prompts=config.rollout.num_prompts,
        ),
        benchmarks=benchmarks,
        log=StepLog(folder, config.logging, state.step) if groups.rank == 0 else None,
        stop_asked=StopRequest(folder, looks=groups.rank == 0),
    )
    if pending is not None:
        made = batch_from_columns(pending, run.prompts_of(state.step)[0])
        run.engines.set_result(state.step, made)
    run.engines.push_weights(state.policy_version)
    if state.gate_eps is not None:
        run.set_gate_eps(state.gate_eps)
    run.set_status("running")
    if checkpoints:
        run.say(f"resumed at step {state.step} of {config.num_steps}")
    return run


def _student_engine(
    config: Config, groups: Groups, models: Models, *, samples: bool
) -> Engine | None:
    """Makes the student's engine where training or the last evaluation samples from it."""
    if config.distill.method == "sft" and not samples:
        return None
    if config.rollout.vllm.colocated and groups.device.type == "cpu" and groups.rank == 0:
        print(f"{config.name}: vLLM on CPUs takes the calls to sleep and frees no memory")
    student = models.student.model
    return make_engine(
        config,
        groups,
        read_hf_config(models.student_dir),
        models.student_dir,
        "student",
        student.shared_vocab_size,
    )


def _prompts(
    data: DataConfig, tokenizer: Any, *, solutions: bool, limit: int
) -> tuple[list[Prompt], int]:
    """Reads and renders the training set; returns its prompts and how many are over the limit."""
    problems = load_problems(
        data.train,
        problem_field=data.problem_field,
        answer_field=data.answer_field,
        solution_field=data.solution_field if solutions else None,
        min_difficulty=data.min_difficulty,
    )
    prompts = render(problems, tokenizer, data, limit)
    return prompts, len(problems) - len(prompts)


def _benchmarks(config: Config, tokenizer: Any) -> dict[str, list[Benchmark]]:
    """Loads the sets of the full evaluations, and of those during training."""
    e = config.evaluation

    def load(sets: Mapping[str, str], limit: int | None) -> list[Benchmark]:
        return load_benchmarks(
            sets,
            config.data,
            e,
            tokenizer,
            max_problems=limit,
            max_prompt_tokens=config.rollout.max_prompt_tokens,
        )

    return {
        "final": load(evaluation_sets(e), e.max_problems),
        "during": load(during_sets(e) if e.every else {}, e.during_max_problems),
    }
