"""The loop: prompts -> rollouts -> labels -> batch -> step -> weights to the engine, and again.

Every rank runs this file. A replica's first rank talks to the verifier; rank 0 writes the run
directory. `run` puts together what the loop holds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sgopd import sgopd
from megatron_sgopd.atomic_files import write_json
from megatron_sgopd.config.evaluation import samples_per_problem
from megatron_sgopd.config.schema import Config
from megatron_sgopd.distributed.failure import failing_together
from megatron_sgopd.evaluation.accuracy import summarize
from megatron_sgopd.evaluation.ask import evaluate, records_of, tasks_of
from megatron_sgopd.evaluation.folder import IDENTITY, make_settings, write_evaluation
from megatron_sgopd.metrics import Clock, peak_memory, progress_bar, reduced_means
from megatron_sgopd.model.checkpoint_files import RECIPE
from megatron_sgopd.model.families import hf_shapes
from megatron_sgopd.model.hf_writer import ORIGIN_FILE, README, write_hf_dir
from megatron_sgopd.model.model_card import model_card, origin_json
from megatron_sgopd.model.weight_stream import iter_hf_weights
from megatron_sgopd.rollouts.batch import (
    Batch,
    batch_metrics,
    generate_groups,
    mix_teacher_rollouts,
    solutions_as_rollouts,
)
from megatron_sgopd.rollouts.pending import to_columns
from megatron_sgopd.run import Run, start_run
from megatron_sgopd.run_folder import SUMMARY
from megatron_sgopd.training.checkpoint import Companions, save_checkpoint
from megatron_sgopd.training.step import train_step
from megatron_sgopd.training.tie_width import measure_tie_width
from megatron_sgopd.training.weight_sync import StaleWeights
from megatron_sgopd.types import EngineLost, Rollout
from megatron_sgopd.versions import installed


def main(config: Config) -> None:
    """Runs a resolved recipe on this rank; a failing rank brings all of them down."""
    with failing_together(Path(config.logging.run_dir or ""), int(os.environ["RANK"])):
        train(config)


def train(config: Config) -> None:
    """Runs the method's algorithm (docs/method.md, "One step"), from wherever the run stands."""
    run, started = start_run(config), time.time()
    state, models = run.state, run.models
    if config.evaluation.at_start and state.step == 0:
        evaluate_and_write(run, "start")
    bar = progress_bar(config.name, config.num_steps, initial=state.step, show=run.shows_progress)
    clock = Clock()
    with checkpoint_when_engines_are_lost(run):
        while state.step < config.num_steps and not run.stop_requested():
            with clock.span("rollout"):
                batch = next_batch(run, state.step)
            if state.gate_eps is None and models.teacher is not None and run.objective().is_gated:
                width = measure_tie_width(models.student, models.teacher, batch.rollouts, config)
                run.set_gate_eps(width)
            metrics = train_step(
                models.student,
                models.teacher,
                models.reference,
                batch.rollouts,
                run.objective(),
                config.distill,
                clock,
            )
            metrics |= metrics_of(run, batch)
            state.step += 1
            state.policy_version += 1
            try:
                with clock.span("push_weights"):
                    metrics |= run.engines.push_weights(state.policy_version)
                if due(state.step, config.evaluation.every):
                    with clock.span("evaluate"):
                        metrics |= evaluate_during(run)
                        keep_best(run, metrics)
            finally:  # what was trained is logged, also where its weights reach no engine
                log(run, metrics | clock.take("step") | batch.seconds, batch.rollouts)
            if due(state.step, config.checkpoint.every) and state.step < config.num_steps:
                save(run)
            bar.update()
            bar.set_postfix_str(headline(metrics))
        bar.close()
        finish(run, time.time() - started)


@contextmanager
def checkpoint_when_engines_are_lost(run: Run) -> Iterator[None]:
    """Keeps what was trained: the run can go on when its engines are there again."""
    try:
        yield
    except (EngineLost, StaleWeights) as error:  # on every rank
        keep = run.config.checkpoint.keep
        path = save_checkpoint(run.folder, run.models.student, run.state, keep, companions(run))
        message = f"{error}. {path} has what was trained: train again to resume"
        raise type(error)(message) from error


