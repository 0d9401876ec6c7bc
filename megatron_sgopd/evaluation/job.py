"""`sgopd evaluate`: what it would ask for, and the asking, on this rank.

No Megatron model is built: an engine has its weights from the Hugging Face directory itself. What
an engine answers is on disk before anything else is done with it, so that a killed evaluation goes
on where it stopped, on any layout.
"""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sgopd.atomic_files import write_json, write_json_lines
from megatron_sgopd.config.evaluation import evaluation_sets, samples_per_problem
from megatron_sgopd.config.schema import Config
from megatron_sgopd.data.rendering import load_tokenizer, stop_token_ids
from megatron_sgopd.distributed.groups import Groups, from_first_rank, initialize
from megatron_sgopd.evaluation.ask import Task, answer, tasks_of
from megatron_sgopd.evaluation.benchmarks import Benchmark, load_benchmarks, with_lengths
from megatron_sgopd.evaluation.folder import (
    Settings,
    conflicts,
    label,
    make_settings,
    problems_path,
    read_settings,
    score,
)
from megatron_sgopd.evaluation.samples import (
    Journal,
    Row,
    journal_path,
    merge_journals,
    read_samples,
)
from megatron_sgopd.evaluation.tables import scores_table
from megatron_sgopd.metrics import progress_bar
from megatron_sgopd.model.content_digest import fingerprint
from megatron_sgopd.model.hf_location import read_hf_config, resolve_hf_dir, weight_files
from megatron_sgopd.model.hf_reader import iter_safetensors
from megatron_sgopd.rollouts.embedded_engine import EmbeddedEngine
from megatron_sgopd.rollouts.engine_jobs import make_jobs
from megatron_sgopd.rollouts.make_engine import make_engine
from megatron_sgopd.rollouts.sampler import make_sampler
from megatron_sgopd.rollouts.vllm_servers.server import check_version, installed_version
from megatron_sgopd.run_folder import StopRequest, clear_attempt, set_status, write_recipe
from megatron_sgopd.types import Engine
from megatron_sgopd.verifier import VerifierPool

LOCK_PATIENCE_S = 15.0  # ranks of a killed evaluation may take a moment to end


@dataclass(frozen=True)
class Plan:
    """An evaluation, ready to be made; `config_for_model` has resolved its `config`."""

    config: Config
    model: Path
    hf_config: Any
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    benchmarks: list[Benchmark]
    settings: Settings

    @property
    def folder(self) -> Path:
        return Path(self.config.logging.run_dir or "")

    def tasks(self) -> list[Task]:
        e = self.config.evaluation
        return tasks_of(self.benchmarks, samples_per_problem(e), e.greedy)

    def missing(self) -> set[tuple[str, str, int]]:
        """(benchmark, problem's id, sample) of every answer that is not on disk."""
        there = {b.name: read_samples(self.folder, b.name) for b in self.benchmarks}
        return {
            (name, prompt.id, sample)
            for name, prompt, sample in self.tasks()
            if (prompt.id, sample) not in there[name]
        }


def prepare(config: Config) -> Plan:
    """Reads all that is small, and refuses what cannot be, before anything heavy starts.

    Raises:
        ValueError: a model, benchmark or folder that does not do, and what to do about it.
    """
    model = resolve_hf_dir(config.model.student.hf_path)
    weight_files(model)
    hf_config, tokenizer = read_hf_config(model), load_tokenizer(model)
    stops = config.rollout.stop_token_ids or stop_token_ids(tokenizer, model)
    e, vllm = config.evaluation, config.rollout.vllm
    benchmarks = load_benchmarks(
        evaluation_sets(e),
        config.data,
        e,
        tokenizer,
        max_problems=e.max_problems,
        max_prompt_tokens=config.rollout.max_prompt_tokens,
    )
    positions = getattr(hf_config, "max_position_embeddings", None)
    config = with_lengths(config, benchmarks, positions)
    version: str | None = EmbeddedEngine.version
    if config.rollout.engine == "vllm":
        version = None if vllm.urls else installed_version(vllm.python)
        if not vllm.urls:
            check_version(version, vllm, vllm.python or "this environment")
    settings = make_settings(
        config,
        model={"path": str(model), "content": fingerprint(model)},
        stop_token_ids=stops,
        benchmarks=benchmarks,
        engine_version=version,
    )
    plan = Plan(config, model, hf_config, tokenizer, tuple(stops), benchmarks, settings)
    _check_same(plan)
    return plan


def _check_same(plan: Plan) -> None:
    """Raises ValueError where the folder's samples are those of another evaluation."""
    if not (plan.folder / "settings.json").is_file():
        return
    before = read_settings(plan.folder)
    if differences := conflicts(before, plan.settings):
        rescore = "; `sgopd rescore` judges its samples by another verifier"
        raise ValueError(
            f"{plan.folder} holds an evaluation under other settings (there and now: "
            f"{'; '.join(differences)}): set them back to go on with it, or give another --out"
            + (rescore if before["verifier"] != plan.settings["verifier"] else "")
        )


# -- on a rank -------------------------------------------------------------------------------------


