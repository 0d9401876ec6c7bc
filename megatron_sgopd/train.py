"""The loop: prompts -> rollouts -> labels -> batch -> step -> weights to the engine, and again.

Every rank runs this file. A replica's first rank talks to the verifier; rank 0 writes the run
directory. `run` puts together what the loop holds.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_sgopd import sgopd
from megatron_sgopd.config.evaluation import samples_per_problem
from megatron_sgopd.config.schema import Config
from megatron_sgopd.distributed.failure import failing_together
from megatron_sgopd.evaluation.accuracy import summarize, summarize_benchmarks
from megatron_sgopd.evaluation.ask import evaluate, tasks_of
from megatron_sgopd.evaluation.samples import write_lines
from megatron_sgopd.metrics import Clock, peak_memory, progress_bar, reduced_means
from megatron_sgopd.model.families import hf_shapes
from megatron_sgopd.model.hf_writer import MARK, README, write_hf_dir
from megatron_sgopd.model.model_card import mark, model_card
from megatron_sgopd.model.weight_stream import iter_hf_weights
from megatron_sgopd.rollouts.batch import (
    Batch,
    batch_metrics,
    generate_groups,
    mix_teacher_rollouts,
    solutions_as_rollouts,
)
from megatron_sgopd.rollouts.pending import to_columns
from megatron_sgopd.run import Run, assemble
from megatron_sgopd.training.checkpoint import save_checkpoint
from megatron_sgopd.training.step import train_step
from megatron_sgopd.training.tie_width import measure_tie_width
from megatron_sgopd.training.weight_sync import StaleWeights
from megatron_sgopd.types import EngineLost
from megatron_sgopd.versions import installed


def main(config: Config) -> None:
    """Runs a resolved recipe on this rank; a failing rank brings all of them down."""
    with failing_together(Path(config.logging.run_dir or ""), int(os.environ["RANK"])):
        train(config)


def train(config: Config) -> None:
    """The method's algorithm (docs/method.md, "One step"), from wherever the run stands."""
    run, started = assemble(config), time.time()
    state = run.state
    if run.resumed:
        run.say(f"{config.name}: resumed at step {state.step} of {config.num_steps}")
    if config.evaluation.at_start and state.step == 0:
        evaluate_and_write(run, "start")
    bar = progress_bar(config.name, config.num_steps, initial=state.step, show=run.shows)
    clock = Clock()
    with checkpoint_when_engines_are_lost(run):
        while state.step < config.num_steps and not run.stop_requested():
            with clock.span("rollout"):
                batch = next_batch(run, state.step)
            if state.gate_eps is None and run.teacher is not None and run.objective().is_gated:
                width = measure_tie_width(run.student, run.teacher, batch.rollouts, config)
                run.set_gate_eps(width)
            metrics = train_step(
                run.student,
                run.teacher,
                run.reference,
                batch.rollouts,
                run.objective(),
                config,
                clock,
            )
            sums = batch_metrics(batch, state.policy_version)
            metrics |= reduced_means(sums, sums, run.groups.dp_group, run.groups.device)
            metrics |= peak_memory(run.groups.device)
            state.step += 1
            state.policy_version += 1
            run.row = (metrics, batch.rollouts)
            if run.engine is not None:
                with clock.span("push_weights"):
                    metrics |= run.push_weights()
            if due(state.step, config.evaluation.every):
                with clock.span("evaluate"):
                    metrics |= evaluate_during(run)
                    keep_best(run, metrics)
            run.log(clock.take("step") | batch.seconds)
            if due(state.step, config.checkpoint.every) and state.step < config.num_steps:
                save(run)
            bar.update()
            bar.set_postfix_str(headline(metrics))
        bar.close()
        finish(run, time.time() - started)


@contextmanager
def checkpoint_when_engines_are_lost(run: Run) -> Iterator[None]:
    """What was trained is kept: the run can go on when its engines are there again."""
    try:
        yield
    except (EngineLost, StaleWeights) as error:  # on every rank
        run.log({})  # the step whose weights could not be pushed
        keep = run.config.checkpoint.keep
        path = save_checkpoint(run.dir, run.student, run.state, keep, run.companions())
        message = f"{error}. {path} has what was trained: train again to resume"
        raise type(error)(message) from error


def next_batch(run: Run, step: int) -> Batch:
    """The step's rollouts; with a policy lag the next step's are begun before they are needed."""
    if run.begun != step:
        begin_batch(run, step)
    batch: Batch = run.jobs.result()
    run.begun = None
    for engine in run.engines():
        engine.sleep()
    if run.config.rollout.max_policy_lag and step + 1 < run.config.num_steps:
        begin_batch(run, step + 1)
    return batch


def begin_batch(run: Run, step: int) -> None:
    if run.teacher_fraction(step) > 0.0:
        run.open_teacher_engine()
    else:
        run.close_teacher_engine()
    for engine in run.engines():
        engine.wake_up()
    run.jobs.begin(partial(make_batch, run, step))
    run.begun = step


def save(run: Run) -> Path:
    """A checkpoint, with the rollouts that were begun ahead of their step: none is made twice."""
    pending = None
    if run.begun is not None:
        batch = run.jobs.result()
        run.jobs.hand_back(batch)
        pending = to_columns(batch)
    keep = run.config.checkpoint.keep
    return save_checkpoint(run.dir, run.student, run.state, keep, run.companions(), pending)


