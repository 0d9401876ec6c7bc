"""Runs the demonstration: world, teacher, student, one run per arm, comparison, report."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_sgopd.demo import phases
from megatron_sgopd.demo.arms import (
    DEMO_RECIPES,
    QUICK_TRAINING_SECONDS,
    TRAINING_SECONDS,
    Training,
    trainings,
)
from megatron_sgopd.demo.comparison import (
    QUICK_VERDICT,
    compare,
    read_evaluation,
    readings,
    table,
    verdict,
)
from megatron_sgopd.demo.models import STUDENT, TEACHER, write_model_dir
from megatron_sgopd.demo.world import LEVELS, QUICK_SIZES, WorldSizes, write_world

TRAINER = (sys.executable, "-m", "megatron_sgopd", "train")


class TrainingFailed(RuntimeError):
    """A run of the trainer ended early. The message is empty where the trainer has said why."""

    def __init__(self, message: str, exit_status: int) -> None:
        super().__init__(message)
        self.exit_status = exit_status


@dataclass(frozen=True)
class Options:
    """Describes what `make demo` passes on."""

    arms: tuple[str, ...]
    seed: int = 42
    level: str = "normal"
    quick: bool = False
    engine: str = "embedded"  # of the arms; teacher and student learn from worked solutions
    out: Path = Path("runs/demo")
    overrides: tuple[str, ...] = ()  # key=value, for every run of the trainer
    recipes: Path = DEMO_RECIPES
    trainer: tuple[str, ...] = TRAINER  # the command before RECIPE key=value ...

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise ValueError(f"level is {self.level!r}; allowed are {', '.join(LEVELS)}")

    @property
    def home(self) -> Path:
        """One folder per world, so that another seed does not displace this one's results."""
        engine = "" if self.engine == "embedded" else f"-{self.engine}"
        return self.out / f"{self.level}-{self.seed}{'-quick' if self.quick else ''}{engine}"


@dataclass
class Progress:
    """Numbered headings, and what each phase took."""

    total: int
    number: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    reused: list[str] = field(default_factory=list)

    def heading(self, text: str) -> None:
        self.number += 1
        print(f"\n[{self.number}/{self.total}] {text}", flush=True)


def run_demo(options: Options) -> dict[str, Any]:
    """Runs or reuses every phase; writes summary.json and report.html; returns the summary.

    Raises TrainingFailed at the first run that fails.
    """
    plans = trainings(
        options.arms,
        seed=options.seed,
        quick=options.quick,
        engine=options.engine,
        extra=options.overrides,
        recipes=options.recipes,
    )
    progress = Progress(total=len(plans) + 2)
    announce(options, plans)
    make_world(options, progress)
    for plan in plans:
        train(options, plan, progress)
    return conclude(options, progress)


def world_key(options: Options) -> str:
    """Returns what the world is made from: seed, level, sizes and the source that draws it."""
    here = Path(__file__).parent
    source = {name: (here / name).read_text() for name in ("world.py", "models.py")}
    return phases.content_key({**_world_of(options), "sizes": asdict(sizes_of(options)), **source})


def training_key(options: Options, plan: Training) -> str:
    """Returns what a run is made from; the phases it reads from must be finished."""
    return phases.content_key(
        {
            "recipe": plan.recipe.read_text(),
            "overrides": plan.overrides,
            "needs": {name: phases.results_key(options.home / name) for name in plan.needs},
            "source": phases.source_key(),
            "versions": phases.library_versions(),
        }
    )


def announce(options: Options, plans: Sequence[Training]) -> None:
    """Says what will run, and about how long that takes."""
    print(f"Sign-gated on-policy distillation, {options.level} problems, seed {options.seed}.")
    if options.quick:
        print(QUICK_VERDICT)
    to_run = runs_to_do(options, plans)
    if not to_run:
        print("Every run is there already.")
        return
    each = QUICK_TRAINING_SECONDS if options.quick else TRAINING_SECONDS
    print(
        f"To run: {', '.join(to_run)}. About {max(1, round(len(to_run) * each / 60))} min on 2 "
        f"quiet cores (an estimate; the bars below know better)."
    )


def runs_to_do(options: Options, plans: Sequence[Training]) -> list[str]:
    """The runs without a reusable result, or with one that an earlier phase will displace."""
    ready = {"world"} if phases.reusable(options.home / "world", world_key(options))[0] else set()
    for plan in plans:
        if ready.issuperset(plan.needs):
            key = training_key(options, plan)
            if phases.reusable(options.home / plan.name, key)[0]:
                ready.add(plan.name)
    return [plan.name for plan in plans if plan.name not in ready]