def next_batch(run: Run, step: int) -> Batch:
    """Returns the step's rollouts; with a policy lag the next step's are begun before needed."""
    if run.engines.begun != step:
        begin_batch(run, step)
    batch: Batch = run.engines.result()
    if run.config.rollout.max_policy_lag and step + 1 < run.config.num_steps:
        begin_batch(run, step + 1)
    return batch


def begin_batch(run: Run, step: int) -> None:
    """Begins to make a step's rollouts; the teacher's engine is there while it is asked."""
    with_teacher = run.teacher_fraction(step) > 0.0
    run.engines.begin(step, partial(make_batch, run, step), with_teacher=with_teacher)


def metrics_of(run: Run, batch: Batch) -> dict[str, float]:
    """Returns what a step logs about its rollouts and its memory, over all replicas. Collective."""
    groups = run.groups
    sums = batch_metrics(batch, run.state.policy_version)
    return reduced_means(sums, sums, groups.dp_group, groups.device) | peak_memory(groups.device)


def log(run: Run, metrics: Mapping[str, float], rollouts: Sequence[Rollout]) -> None:
    """Writes the step's row, and now and then its rollouts, on rank 0."""
    if run.log is not None:
        run.log.write(run.state.step, metrics)
        run.log.write_rollouts(run.state.step, rollouts, run.sampler.decode)


def save(run: Run) -> Path:
    """Saves a checkpoint, with the rollouts that were begun ahead: none is made twice."""
    made = run.engines.made_ahead()
    pending = None if made is None else to_columns(made)
    keep = run.config.checkpoint.keep
    return save_checkpoint(
        run.folder, run.models.student, run.state, keep, companions(run), pending
    )


def companions(run: Run) -> Companions | None:
    """Returns what makes a checkpoint self-contained, on the rank that writes it."""
    if not run.is_first:
        return None
    return Companions(
        run.models.student_dir, {RECIPE: run.recipe(), ORIGIN_FILE: origin_json(run.origin())}
    )


def make_batch(run: Run, step: int) -> Batch:
    """Makes this replica's share of the step's rollouts, labelled, teacher rollouts mixed in."""
    config, sampler = run.config, replace(run.sampler, clock=Clock())
    prompts, first = run.prompts_of(step)
    if config.distill.method == "sft":
        solutions = [[r] for r in solutions_as_rollouts(prompts)]
        return Batch(solutions, student_groups=[])
    assert run.engines.student is not None, "on-policy methods have an engine"
    groups = generate_groups(sampler, run.engines.student, prompts, step=step, first_prompt=first)
    batch = Batch(groups, student_groups=groups)
    if (fraction := run.teacher_fraction(step)) > 0.0:
        slots = sgopd.teacher_slots(
            fraction,
            num_prompts=config.rollout.num_prompts,
            n=config.rollout.n,
            unit=config.distill.phases.unit,
            seed=config.seed,
            step=step,
        )
        assert run.engines.teacher is not None, "opened before the job"
        batch = mix_teacher_rollouts(
            sampler, run.engines.teacher, groups, slots, step=step, first_prompt=first
        )
    return replace(batch, seconds=sampler.clock.take())


def evaluate_during(run: Run) -> dict[str, float]:
    """Measures avg@k on the development set, for the learning curve. Collective."""
    sets, k, engines = run.benchmarks["during"], run.config.evaluation.during_k, run.engines
    if engines.student is None or not sets:
        return {}
    rows = evaluate(run.sampler, engines.student, sets, n=k, greedy=False, jobs=engines.jobs)
    records = records_of(sets, rows, k, greedy=False)
    return {"evaluation/avg_at_k": float(summarize(records)["avg_at_k"])}


def keep_best(run: Run, metrics: dict[str, float]) -> None:
    """Exports the student where it is better than all before. Collective."""
    state, score = run.state, metrics.get("evaluation/avg_at_k")
    if score is None or not run.config.checkpoint.save_hf_best:
        return
    if state.best_avg_at_k is None or score > state.best_avg_at_k:
        state.best_step, state.best_avg_at_k = state.step, score
        export(run, "hf_best", {"best": best(run)})


def best(run: Run) -> dict[str, Any] | None:
    """Describes the best evaluation during training, for summary and model card."""
    state, k = run.state, run.config.evaluation.during_k
    if state.best_step is None:
        return None
    return {"step": state.best_step, "avg_at_k": state.best_avg_at_k, "k": k}