def make_batch(run: Run, step: int) -> Batch:
    """This replica's share of the step's rollouts, labelled, with teacher rollouts mixed in."""
    config, sampler = run.config, replace(run.sampler, clock=Clock())
    prompts, first = run.prompts_of(step)
    if config.distill.method == "sft":
        solutions = [[r] for r in solutions_as_rollouts(prompts)]
        return Batch(solutions, student_groups=[])
    assert run.engine is not None, "on-policy methods have an engine"
    groups = generate_groups(sampler, run.engine, prompts, step=step, first_prompt=first)
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
        assert run.teacher_engine is not None, "opened before the job"
        batch = mix_teacher_rollouts(
            sampler, run.teacher_engine, groups, slots, step=step, first_prompt=first
        )
    return replace(batch, seconds=sampler.clock.take())


def evaluate_during(run: Run) -> dict[str, float]:
    """avg@k on the development set, for the learning curve."""
    sets, k = run.during_benchmarks, run.config.evaluation.during_k
    if run.engine is None or not sets:
        return {}
    records = evaluate(run.sampler, run.engine, sets, n=k, greedy=False, jobs=run.jobs)
    return {"evaluation/avg_at_k": float(summarize(records)["avg_at_k"])}


def keep_best(run: Run, metrics: dict[str, float]) -> None:
    """The student as a Hugging Face directory where it is better than all before. Collective."""
    state, score = run.state, metrics.get("evaluation/avg_at_k")
    if score is None or not run.config.checkpoint.save_hf_best:
        return
    if state.best_avg_at_k is None or score > state.best_avg_at_k:
        state.best_step, state.best_avg_at_k = state.step, score
        export(run, "hf_best", {"best": best(run)})


def best(run: Run) -> dict[str, Any] | None:
    """Which evaluation during training was the best, for summary and model card."""
    state, k = run.state, run.config.evaluation.during_k
    if state.best_step is None:
        return None
    return {"step": state.best_step, "avg_at_k": state.best_avg_at_k, "k": k}


def export(run: Run, folder: str, results: dict[str, Any]) -> None:
    """The student to RUN_DIR/FOLDER as a Hugging Face directory. Collective."""
    model = run.student.model
    write_hf_dir(
        run.dir / folder,
        run.student_dir,
        iter_hf_weights(model),
        hf_shapes(run.hf_config),
        model.dtype,
        texts={README: card(run, results), MARK: mark(run.origin())} if run.is_first else None,
        writes=run.is_first,
    )


def card(run: Run, results: dict[str, Any]) -> str:
    return model_card(run.origin(), recipe=run.recipe(), step=run.state.step, results=results)


def evaluate_and_write(run: Run, name: str) -> dict[str, Any]:
    """The full evaluation, to evaluation/NAME.jsonl; the summary of its records."""
    e = run.config.evaluation
    if run.engine is None or not run.benchmarks:
        return {}
    n = samples_per_problem(e)
    total = len(tasks_of(run.benchmarks, n, e.greedy))
    share = -(-total // run.groups.dp_size)  # of the first replica, which is shown
    bar = progress_bar(f"{run.config.name}: evaluate", share, show=run.shows, unit="answer")
    records = evaluate(
        run.sampler,
        run.engine,
        run.benchmarks,
        n=n,
        greedy=e.greedy,
        jobs=run.jobs,
        advance=bar.update,
    )
    bar.close()
    if run.is_first:
        write_lines(run.dir / "evaluation" / f"{name}.jsonl", records)
    return summarize_benchmarks(
        records, e.k, bootstrap_samples=e.bootstrap_samples, seed=run.config.seed
    )


def finish(run: Run, seconds: float) -> None:
    """Checkpoint, Hugging Face export, last evaluation, summary; or the checkpoint alone."""
    config, state = run.config, run.state
    finished = state.step >= config.num_steps
    if config.checkpoint.at_end or not finished:
        run.say(f"{config.name}: checkpoint {save(run)}")
    if not finished:
        run.set_status("stopped")
        run.say(f"{config.name}: stopped on request at step {state.step}; train again to go on")
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
            "initial_avg_at_k": initial_avg_at_k(run.dir),
            "teacher_avg_at_k": None,  # a run does not evaluate its teacher
            "engine": run.engine.name if run.engine else None,
            "engine_version": run.engine.version if run.engine else None,
            "versions": {package: installed(package) for package in ("torch", "transformers")},
            "gate_eps": state.gate_eps,
            "best": best(run),
            **results,
        }
        (run.dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        if config.checkpoint.save_hf:
            (run.dir / "hf" / README).write_text(card(run, summary), encoding="utf-8")
    run.set_status("finished")
    run.close()


def initial_avg_at_k(run_dir: Path) -> float | None:
    """Of the student before, where `evaluation.at_start` left its records."""
    path = run_dir / "evaluation" / "start.jsonl"
    if not path.is_file():
        return None
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return float(summarize(records)["avg_at_k"])


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def headline(metrics: dict[str, float]) -> str:
    """What a person wants beside the bar."""
    shown = {
        "accuracy": "rollout/accuracy",
        "KL": "distill/reverse_kl",
        "gate": "gate/open_rate",
        "teacher": "phases/realised_fraction",
        "loss": "train/loss",
    }
    return " ".join(f"{k} {metrics[v]:.3f}" for k, v in shown.items() if v in metrics)
