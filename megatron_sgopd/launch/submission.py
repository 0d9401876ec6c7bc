"""Reads what `sgopd launch` submits: where (executors, of a user's file) and what (runs).

Nothing here knows nemo-run, so that mistakes are found before it is loaded, in any environment. A
run on Slurm is `slurm/sgopd_8node.sh` with the options of its own #SBATCH lines: what a person
submits with sbatch.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.load import load_config
from megatron_sgopd.config.schema import Config
from megatron_sgopd.launch.placement import place

SCRIPT = "slurm/sgopd_8node.sh"
FILE = "executors.yaml"  # in the project's folder, else in ~/.config/sgopd
KINDS = ("local", "slurm")
NUMBERS, LISTS, MAPPINGS = ("nodes", "gpus_per_node"), ("mounts",), ("env", "options")
DEFAULT_NODES, DEFAULT_GPUS = 8, 8
KEYS = {  # of mappings: what they look like
    "env": (r"[A-Za-z_]\w*", "a variable's name and its value"),
    "options": (r"[a-z][\w-]*", "an option of sbatch and its value"),
}


@dataclass(frozen=True)
class Executor:
    """Describes where runs go; None: as the batch script's #SBATCH lines say, or else the site."""

    kind: str = "slurm"
    account: str | None = None
    partition: str | None = None
    nodes: int | None = None
    gpus_per_node: int | None = None
    time: str | None = None
    container_image: str | None = None
    mounts: tuple[str, ...] = ()  # FROM:TO
    env: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)  # others of sbatch: {qos: high}


@dataclass(frozen=True)
class Run:
    name: str
    recipe: str
    overrides: tuple[str, ...]
    config: Config

    @property
    def run_dir(self) -> str:
        return self.config.logging.run_dir or f"runs/{self.name}"


# -- executors -------------------------------------------------------------------------------------


def find_executors(given: str | None, environment: Mapping[str, str]) -> dict[str, Executor]:
    """Reads those of the file that was named, or else of the first that is there; and local
    and slurm.
    """
    if given is not None and not Path(given).is_file():
        raise ConfigError(f"--executors: {given} does not exist")
    home = Path(environment.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    files = [Path(given)] if given else [Path(FILE), home / "sgopd" / FILE]
    found = next((read_executors(path) for path in files if path.is_file()), {})
    return {kind: Executor(kind) for kind in KINDS} | found


def read_executors(path: Path) -> dict[str, Executor]:
    """{name: executor} of a YAML file.

    Raises:
        ConfigError: naming file, executor and key, what came and what is wanted.
    """
    try:  # all scalars are text: 12:00:00 is a time, and no number
        tree = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML ({error})".replace("\n", " ")) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: NAME: {{account: …, partition: …, …}} is wanted, for each")
    return {name: _executor(name, tree[name], f"{path}, {name}") for name in tree}


def _executor(name: str, settings: Any, where: str) -> Executor:
    if not isinstance(settings, dict):
        raise ConfigError(f"{where}: {settings!r}; a mapping is wanted, such as {{account: …}}")
    known = [each.name for each in fields(Executor)]
    for key, value in settings.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(
                f"{where}: unknown key {key!r}; {hint} Other options of sbatch go under 'options'"
            )
        wanted = dict if key in MAPPINGS else list if key in LISTS else str
        if not isinstance(value, wanted):
            names = {dict: "a mapping", list: "a list", str: "one value"}
            raise ConfigError(f"{where}: {key} is {value!r}; {names[wanted]} is wanted")
        if isinstance(value, list) and not all(isinstance(each, str) for each in value):
            raise ConfigError(f"{where}: {key} is {value!r}; a list of texts is wanted")
        if isinstance(value, dict):
            _check_mapping(key, value, f"{where}: {key}")
    values: dict[str, Any] = {"kind": name if name in KINDS else "slurm", **settings}
    values |= {key: _count(values[key], f"{where}: {key}") for key in NUMBERS if key in values}
    values |= {key: tuple(values[key]) for key in LISTS if key in values}
    if values["kind"] not in KINDS:
        raise ConfigError(f"{where}: kind is {values['kind']!r}; one of {', '.join(KINDS)}")
    if values["kind"] == "local" and (other := sorted(settings.keys() - {"kind", "env"})):
        raise ConfigError(f"{where}: a local run takes no {' or '.join(other)}")
    return Executor(**values)


