"""`python -m megatron_sgopd.bench`: what `sgopd bench` starts. Imports no torch.

Arguments are checked here, before the workers import it.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_sgopd.bench import step
from megatron_sgopd.bench.cases import Shape
from megatron_sgopd.bench.kl import ALLOCATORS, ROUNDS, Options, WorkerFailed, run_kl
from megatron_sgopd.config.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """Return exit code 0: done; 1: something failed; 2: refused; 130: interrupted."""
    arguments = _parser().parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except ConfigError as error:
        print(f"sgopd bench: {error}", file=sys.stderr)
        return 2
    except (WorkerFailed, step.StepFailed) as error:
        print(f"sgopd bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sgopd bench", description="Ours beside its baselines, as ratios in one run."
    )
    commands = parser.add_subparsers(metavar="WHAT", required=True)
    _add_kl(commands.add_parser("kl", help="the loss", description=_first_line(_kl)))
    _add_step(commands.add_parser("step", help="whole steps", description=_first_line(_step)))
    _add_plot(commands.add_parser("plot", help="figures of the loss's rows"))
    return parser


def _add_kl(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_kl)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    command.add_argument("--small", action="store_true", help="a smoke form of seconds")
    command.add_argument(
        "--rounds",
        type=_positive,
        metavar="N",
        help=f"of every case; default up to {ROUNDS}, at least 3, as time allows",
    )
    command.add_argument(
        "--only",
        default="",
        metavar="NAME",
        help="cases whose name contains it, such as fused, bf16, tp2 or 'logits jsd'",
    )
    command.add_argument("--allocator", choices=[*ALLOCATORS, "both"], default="both")
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    command.add_argument(
        "--shapes",
        type=_shape,
        nargs="+",
        default=(),
        metavar="TxV",
        help="tokens and vocabulary in place of the default ones, such as 512x32768",
    )


def _kl(arguments: argparse.Namespace) -> int:
    """Measure the loss beside its baselines: time, memory, collectives, gradient error."""
    given = {k: v for k, v in vars(arguments).items() if k != "run"}
    return run_kl(Options(**given))


def _add_step(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_step)
    command.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    command.add_argument("--vocab", type=int, choices=[*step.SIZES], default=22)
    command.add_argument(
        "--environment",
        choices=step.ENVIRONMENTS,
        default="same",
        help="same: both reuse memory (glibc); shipped: each as its own launcher starts it",
    )
    command.add_argument("--repeats", type=_positive, metavar="N", default=step.REPEATS)


def _step(arguments: argparse.Namespace) -> int:
    """Seconds and memory of a training step beside TRL's DistillationTrainer."""
    given = {k: v for k, v in vars(arguments).items() if k != "run"}
    return step.run_step(step.Options(**given))


def _add_plot(command: argparse.ArgumentParser) -> None:
    command.set_defaults(run=_plot)
    command.add_argument("file", type=Path, metavar="FILE", help="of `sgopd bench kl --json`")
    command.add_argument("--out", type=Path, required=True, metavar="DIR", help="such as docs/")


def _plot(arguments: argparse.Namespace) -> int:
    """Draw time and memory against tokens, vocabulary and tensor-parallel size."""
    from megatron_sgopd.bench.plots import plot

    for path in plot(arguments.file, arguments.out):
        print(path)
    return 0


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of rounds; one or more are wanted")
    return int(text)


def _shape(text: str) -> Shape:
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no shape; wanted TxV, such as 512x32768")
    return int(found[1]), int(found[2])


def _first_line(function: object) -> str:
    return (function.__doc__ or "").splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
