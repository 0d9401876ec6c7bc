"""Serves nemo-run's own command: `nemorun sgopd train --factory RECIPE … key=value`.

Every recipe of the project's folder is a factory, every executor of the user's file one too. A run
is submitted as `sgopd launch` submits it, whatever executor it is given.
"""

import inspect
import json
import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args

import nemo_run as run

from megatron_sgopd.config.load import diff, load_config
from megatron_sgopd.config.schema import Config
from megatron_sgopd.launch.nemo.experiments import build, dry_run, submit
from megatron_sgopd.launch.submission import (
    Executor,
    check,
    find_executors,
    make_runs,
    project_root,
)

KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _resolved(cls: type) -> inspect.Signature:
    """Resolves names to types, in the form in which nemo-run can read values."""
    signature = inspect.signature(cls, eval_str=True)
    parameters = []
    for parameter in signature.parameters.values():
        kind = parameter.annotation
        if is_dataclass(kind) and isinstance(kind, type):
            _resolved(kind)
        if isinstance(kind, UnionType):  # it knows Optional[float] and not float | None
            parameter = parameter.replace(annotation=Union[get_args(kind)])  # noqa: UP007
        parameters.append(parameter)
    cls.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return inspect.signature(cls)


def _train(ctx: run.cli.RunContext, recipe: str, **sections: Any) -> None:
    """Distil a student: --factory NAME takes a file of recipes/, key=value changes it."""
    root = project_root(os.environ)
    config = Config(**sections)
    changes = diff(load_config(recipe), config)
    overrides = [f"{key}={json.dumps(value)}" for key, (_, value) in changes.items()]
    runs = make_runs(recipe, overrides, [])  # read again, by our own rules
    executor = ctx.executor or run.LocalExecutor()
    check(runs, _described(executor), os.environ)
    if ctx.dryrun:
        print(dry_run(config.name, runs, executor, root))
    elif submit(config.name, runs, executor, root):
        raise SystemExit(1)


_train.__name__ = "train"
_train.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
    [
        inspect.Parameter("ctx", KEYWORD, annotation=run.cli.RunContext),
        inspect.Parameter("recipe", KEYWORD, annotation=str),
        *(each.replace(kind=KEYWORD) for each in _resolved(Config).parameters.values()),
    ]
)
train = run.cli.entrypoint(_train, namespace="sgopd", type="experiment")


def _described(executor: run.Executor) -> Executor:
    """Lists what there is to check of it."""
    if not isinstance(executor, run.SlurmExecutor):
        return Executor("local")
    return Executor(
        nodes=executor.nodes, gpus_per_node=executor.gpus_per_node, env=executor.env_vars
    )


def _configured(value: Any) -> Any:
    """A dataclass as nemo-run configures it, field by field."""
    if not is_dataclass(value) or isinstance(value, type):
        return value
    settings = {each.name: _configured(getattr(value, each.name)) for each in fields(value)}
    return run.Config(type(value), **settings)


def _offer(recipe: Path) -> None:
    """A recipe as a factory; recipes/demo/sg_opd.yaml is demo_sg_opd."""
    name = "_".join(recipe.with_suffix("").parts[1:])

    def factory() -> run.Partial:
        config = load_config(recipe)
        sections = {each.name: _configured(getattr(config, each.name)) for each in fields(config)}
        return run.Partial(train, recipe=str(recipe), **sections)

    factory.__name__, factory.__doc__ = name, f"{recipe}"
    run.cli.factory(factory, target=train, name=name)


def _offer_executor(name: str, executor: Executor) -> None:
    """run.executor=NAME, for those of the user's file too."""
    kind = run.LocalExecutor if executor.kind == "local" else run.SlurmExecutor

    def factory() -> run.Executor:
        return build(executor, project_root(os.environ)).to_config()

    factory.__name__ = name
    run.cli.factory(factory, target=kind, name=name)


for _name, _executor in find_executors(None, os.environ).items():
    _offer_executor(_name, _executor)
for _recipe in sorted(Path("recipes").rglob("*.yaml")):
    _offer(_recipe)