def _check_mapping(key: str, given: Mapping[str, Any], where: str) -> None:
    form, wanted = KEYS[key]
    for name, value in given.items():
        if not re.fullmatch(form, name) or not isinstance(value, str):
            raise ConfigError(f"{where}: {name!r} is {value!r}; {wanted} are wanted")
        own = name.replace("-", "_")
        if key == "options" and own in [each.name for each in fields(Executor)]:
            raise ConfigError(f"{where}: {name} is a setting of its own: give it as {own}")


def _count(text: str, where: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"{where} is {text!r}; a number from 1 on is wanted")
    return int(text)


def changed(executor: Executor, settings: Mapping[str, Any]) -> Executor:
    """Applies the command line's settings; `env`, `mounts` and `options` are added."""
    given = {key: value for key, value in settings.items() if value not in (None, [])}
    if executor.kind == "local" and (other := sorted(given.keys() - {"env"})):
        raise ConfigError(f"a local run takes no {' or '.join(other)}: another --executor does")
    for key in NUMBERS:
        if key in given:
            given[key] = _count(str(given[key]), f"--{key.replace('_', '-')}")
    for key in MAPPINGS:
        option = f"--{key.removesuffix('s')}"
        chosen = pairs(option, given.get(key, ()))
        _check_mapping(key, chosen, option)
        given[key] = {**getattr(executor, key), **chosen}
    given["mounts"] = (*executor.mounts, *given.get("mounts", ()))
    return replace(executor, **given)


def pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    """{KEY: VALUE} of KEY=VALUE …"""
    for text in texts:
        if not re.match(r"[A-Za-z_][\w-]*=", text):
            raise ConfigError(f"{option} {text!r}: KEY=VALUE is wanted")
    return dict(text.split("=", 1) for text in texts)


# -- runs ------------------------------------------------------------------------------------------


def make_runs(recipe: str, overrides: Sequence[str], sweeps: Sequence[str]) -> list[Run]:
    """One run, or one for each combination of the sweeps' values, with names of their own.

    Raises:
        ConfigError: a recipe that cannot be; two runs of one name.
    """
    base = load_config(recipe, overrides)
    axes = [parse_sweep(text) for text in sweeps]
    if not axes:
        return [Run(base.name, recipe, tuple(overrides), base)]
    keys = [key for key, _ in axes]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"--sweep: {twice[0]} comes twice: give all its values in one")
    labels = [key.rpartition(".")[2] for key in keys]
    labels = labels if len(set(labels)) == len(labels) else keys
    runs = []
    for values in itertools.product(*(values for _, values in axes)):
        parts = [f"{label}-{value}" for label, value in zip(labels, values, strict=True)]
        name = "-".join([base.name, *map(_word, parts)])
        settings = [f"{key}={value}" for key, value in zip(keys, values, strict=True)]
        settings.append(f"name={name}")
        if base.logging.run_dir:  # else the name says it
            folder = base.logging.run_dir.rstrip("/") + name.removeprefix(base.name)
            settings.append(f"logging.run_dir={folder}")
        both = (*overrides, *settings)
        runs.append(Run(name, recipe, both, load_config(recipe, both)))
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        same = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"--sweep: two runs would be called {same}: give values that differ")
    return runs