def main(config: Config) -> None:
    """Runs an evaluation on this rank, from wherever it stands."""
    plan = prepare(config)
    groups = initialize(plan.config.parallel, seed=plan.config.seed)
    with locked(plan.folder, here=groups.rank == 0):
        if groups.rank == 0:
            begin(plan)
        missing = from_first_rank(plan.missing() if groups.rank == 0 else None)
        stopped = StopRequest(plan.folder)
        left = [task for task in plan.tasks() if (task[0], task[1].id, task[2]) in missing]
        if left:
            ask(plan, groups, left, stopped)
        dist.barrier()
        if groups.rank == 0:
            conclude(plan)


def score_again(plan: Plan) -> bool:
    """Labels and scores without an engine if no answer is missing; returns whether it was so."""
    if not (plan.folder / "settings.json").is_file() or plan.missing():
        return False
    with locked(plan.folder):
        begin(plan)
        return conclude(plan)


def begin(plan: Plan) -> None:
    """Writes what the samples depend on, and puts what is there already in order."""
    folder = plan.folder
    clear_attempt(folder)
    _check_same(plan)
    settings = plan.settings
    if (folder / "settings.json").is_file():  # benchmarks not asked for now keep their samples
        before = read_settings(folder)
        others = before.get("others", {}) | before["benchmarks"]
        settings["others"] = {k: v for k, v in others.items() if k not in settings["benchmarks"]}
    for benchmark in plan.benchmarks:
        write_json_lines(problems_path(folder, benchmark.name), benchmark.problems)
        # Without rows too: nothing may be appended to a journal whose only line is torn.
        rows = read_samples(folder, benchmark.name)
        merge_journals(folder, benchmark.name, benchmark.problems, rows)
    write_recipe(folder, plan.config)
    write_json(folder / "settings.json", settings)
    set_status(plan.folder, "running")


def ask(plan: Plan, groups: Groups, tasks: list[Task], stopped: StopRequest) -> None:
    """Starts the engine and asks it for the tasks. Collective over all ranks."""
    config = plan.config
    engine = make_engine(config, groups, plan.hf_config, plan.model, "evaluated")
    sampler = make_sampler(config, groups, plan.tokenizer, plan.stop_token_ids, engine)
    if engine.awaits_weights:
        engine.push_weights(partial(iter_safetensors, plan.model), 0)
    jobs = make_jobs(engine, groups, lambda: [engine], config.rollout.vllm.max_restarts)
    whole, share = (-(-count // groups.dp_size) for count in (len(plan.tasks()), len(tasks)))
    bar = progress_bar(
        f"{config.name}: evaluate" + (f" (1 of {groups.dp_size})" if groups.dp_size > 1 else ""),
        whole,
        initial=whole - share,
        show=groups.rank == 0 and config.logging.progress,
        unit="answer",
    )
    with _journals(plan, groups) as keep:
        try:
            answer(sampler, engine, tasks, jobs, keep, advance=bar.update, stopped=stopped)
        finally:
            bar.close()
            _close(engine, sampler.verifier)


def conclude(plan: Plan) -> bool:
    """Labels what has no verdict yet, puts samples in order, and scores where all are there.

    Prints what it came to; whether the evaluation is finished.
    """
    folder = plan.folder
    for benchmark in plan.benchmarks:
        rows = read_samples(folder, benchmark.name)
        if left := [row for row in rows.values() if "is_correct" not in row]:
            v = plan.config.verifier
            with VerifierPool(v.name, v.timeout_s, v.num_workers, v.memory_mb) as verifier:
                label(left, {p.id: p.answer for p in benchmark.prompts}, verifier)
        merge_journals(folder, benchmark.name, benchmark.problems, rows)
    if missing := plan.missing():
        total = len(plan.tasks())
        set_status(plan.folder, "stopped")
        print(
            f"{plan.config.name}: stopped on request with {total - len(missing)} of {total} "
            "answers; the same command goes on",
            flush=True,
        )
        return False
    summary = score(folder)
    set_status(plan.folder, "finished")
    print(f"{scores_table(summary)}\n{folder / 'summary.json'}", flush=True)
    return True


def _close(engine: Engine, verifier: VerifierPool | None) -> None:
    engine.close()
    if verifier is not None:
        verifier.close()


@contextmanager
def _journals(plan: Plan, groups: Groups) -> Iterator[Any]:
    """A function that keeps a row: one journal a benchmark, where a first rank writes."""
    opened: dict[str, Journal] = {}

    def keep(benchmark: str, row: Row) -> None:
        if benchmark not in opened:
            opened[benchmark] = Journal(journal_path(plan.folder, benchmark, groups.rank))
        opened[benchmark].append(row)

    try:
        yield keep
    finally:
        for journal in opened.values():
            journal.close()


@contextmanager
def locked(folder: Path, *, here: bool = True) -> Iterator[None]:
    """One evaluation at a time writes into a folder; the kernel lets go when this process ends."""
    if not here:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o666)
    try:
        deadline = time.monotonic() + LOCK_PATIENCE_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if time.monotonic() > deadline:
                    raise ValueError(
                        f"{folder} is being written by another evaluation: wait for it, or give "
                        "another --out"
                    ) from error
                time.sleep(0.2)
        yield
    finally:
        os.close(lock)
