"""`sgopd doctor [--parallel] RECIPE [key=value …]`: pre-flight checks of a recipe.

`sgopd doctor --numerics` tries a loss instead: `cli.numerics`.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path

from megatron_sgopd.cli import numerics
from megatron_sgopd.cli.common import Commands, add_command, add_recipe, as_rank, rank_environment
from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.layout import replica_size
from megatron_sgopd.config.load import load_config
from megatron_sgopd.config.schema import Config
from megatron_sgopd.versions import describe


def add(commands: Commands) -> None:
    text = "check a recipe's models, data and versions, or that its layout or a loss computes right"
    command = add_command(commands, "doctor", doctor, text)
    add_recipe(command, optional=True)
    command.add_argument(
        "--parallel",
        action="store_true",
        help="instead, compare the layout's loss and gradients with one rank's, on tiny models",
    )
    numerics.add_arguments(command)
    command.add_argument("--result", help=argparse.SUPPRESS)  # the ranks' report, as JSON


def doctor(arguments: argparse.Namespace) -> int:
    """Exit code 0: nothing is wrong; 1: something is, or the self-test failed."""
    if arguments.numerics:
        return numerics.check_numerics(arguments)
    numerics.refuse_elsewhere(arguments)
    if arguments.recipe is None:
        raise ConfigError("doctor wants a RECIPE, such as recipes/…, or --numerics")
    config = load_config(arguments.recipe, arguments.overrides)
    place = rank_environment(os.environ)
    resolved = resolve(config, int(place["WORLD_SIZE"]) if place else None)
    if not arguments.parallel:
        return _check_recipe(resolved)
    if place is not None:
        os.environ.update(place)
        return _check_on_rank(resolved, arguments.result)
    return _start_ranks(resolved, arguments)


def _check_recipe(config: Config) -> int:
    from megatron_sgopd.preflight.recipe_check import check_recipe

    findings = check_recipe(config)
    for finding in findings:
        print(f"{finding.about:<15}{finding.level:<9}{finding.what}")
        for label, text in (("why", finding.why), ("do", finding.fix)):
            if text:
                print(f"{'':<15}{label:<9}{text}")
    count = {level: sum(f.level == level for f in findings) for level in ("error", "warning")}
    counted = f"{count['error']} error(s), {count['warning']} warning(s)"
    print(f"FAILED: {counted}" if count["error"] else f"ok: {counted}")
    return int(count["error"] > 0)


def _start_ranks(resolved: Config, arguments: argparse.Namespace) -> int:
    from megatron_sgopd.distributed.torchrun import run_ranks

    # Replicas differ in their data alone: two of them show what any number would.
    replicas = resolved.parallel.data_parallel_size or 1
    replicas = 2 if replicas % 2 == 0 else replicas
    ranks = replica_size(resolved.parallel) * replicas
    print(f"versions   {describe()}")
    print(f"{resolved.name}: starting {ranks} ranks", flush=True)
    with tempfile.TemporaryDirectory(prefix="sgopd-doctor-") as folder:
        result = Path(folder) / "result.json"
        fewer = [*arguments.overrides, f"parallel.data_parallel_size={replicas}"]
        code = run_ranks(
            ranks,
            ["doctor", "--parallel", "--result", str(result), arguments.recipe, *fewer],
            Path(folder),
        )
        return code or int(not json.loads(result.read_text(encoding="utf-8"))["ok"])


def _check_on_rank(config: Config, result: str | None) -> int:
    """Checks the layout; with `result` the verdict goes into that file and the rank ends well."""
    with as_rank(Path(result).parent if result else Path(tempfile.gettempdir())):
        from megatron_sgopd.preflight.layout_check import check_parallel

        report = check_parallel(config)
    if os.environ["RANK"] == "0":
        print("\n".join(report.lines()), flush=True)
        if result:
            Path(result).write_text(json.dumps({"ok": report.ok}), encoding="utf-8")
    return 0 if result or report.ok else 1
