"""`sgopd launch RECIPE --executor NAME [key=value …]`: submits runs with nemo-run.

The recipe, and its place on the nodes, are checked in any environment; then the command goes on in
the one that holds nemo-run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import sys
from pathlib import Path

from megatron_sgopd.cli.common import Commands, add_command, add_recipe
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.load import load_config
from megatron_sgopd.launch.submission import (
    Executor,
    changed,
    check,
    find_executors,
    make_runs,
    project_root,
)

PYTHON = "SGOPD_LAUNCH_PYTHON"  # names an interpreter that has nemo-run
SETTINGS = {  # of an executor
    "account": "the account that is charged",
    "partition": "the partition",
    "time": "the time limit, as sbatch takes it",
    "container_image": "an image for pyxis; without one, bare",
}
LISTS = {  # options that may come more than once: the place, the form and what it is
    "--mount": ("mounts", "FROM:TO", "in the container"),
    "--env": ("env", "KEY=VALUE", "in the job's environment"),
    "--option": ("options", "KEY=VALUE", "any other option of sbatch"),
    "--sweep": ("sweep", "KEY=A,B", "a run for each value, or each combination of them"),
}


def add(commands: Commands) -> None:
    text = "submit a recipe, or a sweep of it, with nemo-run"
    command = add_command(commands, "launch", launch, text)
    add_recipe(command)
    option = command.add_argument
    option(
        "--executor",
        required=True,
        metavar="NAME",
        help="local, slurm, or one of the executors file",
    )
    option(
        "--executors", metavar="FILE", help="else ./executors.yaml, ~/.config/sgopd/executors.yaml"
    )
    option("--nodes", type=int, metavar="N", help="8, if the executor has none")
    option("--gpus-per-node", type=int, metavar="G", help="8, if the executor has none")
    for name, about in SETTINGS.items():
        option(f"--{name.replace('_', '-')}", metavar=name.upper(), help=about)
    for name, (place, kind, about) in LISTS.items():
        option(name, dest=place, metavar=kind, help=about, action="append", default=[])
    option("--experiment", metavar="TITLE", help="the experiment's; the recipe's name without it")
    option("--dry-run", action="store_true", help="print what would be submitted")


def launch(arguments: argparse.Namespace) -> int:
    root = project_root(os.environ)
    os.chdir(root)  # as the batch script does
    executor = chosen_executor(arguments)
    runs = make_runs(arguments.recipe, arguments.overrides, arguments.sweep)
    check(runs, executor, os.environ)
    title = arguments.experiment or load_config(arguments.recipe, arguments.overrides).name
    if not re.fullmatch(r"[\w.+-]+", title):
        raise ConfigError(
            f"--experiment is {title!r}; letters, digits and . _ + - only: it names a folder"
        )
    with_nemo_run()
    from megatron_sgopd.launch.nemo.experiments import build, dry_run, submit

    if arguments.dry_run:
        print(dry_run(title, runs, build(executor, root), root), end="")
        return 0
    return submit(title, runs, build(executor, root), root)


def chosen_executor(arguments: argparse.Namespace) -> Executor:
    """Returns the file's executor, with what the command line says otherwise."""
    known = find_executors(arguments.executors, os.environ)
    if arguments.executor not in known:
        raise ConfigError(
            f"--executor {arguments.executor}: known are {', '.join(sorted(known))}; others go "
            "into executors.yaml (docs/launching.md)"
        )
    names = (*SETTINGS, "nodes", "gpus_per_node", "mounts", "env", "options")
    return changed(known[arguments.executor], {name: getattr(arguments, name) for name in names})


def with_nemo_run() -> None:
    """Returns where nemo-run is; elsewhere the command line begins anew in its environment."""
    if importlib.util.find_spec("nemo_run") is not None:
        return
    beside = Path(sys.prefix).parent / ".venv-launch" / "bin" / "python"
    python = Path(os.environ.get(PYTHON) or beside)
    if not python.is_file():
        raise ConfigError(
            f"nemo-run lives in an environment of its own, and {python} does not exist: make it "
            f"with `make launch-env`, or name an interpreter that has it in {PYTHON}"
        )
    if python.absolute() == Path(sys.executable):
        raise ConfigError(f"{python} has no nemo-run: make launch-env")
    os.execv(python, [str(python), "-m", "megatron_sgopd", *sys.argv[1:]])
