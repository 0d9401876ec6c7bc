"""Experiments of `sgopd launch`, by nemo-run: submitted, printed, found again."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.config import get_nemorun_home
from nemo_run.core.execution.slurm import SlurmJobDetails

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.launch.submission import (
    SCRIPT,
    Executor,
    Run,
    batch_commands,
    local_command,
    sbatch_options,
)

RUN_DIR = "run_dir"  # of a run's task, in nemo-run's records
NOTE = "# The job becomes the batch script here; the srun that nemo-run adds below is not reached."


class JobLog(SlurmJobDetails):
    """The log is the batch script's own, not that of a step."""

    @property
    def ls_term(self) -> str:
        return os.path.join(self.folder, "sbatch_*_%j.out")


# -- executors -------------------------------------------------------------------------------------


def build(executor: Executor, root: Path) -> run.Executor:
    """nemo-run's own; what is not set is as in the batch script."""
    if executor.kind == "local":
        return run.LocalExecutor(env_vars=dict(executor.env))
    own = sbatch_options(root / SCRIPT)
    return run.SlurmExecutor(
        account=executor.account,
        partition=executor.partition,
        nodes=executor.nodes or int(own["nodes"]),
        gpus_per_node=executor.gpus_per_node,
        time=executor.time,
        container_image=executor.container_image,
        container_mounts=list(executor.mounts),
        env_vars=dict(executor.env),
        additional_parameters={k.replace("-", "_"): v or True for k, v in executor.options.items()},
        packager=run.Packager(),
    )


def prepared(executor: run.Executor, task: Run, root: Path, base: Path) -> run.Executor:
    """An executor, whoever made it, for one run: a Slurm job becomes the batch script.

    Container, mounts and environment go to the batch script, which hands them to its steps; `base`
    is nemo-run's folder.
    """
    executor = executor.clone()
    if isinstance(executor, run.LocalExecutor):
        return executor
    if not isinstance(executor, run.SlurmExecutor):
        raise ConfigError(f"a {type(executor).__name__}: LocalExecutor or SlurmExecutor is wanted")
    if not isinstance(executor.tunnel, run.LocalTunnel):
        raise ConfigError("an executor with an SSH tunnel: launch on the cluster, where sbatch is")
    commands = batch_commands(
        task, root, executor.container_image, executor.container_mounts, executor.env_vars
    )
    executor.setup_lines = f"{NOTE}\n{commands}"
    executor.container_image, executor.container_mounts, executor.env_vars = None, [], {}
    own = sbatch_options(root / SCRIPT)
    executor.job_name_prefix = executor.job_name_prefix or f"{own['job_name']}."
    missing = {k: v for k, v in own.items() if k != "output" and getattr(executor, k, None) is None}
    executor.additional_parameters = {**missing, **(executor.additional_parameters or {})}
    executor.packager = run.Packager()  # copies nothing: jobs run in the project's folder
    executor.job_details = JobLog()
    executor.tunnel = run.LocalTunnel(job_dir=str(base / "experiments"))
    executor.poll_estimated_start_time = False
    return executor


# -- experiments -----------------------------------------------------------------------------------


def submit(title: str, runs: Sequence[Run], executor: run.Executor, root: Path) -> int:
    """Slurm: returns when all jobs are in the queue. Local: one run after the other, to the end.

    The exit code: 0, or 1 where a local run failed or was stopped, or sbatch refused one.
    """
    if isinstance(executor, run.LocalExecutor):
        return _run_here(title, runs, executor, root)
    refusal = None
    with _experiment(title) as experiment:
        _add(experiment, runs, executor, root, Path(get_nemorun_home()))
        try:
            experiment.run(detach=True)
        except UnexpectedExit as error:
            refusal = error.result.stderr.strip()
    for task, job in zip(runs, experiment.jobs, strict=True):
        if job.launched:
            print(f"{task.name}: job {_number(job)}, run directory {task.run_dir}")
        else:
            print(f"{task.name}: not submitted", file=sys.stderr)
    if refusal is not None:
        print(f"sbatch refused: {refusal}", file=sys.stderr)
        return 1
    print(f"sgopd jobs status {experiment._id}")
    return 0


def _run_here(title: str, runs: Sequence[Run], executor: run.Executor, root: Path) -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end_children)
    try:
        with _experiment(title) as experiment:
            _add(experiment, runs, executor, root, Path(get_nemorun_home()))
            experiment.run(sequential=True, tail_logs=True)
    except KeyboardInterrupt:
        print(f"{title}: stopped; the same command resumes it", file=sys.stderr)
        return 1
    states = {job.id: job.state.name for job in experiment.jobs}
    print(f"{experiment._id}: {', '.join(f'{n} {s}' for n, s in states.items())}")
    return int(set(states.values()) != {"SUCCEEDED"})


