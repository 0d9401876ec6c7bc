"""The command line: `sgopd train RECIPE [key=value …]`.

Arguments and recipe are checked before torch is imported, so that help and mistakes answer at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.engines import servers_of
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.layout import replica_size
from megatron_sgopd.config.load import diff, load_config, to_yaml
from megatron_sgopd.config.schema import Config
from megatron_sgopd.versions import describe


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: done, or stopped on request with a checkpoint; 1: failed; 2: bad recipe."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"sgopd: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgopd", description="Sign-gated on-policy distillation on Megatron-Core."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, run, text in (
        ("train", train, "run a recipe; on the same run directory, resume it"),
        ("config", show_config, "print a recipe with every default and override resolved"),
        ("serve", serve, "run a vLLM server for a recipe in the foreground (rollout.vllm.urls)"),
        ("doctor", doctor, "check that a recipe's layout computes what one rank computes"),
    ):
        command = commands.add_parser(name, help=text, description=text.capitalize() + ".")
        command.add_argument("recipe", metavar="RECIPE", help="a YAML file, such as recipes/…")
        command.add_argument(
            "overrides",
            nargs="*",
            metavar="key=value",
            help="such as distill.gate.lambda_high=1.5",
        )
        command.set_defaults(run=run)
        if run is serve:
            command.add_argument(
                "--teacher",
                action="store_true",
                help="the teacher, for rollout.vllm.teacher.urls; without it the student",
            )
        if run is doctor:
            command.add_argument(
                "--parallel",
                action="store_true",
                required=True,
                help="compare the layout's loss and gradients with one rank's, on tiny models",
            )
            command.add_argument("--result", help=argparse.SUPPRESS)  # the ranks' report, as JSON
    return parser


def train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.recipe, arguments.overrides)
    place = rank_environment(os.environ)
    if place is not None:
        os.environ.update(place)
        return _run_rank(resolve(config, int(place["WORLD_SIZE"])))
    resolved = resolve(config)
    from megatron_sgopd.launch import run_ranks

    run_dir = Path(resolved.logging.run_dir or "")
    if is_finished(resolved, run_dir):
        print(
            f"{resolved.name}: finished already, see {run_dir}/summary.json. Raise num_steps to go "
            "on (from its last checkpoint, if it kept one), or give another name or "
            "logging.run_dir to run it again"
        )
        return 0
    return run_ranks(
        replica_size(resolved.parallel) * (resolved.parallel.data_parallel_size or 1),
        ["train", arguments.recipe, *arguments.overrides],
        run_dir,
    )


def doctor(arguments: argparse.Namespace) -> int:
    """Exit code 0: the layout is right; 1: it is not, or the self-test failed."""
    config = load_config(arguments.recipe, arguments.overrides)
    place = rank_environment(os.environ)
    if place is not None:
        os.environ.update(place)
        return _check_on_rank(resolve(config, int(place["WORLD_SIZE"])), arguments.result)
    resolved = resolve(config)
    from megatron_sgopd.launch import run_ranks

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
    """With `result` the verdict goes into that file, and the rank itself ends well."""
    with _as_rank(Path(result).parent if result else Path(tempfile.gettempdir())):
        from megatron_sgopd.doctor import check_parallel

        report = check_parallel(config)
    if os.environ["RANK"] == "0":
        print("\n".join(report.lines()), flush=True)
        if result:
            Path(result).write_text(json.dumps({"ok": report.ok}), encoding="utf-8")
    return 0 if result or report.ok else 1


def serve(arguments: argparse.Namespace) -> int:
    """Becomes the server; the trainer is pointed to it by rollout.vllm.urls."""
    config = resolve(load_config(arguments.recipe, [*arguments.overrides, "rollout.engine=vllm"]))
    role = "teacher" if arguments.teacher else "student"
    path = getattr(config.model, role).hf_path
    if path is None:
        raise ConfigError("--teacher: the recipe has no model.teacher.hf_path")
    vllm = servers_of(config.rollout.vllm, role)
    if vllm.api_key_variable not in os.environ:
        raise ConfigError(
            f"the environment has no {vllm.api_key_variable}, the key that trainer and server "
            "share (rollout.vllm.api_key_variable): export one secret on both sides"
        )
    from megatron_sgopd.hf_files import resolve_hf_dir
    from megatron_sgopd.parallel import pick_device
    from megatron_sgopd.vllm_server import check_port, check_version, installed_version, make_specs

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
    command = spec.command()
    os.execvpe(command[0], command, spec.environment())


def is_finished(config: Config, run_dir: Path) -> bool:
    """Whether the run directory holds this very run, done (its measured gate.eps aside)."""
    status, written = run_dir / "status", run_dir / "config.yaml"
    if not (status.is_file() and written.is_file() and (run_dir / "summary.json").is_file()):
        return False
    changed = set(diff(load_config(written), config)) - {"distill.gate.eps"}
    return status.read_text(encoding="utf-8").strip() == "finished" and not changed


def show_config(arguments: argparse.Namespace) -> int:
    print(to_yaml(resolve(load_config(arguments.recipe, arguments.overrides))), end="")
    return 0


def rank_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """This process's place in a job that torchrun or srun started; None when started by hand."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        return {k: environment[k] for k in ("RANK", "WORLD_SIZE")}
    if int(environment.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environment:
        missing = [k for k in ("MASTER_ADDR", "MASTER_PORT") if k not in environment]
        if missing:
            raise ConfigError(
                f"started by srun without {' and '.join(missing)}: export the first node's name "
                "and a free port before srun"
            )
        return {
            "RANK": environment["SLURM_PROCID"],
            "WORLD_SIZE": environment["SLURM_NTASKS"],
            "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        }
    return None


def _run_rank(config: Config) -> int:
    with _as_rank(Path(config.logging.run_dir or "")):
        from megatron_sgopd.train import main as train_main

        train_main(config)
    return 0


@contextmanager
def _as_rank(folder: Path) -> Iterator[None]:
    """Around all that a rank does; a failing import is a failure too. Errors go into `folder`."""
    from megatron_sgopd.failure import die_with_parent, failing_together

    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun killed takes its ranks with it
        die_with_parent()
    # Megatron wants kernels of one device queued in order where TP overlaps with compute.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    with failing_together(folder, int(os.environ["RANK"])):
        from megatron_sgopd.megatron_cpu import quiet

        quiet()  # before anything imports Megatron
        yield


if __name__ == "__main__":
    sys.exit(main())