def export(run: Run, folder: str, results: dict[str, Any]) -> None:
    """Writes the student to RUN_DIR/FOLDER as a Hugging Face directory. Collective."""
    model = run.models.student.model
    write_hf_dir(
        run.folder / folder,
        run.models.student_dir,
        iter_hf_weights(model),
        hf_shapes(model.hf_config),
        model.dtype,
        texts={README: card(run, results), ORIGIN_FILE: origin_json(run.origin())}
        if run.is_first
        else None,
        writes=run.is_first,
    )


def card(run: Run, results: dict[str, Any]) -> str:
    """Writes the model card's text."""
    return model_card(run.origin(), recipe=run.recipe(), step=run.state.step, results=results)


def evaluate_and_write(run: Run, name: str) -> dict[str, Any]:
    """Runs the full evaluation, to evaluation/NAME/; returns its scores on rank 0. Collective."""
    e, sets, engines = run.config.evaluation, run.benchmarks["final"], run.engines
    if engines.student is None or not sets:
        return {}
    n = samples_per_problem(e)
    total = len(tasks_of(sets, n, e.greedy))
    share = -(-total // run.groups.dp_size)  # of the first replica, which is shown
    bar = progress_bar(
        f"{run.config.name}: evaluate", share, show=run.shows_progress, unit="answer"
    )
    rows = evaluate(
        run.sampler,
        engines.student,
        sets,
        n=n,
        greedy=e.greedy,
        jobs=engines.jobs,
        advance=bar.update,
    )
    bar.close()
    if not run.is_first:
        return {}
    settings = make_settings(
        run.config,
        model={"path": str(run.folder), "content": f"the student after {run.state.step} steps"},
        stop_token_ids=run.sampler.stop_token_ids,
        benchmarks=sets,
        engine_version=engines.student.version,
    )
    summary = write_evaluation(run.folder / "evaluation" / name, settings, sets, rows)
    return {key: value for key, value in summary.items() if key not in IDENTITY}


def finish(run: Run, seconds: float) -> None:
    """Saves, exports, evaluates and sums up a finished run; of a stopped one, saves."""
    config, state, engine = run.config, run.state, run.engines.student
    finished = state.step >= config.num_steps
    if config.checkpoint.at_end or not finished:
        run.say(f"checkpoint {save(run)}")
    if not finished:
        run.set_status("stopped")
        run.say(f"stopped on request at step {state.step}; train again to go on")
        run.close()
        return
    if config.checkpoint.save_hf:
        export(run, "hf", {})
    results = evaluate_and_write(run, "final") if config.evaluation.at_end else {}
    if run.is_first:
        summary = {
            "name": config.name,
            "method": config.distill.method,
            "estimator": config.distill.estimator,
            "steps": state.step,
            "seconds": round(seconds, 1),
            "seed": config.seed,
            "seeds": [config.seed],
            "initial_avg_at_k": initial_avg_at_k(run),
            "teacher_avg_at_k": None,  # a run does not evaluate its teacher
            "engine": engine.name if engine else None,
            "engine_version": engine.version if engine else None,
            "versions": {package: installed(package) for package in ("torch", "transformers")},
            "gate_eps": state.gate_eps,
            "best": best(run),
            **results,
        }
        write_json(run.folder / SUMMARY, summary)
        if config.checkpoint.save_hf:
            (run.folder / "hf" / README).write_text(card(run, summary), encoding="utf-8")
    run.set_status("finished")
    run.close()


def initial_avg_at_k(run: Run) -> float | None:
    """Returns avg@k of the student before, where the recipe asks for that evaluation."""
    path = run.folder / "evaluation" / "start" / SUMMARY
    if not (run.config.evaluation.at_start and path.is_file()):
        return None
    return float(json.loads(path.read_text(encoding="utf-8"))["avg_at_k"])


def due(step: int, every: int) -> bool:
    """Tells whether what happens every so many steps (0: never) happens after this one."""
    return every > 0 and step % every == 0


def headline(metrics: dict[str, float]) -> str:
    """Writes what a person wants to see beside the progress bar."""
    shown = {
        "accuracy": "rollout/accuracy",
        "KL": "distill/reverse_kl",
        "gate": "gate/open_rate",
        "teacher": "phases/realised_fraction",
        "loss": "train/loss",
    }
    return " ".join(f"{k} {metrics[v]:.3f}" for k, v in shown.items() if v in metrics)
