"""`sgopd bench step`: whole training steps beside TRL's DistillationTrainer. Imports no torch.

The same models (random, of the demonstration's sizes), prompts, lengths (every answer is as long as
it may be), optimizer, seed and one thread; each run in processes of its own, ours and theirs in
alternation. A step is everything between two updates: sampling, the teacher, the loss, the update;
ours also verifies the answers, in a process beside it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_sgopd.bench.kl import ALLOCATORS
from megatron_sgopd.bench.step_process import Ended, run_watched
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.recipe_files import RECIPES
from megatron_sgopd.evaluation.tables import aligned
from megatron_sgopd.versions import installed

RECIPE = RECIPES / "demo" / "opd.yaml"
ROLLOUTS = 4  # of each prompt
MICRO_BATCH = 32
NEW_TOKENS = 32
ENVIRONMENTS = ("same", "shipped")
ALLOCATOR = ("GLIBC_TUNABLES", "MALLOC_")  # what begins like this chooses how memory is reused
REPEATS = 3
THEIRS = "TRL DistillationTrainer"


@dataclass(frozen=True)
class Size:
    prompts: int  # of a step
    steps: int  # of a run; the first is not counted


SIZES = {22: Size(32, 16), 32_768: Size(16, 4)}  # by the vocabulary; a short run is all warm-up


@dataclass(frozen=True)
class Options:
    """Describes what the command line says."""

    json: Path | None = None
    vocab: int = 22
    environment: str = "same"
    repeats: int = REPEATS


@dataclass(frozen=True)
class Work:
    """Describes what both trainers are given."""

    student: str
    teacher: str
    data: str
    prompts: int
    steps: int
    never_sampled: int  # a token id beyond the vocabulary, the only one that ends an answer
    rollouts: int = ROLLOUTS
    micro_batch: int = MICRO_BATCH
    new_tokens: int = NEW_TOKENS
    learning_rate: float = 7.0e-4  # the demonstration's
    seed: int = 42


@dataclass(frozen=True)
class Run:
    """One run of a trainer: its steps after the first, and its memory's peak."""

    seconds: list[float]
    cpu_seconds: list[float]  # of the trainer's process: what a busy machine does not change much
    tokens: int
    trainer_mb: float
    all_mb: float


def run_step(options: Options) -> int:
    """Exit code 0: measured; 1: a trainer ended early.

    Raises:
        ConfigError: TRL is not there, or the file cannot be written.
    """
    if installed("trl") is None:
        raise ConfigError("TRL is not installed here; its environment is made by: make bench-env")
    size = SIZES[options.vocab]
    found: dict[str, list[Run]] = {name: [] for name in (*OURS, THEIRS)}
    with tempfile.TemporaryDirectory(prefix="sgopd-bench-") as name:
        folder = Path(name)
        _finish([*_python("step_world"), str(folder), str(options.vocab)], _threads(), "the models")
        work = Work(
            student=str(folder / "student"),
            teacher=str(folder / "teacher"),
            data=str(folder / "world" / "train.jsonl"),
            prompts=size.prompts,
            steps=size.steps,
            never_sampled=options.vocab,
        )
        for repeat in range(options.repeats):
            for name in found:
                run = _run(name, work, folder / f"{len(found[name])}", options.environment)
                found[name].append(run)
                median = statistics.median(run.seconds)
                print(f"{repeat + 1}: {name}: {median:.3f} s", file=sys.stderr, flush=True)
    rows = _rows(found, options)
    print(_table(rows))
    if options.json is not None:
        _write(options.json, rows)
    return 0


OURS = {"sgopd sampled": "sampled", "sgopd full_vocab": "full_vocab"}  # -> estimator


def _run(name: str, work: Work, folder: Path, environment: str) -> Run:
    variables = _variables(environment)
    if name in OURS:
        return _ours(work, OURS[name], folder / OURS[name], variables)
    return _theirs(work, folder, variables, shipped=environment == "shipped")


def _ours(work: Work, estimator: str, run_dir: Path, variables: dict[str, str]) -> Run:
    overrides = [
        f"model.student.hf_path={work.student}",
        f"model.teacher.hf_path={work.teacher}",
        "parallel.tensor_model_parallel_size=1",
        f"parallel.micro_batch_size={work.micro_batch}",
        f"distill.estimator={estimator}",
        f"rollout.num_prompts={work.prompts}",
        f"rollout.n={work.rollouts}",
        f"rollout.max_new_tokens={work.new_tokens}",
        f"rollout.stop_token_ids=[{work.never_sampled}]",
        f"optimizer.lr={work.learning_rate}",
        "optimizer.lr_warmup_steps=0",
        f"data.train={work.data}",
        "data.shuffle=false",
        "evaluation.data=null",
        "evaluation.during_data=null",
        "evaluation.every=0",
        "evaluation.at_end=false",
        "checkpoint.save_hf=false",
        f"num_steps={work.steps}",
        f"seed={work.seed}",
        f"logging.run_dir={run_dir}",
        "logging.progress=false",
    ]
    command = [sys.executable, "-m", "megatron_sgopd", "train", str(RECIPE), *overrides]
    ended = _finish(command, variables, "our trainer")
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line) for line in lines][1:]
    seconds, cpu = ([step[f"time/{name}_s"] for step in steps] for name in ("step", "step_cpu"))
    return Run(seconds, cpu, int(steps[-1]["train/tokens"]), ended.largest_mb, ended.all_mb)