def _end_children(number: int, frame: object) -> None:
    """The run under way stops with a checkpoint, which nemo-run waits for; no other is begun."""
    for path in Path("/proc/self/task").glob("*/children"):
        for child in path.read_text().split():
            with suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(int(child), signal.SIGTERM)
    raise KeyboardInterrupt


def _experiment(title: str) -> run.Experiment:
    return run.Experiment(title, skip_status_at_exit=True, enable_goodbye_message=False)


def dry_run(title: str, runs: Sequence[Run], executor: run.Executor, root: Path) -> str:
    """Prints what would be submitted: nothing is, and nothing stays on the disk."""
    home = get_nemorun_home()
    parts = []
    with tempfile.TemporaryDirectory() as base:
        quiet = {"clean_mode": True, "log_level": "WARNING"}
        experiment = run.Experiment(title, id=f"{title}_ID", base_dir=base, **quiet)
        with experiment:
            _add(experiment, runs, executor, root, Path(base))
            experiment.dryrun(log=False, delete_exp_dir=False)
        folder = Path(experiment._exp_dir)
        for task, job in zip(runs, experiment.jobs, strict=True):
            if isinstance(executor, run.LocalExecutor):
                text = _here(task, executor, root)
            else:
                path = folder / f"{job.executor.job_name}_sbatch.sh"
                text = f"sbatch --requeue --parsable {path}\n{path.read_text()}"
            parts.append(f"# {task.name}: run directory {task.run_dir}\n{text.rstrip()}\n")
        return "\n".join(parts).replace(base, home)


def _add(
    experiment: run.Experiment, runs: Sequence[Run], executor: run.Executor, root: Path, base: Path
) -> None:
    for task in runs:
        if isinstance(executor, run.LocalExecutor):
            script = run.Script(inline=_here(task, executor, root))
        else:
            script = run.Script(path=SCRIPT)
        script.metadata[RUN_DIR] = str(root / task.run_dir)
        experiment.add(script, executor=prepared(executor, task, root, base), name=task.name)


def _here(task: Run, executor: run.LocalExecutor, root: Path) -> str:
    return local_command(task, root, {**os.environ, **executor.env_vars})


# -- afterwards ------------------------------------------------------------------------------------


def experiments() -> list[str]:
    """Ids of all, the newest last."""
    return sorted(
        (
            path.parent.name
            for path in Path(get_nemorun_home(), "experiments").glob("*/*_*/_CONFIG")
        ),
        key=lambda name: name.rpartition("_")[2],
    )


def find(name: str) -> run.Experiment:
    """Finds an experiment by its id, or the newest of a title."""
    known = experiments()
    chosen = [each for each in known if name in (each, each.rpartition("_")[0])]
    if not chosen:
        raise ConfigError(f"no experiment {name!r}; the newest: {', '.join(known[-5:]) or 'none'}")
    experiment = run.Experiment.from_id(chosen[-1])
    if not all(RUN_DIR in getattr(task, "metadata", {}) for task in experiment.tasks):
        raise ConfigError(
            f"{chosen[-1]} was not launched by sgopd: `nemo experiment status {name}` knows it"
        )
    return experiment


def status(name: str) -> Iterator[str]:
    """A line for each run: the scheduler's word, and what the run directory holds."""
    experiment = find(name)
    states = experiment.status(return_dict=True)
    for job, task in zip(experiment.jobs, experiment.tasks, strict=True):
        run_dir = Path(task.metadata[RUN_DIR])
        status_file = run_dir / "status"
        progress = (
            status_file.read_text(encoding="utf-8").strip()
            if status_file.is_file()
            else "not begun"
        )
        metrics = run_dir / "metrics.jsonl"
        steps = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        yield (
            f"{job.id}: {states[job.id]['status']}, job {_number(job)}; {progress}, {steps} steps, "
            f"{run_dir}"
        )


def logs(name: str, run_name: str | None) -> Iterator[str]:
    """Yields what the runs' jobs have said, run after run."""
    experiment = find(name)
    names = [job.id for job in experiment.jobs]
    if run_name is not None and run_name not in names:
        raise ConfigError(f"no run {run_name!r} in {experiment._id}; it has {', '.join(names)}")
    for job in experiment.jobs:
        if run_name in (None, job.id):
            folder = Path(job.executor.job_dir)
            found = [*folder.glob("sbatch_*.out"), *folder.rglob("combined.log")]
            for path in sorted(found, key=lambda path: path.stat().st_mtime):
                yield f"==> {path} <=="
                yield path.read_text(encoding="utf-8", errors="replace")


def _number(job: Any) -> str:
    """Slurm's, of slurm_tunnel://nemo_run/NUMBER."""
    return str(job.handle).rpartition("/")[2]