def make_world(options: Options, progress: Progress) -> None:
    """Problems and model directories."""
    directory, key = options.home / "world", world_key(options)
    progress.heading(f"problems and tokenizer -> {directory}")
    if _reused("world", directory, key, progress):
        return
    started = time.monotonic()
    phases.clear(directory)
    counts = write_world(directory, sizes=sizes_of(options), **_world_of(options))
    for role, size in (("teacher", TEACHER), ("student", STUDENT)):
        write_model_dir(directory / "models" / role, size)
    print(", ".join(f"{name} {count}" for name, count in counts.items()) + "; no problem twice")
    _finished("world", directory, key, started, progress)


def train(options: Options, plan: Training, progress: Progress) -> None:
    """One run of the trainer in its own process; its output goes to the screen as it is."""
    directory, key = options.home / plan.name, training_key(options, plan)
    progress.heading(f"{plan.name} -> {directory}")
    if _reused(plan.name, directory, key, progress):
        return
    phases.clear(directory)
    overrides = [o.replace("{home}", str(options.home)) for o in plan.overrides]
    command = [*options.trainer, _shown(plan.recipe), *overrides, f"logging.run_dir={directory}"]
    print(f"$ {shlex.join(command)}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, check=False).returncode
    if code > 0:
        raise TrainingFailed("", code)  # the trainer's error stays the last line on the screen
    if code < 0:
        raise TrainingFailed(f"{plan.name} was ended by signal {-code}", 128 - code)
    for needed in ("summary.json", "evaluation/final/summary.json", "hf/config.json"):
        if not (directory / needed).is_file():
            raise TrainingFailed(
                f"{plan.name} ended without {directory / needed}; was it stopped? Run the same "
                f"command again to redo it",
                1,
            )
    used = json.loads((directory / "summary.json").read_text())["engine"]
    if plan.name in options.arms and used != options.engine:
        raise TrainingFailed(
            f"{plan.name} made its rollouts with {used!r}, asked for was {options.engine!r}: no "
            f"figure of the other engine is shown as this one's (make demo ENGINE={used})",
            1,
        )
    _finished(plan.name, directory, key, started, progress)


def conclude(options: Options, progress: Progress) -> dict[str, Any]:
    """Comparison, summary.json, report.html, and the table on the screen."""
    from megatron_sgopd.evaluation.report import write_report

    progress.heading("comparison on the test problems")
    home, names = options.home, ["student", "teacher", *options.arms]
    evaluations = {name: read_evaluation(home / name) for name in names}
    runs = {name: json.loads((home / name / "summary.json").read_text()) for name in options.arms}
    comparison = compare(evaluations, runs)
    sentences = [QUICK_VERDICT] if options.quick else readings(comparison)
    summary = {
        **comparison,
        "seed": options.seed,
        "level": options.level,
        "quick": options.quick,
        "overrides": list(options.overrides),
        "verdict": verdict(comparison, quick=options.quick),
        "readings": sentences,
        "phase_seconds": progress.seconds,
        "reused": progress.reused,
        "versions": phases.library_versions(),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    summary_path, report_path = options.out / "summary.json", options.out / "report.html"
    summary_path.write_text(json.dumps(summary, indent=1) + "\n")
    write_report(
        [home / name for name in ("student", "teacher", *options.arms)],
        report_path,
        title=f"Demonstration: {options.level} problems, seed {options.seed}",
        notes=[summary["verdict"], *sentences] if not options.quick else sentences,
    )
    print(table(comparison))
    print("\nPer cent on the test problems; lift and difference in points, paired by problem.\n")
    print("\n".join(f"- {sentence}" for sentence in sentences))
    if not options.quick:
        print(f"\n{summary['verdict']}")
    print(f"\nSeconds: {_phase_seconds(progress)}.")
    print(f"{summary_path}\n{report_path}")
    return summary


def sizes_of(options: Options) -> WorldSizes:
    return QUICK_SIZES if options.quick else WorldSizes()


def _world_of(options: Options) -> dict[str, Any]:
    return {"seed": options.seed, "level": options.level}


def _phase_seconds(progress: Progress) -> str:
    return ", ".join(
        f"{name} {seconds:.0f}{' (reused)' if name in progress.reused else ''}"
        for name, seconds in progress.seconds.items()
    )


def _reused(name: str, directory: Path, key: str, progress: Progress) -> bool:
    valid, reason = phases.reusable(directory, key)
    if valid:
        progress.seconds[name] = phases.seconds_of(directory)
        progress.reused.append(name)
        print(f"reused: made in {progress.seconds[name]:.0f} s by an earlier run, nothing changed")
    elif reason:
        print(f"made again: {reason}")
    return valid


def _finished(name: str, directory: Path, key: str, started: float, progress: Progress) -> None:
    progress.seconds[name] = round(time.monotonic() - started, 1)
    phases.mark_finished(directory, key, progress.seconds[name])


def _shown(path: Path) -> str:
    """Relative to the working directory where that is shorter to read."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