def parse_sweep(text: str) -> tuple[str, list[str]]:
    """KEY=A,B,… : the key and its values as they are written; brackets and quotes hold commas."""
    key, _, values = text.partition("=")
    wanted = f"--sweep {text!r}: key=VALUE,VALUE is wanted, such as optimizer.lr=1e-5,3e-5"
    if not key or key in ("name", "logging.run_dir"):
        raise ConfigError(f"{wanted}; name and logging.run_dir are made from it")
    line = f"[{values}]"
    try:
        node = yaml.compose(line, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{wanted} (values are YAML)") from error
    assert node is not None, "a flow sequence"
    found = [line[v.start_mark.index : v.end_mark.index].strip() for v in node.value]
    if not found:
        raise ConfigError(wanted)
    return key, found


def _word(text: str) -> str:
    """Writes a value as names of runs have it: 1.5 is 1p5."""
    return re.sub(r"[^\w+-]+", "_", re.sub(r"(?<=\d)\.(?=\d)", "p", text)).strip("_")


def check(runs: Sequence[Run], executor: Executor, environment: Mapping[str, str]) -> None:
    """ConfigError where a run cannot be on these nodes, before anything is submitted."""
    for run in runs:
        if executor.kind == "local":
            resolve(run.config)
            continue
        nodes = executor.nodes or DEFAULT_NODES
        env = {**environment, **executor.env}
        processes = env.get("SGOPD_PROCESSES_PER_NODE") or executor.gpus_per_node or DEFAULT_GPUS
        config = run.config
        if engines := env.get("SGOPD_ENGINE_NODES"):
            placed = (*run.overrides, f"rollout.vllm.nodes={engines}")
            config = load_config(run.recipe, placed)
        names = [f"node{i + 1}" for i in range(nodes)]
        place(
            config,
            names,
            _count(str(processes), "SGOPD_PROCESSES_PER_NODE"),
            0,
            on_gpus=env.get("SGOPD_DEVICE") != "cpu",
        )


# -- commands --------------------------------------------------------------------------------------


def local_command(run: Run, root: Path, environment: Mapping[str, str]) -> str:
    """`sgopd train`, which starts its own ranks; by the batch script's rule for the interpreter."""
    python = environment.get("SGOPD_PYTHON") or str(root / ".venv" / "bin" / "python")
    command = [python, "-m", "megatron_sgopd", "train", run.recipe, *run.overrides]
    return f"cd {shlex.quote(str(root))}\nexec {shlex.join(command)}"


def batch_commands(
    run: Run, root: Path, image: str | None, mounts: Sequence[str], env: Mapping[str, str]
) -> str:
    """Returns what a batch job does: it becomes the batch script, in the project's folder."""
    variables = {"SGOPD_ROOT": str(root)}
    if image:
        variables["SGOPD_CONTAINER"] = image
    if mounts:
        variables["SGOPD_MOUNTS"] = ",".join(mounts)
    return "\n".join(
        [
            *(f"export {key}={shlex.quote(value)}" for key, value in {**variables, **env}.items()),
            f"cd {shlex.quote(str(root))}",
            f"exec bash {SCRIPT} {shlex.join([run.recipe, *run.overrides])}",
        ]
    )


def project_root(environment: Mapping[str, str]) -> Path:
    """The project's folder, by the batch script's rule."""
    root = Path(environment.get("SGOPD_ROOT") or os.getcwd()).absolute()
    if not (root / SCRIPT).is_file():
        raise ConfigError(
            f"there is no {SCRIPT} in {root}: call it from the project's folder, or export "
            "SGOPD_ROOT"
        )
    return root


def sbatch_options(script: Path) -> dict[str, str | bool]:
    """{option: value} of a batch script's #SBATCH lines; True where it takes none."""

    def lines() -> Iterator[tuple[str, str | bool]]:
        for line in script.read_text(encoding="utf-8").splitlines():
            if match := re.match(r"#SBATCH --([a-z-]+)(?:=(\S+))?", line):
                yield match[1].replace("-", "_"), match[2] or True

    return dict(lines())