def _theirs(work: Work, folder: Path, variables: dict[str, str], *, shipped: bool) -> Run:
    """`accelerate launch` is how TRL's documents start its trainers."""
    folder.mkdir(exist_ok=True)
    result = folder / "trl.json"
    command = _python("step_trl")
    if shipped:
        options = ("--cpu", "--num_processes=1", "--num_machines=1", "--mixed_precision=no")
        launcher = ("accelerate.commands.launch", *options, "--dynamo_backend=no", "-m")
        command = [sys.executable, "-m", *launcher, command[-1]]
    ended = _finish([*command, json.dumps(asdict(work)), str(result)], variables, THEIRS)
    measured = json.loads(result.read_text(encoding="utf-8"))
    seconds, cpu = measured["seconds"][1:], measured["cpu_seconds"][1:]
    return Run(seconds, cpu, measured["tokens"], ended.largest_mb, ended.all_mb)


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", f"megatron_sgopd.bench.{module}"]


def _threads() -> dict[str, str]:
    """One thread, and nothing is looked for on a hub."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, "OMP_NUM_THREADS": "1", **quiet}


def _variables(environment: str) -> dict[str, str]:
    """`same`: both reuse freed memory; `shipped`: each launcher sets what it sets, if anything."""
    variables = {k: v for k, v in _threads().items() if not k.startswith(ALLOCATOR)}
    return variables | ALLOCATORS["reuse"] if environment == "same" else variables


def _finish(command: Sequence[str], environment: dict[str, str], who: str) -> Ended:
    """Runs it to its end. Raises StepFailed with the last lines of what it printed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as output:
        ended = run_watched(command, environment, output)
        if ended.exit_code:
            output.seek(0)
            last = "".join(output.readlines()[-15:])
            raise StepFailed(f"{who} ended with exit code {ended.exit_code}:\n{last}")
    return ended


class StepFailed(RuntimeError):
    """A trainer ended before it had made its steps."""


# -- what comes out --------------------------------------------------------------------------------


def _rows(found: dict[str, list[Run]], options: Options) -> list[dict[str, Any]]:
    figures = {name: _figures(runs) for name, runs in found.items()}
    other = figures[THEIRS]
    rows = []
    for name, own in figures.items():
        package = "megatron_sgopd" if name in OURS else "trl"
        row: dict[str, Any] = {
            "name": name,
            "ours": name in OURS,
            "vocab": options.vocab,
            "environment": options.environment,
            "time_ratio_to_trl": own["seconds_per_step"] / other["seconds_per_step"],
            "cpu_ratio_to_trl": own["cpu_seconds_per_step"] / other["cpu_seconds_per_step"],
            "memory_ratio_to_trl": own["trainer_peak_mb"] / other["trainer_peak_mb"],
            **own,
            "package": package,
            "version": installed(package),
        }
        rows.append({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()})
    return rows


def _figures(runs: Sequence[Run]) -> dict[str, float]:
    """Medians over the steps of all runs; of memory over the runs."""
    seconds = [s for run in runs for s in run.seconds]
    return {
        "seconds_per_step": statistics.median(seconds),
        "fastest_step": min(seconds),
        "slowest_step": max(seconds),
        "cpu_seconds_per_step": statistics.median(s for run in runs for s in run.cpu_seconds),
        "trainer_peak_mb": statistics.median(run.trainer_mb for run in runs),
        "all_processes_peak_mb": statistics.median(run.all_mb for run in runs),
        "tokens_per_step": runs[-1].tokens,
        "steps": len(seconds),
        "runs": len(runs),
    }


COLUMNS = (  # heading, key of a row, format
    ("time/TRL", "time_ratio_to_trl", ".2f"),
    ("CPU time/TRL", "cpu_ratio_to_trl", ".2f"),
    ("s a step", "seconds_per_step", ".3f"),
    ("CPU s", "cpu_seconds_per_step", ".3f"),
    ("fastest", "fastest_step", ".3f"),
    ("slowest", "slowest_step", ".3f"),
    ("memory/TRL", "memory_ratio_to_trl", ".2f"),
    ("trainer MB", "trainer_peak_mb", ".0f"),
    ("all MB", "all_processes_peak_mb", ".0f"),
)


def _table(rows: Sequence[dict[str, Any]]) -> str:
    first = rows[0]
    title = (
        f"vocabulary {first['vocab']:,}, environment {first['environment']}: "
        f"{first['tokens_per_step']} tokens a step, medians of {first['steps']} steps in "
        f"{first['runs']} runs"
    )
    head = ("", *(heading for heading, _, _ in COLUMNS))
    lines = [head, *((r["name"], *(format(r[k], f) for _, k, f in COLUMNS)) for r in rows)]
    return f"{title}\n{aligned(lines, rule=False)}"


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    try:
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written ({error.strerror})") from error
