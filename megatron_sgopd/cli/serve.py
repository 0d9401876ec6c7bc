"""`sgopd serve RECIPE [key=value …]`: a vLLM server in the foreground."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path

from megatron_sgopd.cli.common import Commands, add_command, add_recipe
from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.engines import servers_of
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.load import load_config


def add(commands: Commands) -> None:
    text = "run a vLLM server for a recipe in the foreground (rollout.vllm.urls)"
    command = add_command(commands, "serve", serve, text)
    add_recipe(command)
    command.add_argument(
        "--teacher",
        action="store_true",
        help="the teacher, for rollout.vllm.teacher.urls; without it the student",
    )
    command.add_argument(
        "--restarts",
        type=int,
        default=0,
        metavar="N",
        help="start it again so often when it dies; the trainer then gives it the weights again",
    )


def serve(arguments: argparse.Namespace) -> int:
    """Serves until it ends or is ended (Ctrl-C, SIGTERM, SIGUSR1), for a trainer's vllm.urls."""
    config = resolve(load_config(arguments.recipe, [*arguments.overrides, "rollout.engine=vllm"]))
    role = "teacher" if arguments.teacher else "student"
    path = getattr(config.model, role).hf_path
    if path is None:
        raise ConfigError("--teacher: the recipe has no model.teacher.hf_path")
    vllm = servers_of(config.rollout.vllm, role)
    if not os.environ.get(vllm.api_key_variable):
        raise ConfigError(
            f"the environment has no {vllm.api_key_variable}, the key that trainer and server "
            "share (rollout.vllm.api_key_variable): export one secret on both sides"
        )
    from megatron_sgopd.distributed.groups import pick_device
    from megatron_sgopd.model.hf_location import resolve_hf_dir
    from megatron_sgopd.rollouts.vllm_servers.server import (
        check_port,
        check_version,
        installed_version,
        make_specs,
    )

    check_version(installed_version(vllm.python), vllm, vllm.python or "this environment")
    port = config.rollout.vllm.port or 8000
    check_port(vllm.host, port)
    (spec,) = make_specs(
        replace(vllm, num_engines=1, port=port, devices=None),
        resolve_hf_dir(path),
        role,
        Path(config.logging.run_dir or "") / "engines",
        on_gpu=pick_device().type == "cuda",
        key=os.environ[vllm.api_key_variable],
    )
    print(f"{config.name}: serving {spec.model} at {spec.url}", flush=True)
    return _keep(spec.command(), spec.environment(), arguments.restarts)


def _keep(command: list[str], environment: dict[str, str], restarts: int) -> int:
    """Runs the server; 0 where it was ended from here, else the last one's exit code."""
    from megatron_sgopd.rollouts.vllm_servers.supervisor import supervise

    code = 0
    for left in range(restarts, -1, -1):
        pipe, held = os.pipe()  # nobody's end closes: it ends by a signal
        try:
            code = supervise(command, environment, pipe)
        finally:
            os.close(held)
        if code == 0:
            break
        print(f"the server ended with exit code {code}; {left} restarts left", flush=True)
    return abs(code)
