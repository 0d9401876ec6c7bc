"""`python -m megatron_sgopd.demo`: the demonstration from a command line. Imports no torch."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from megatron_sgopd.demo.arms import DEFAULT_ARMS, available_arms, chosen_arms
from megatron_sgopd.demo.driver import Options, TrainingFailed, run_demo
from megatron_sgopd.demo.world import LEVELS


def main(arguments: list[str] | None = None) -> int:
    parser = build_parser()
    args = parser.parse_args(arguments)
    for override in args.overrides:
        if "=" not in override:
            parser.error(f"{override!r} is no override; wanted key=value")
    try:
        options = Options(
            arms=tuple(chosen_arms(args.arms)),
            seed=args.seed,
            level=args.level,
            quick=args.quick,
            engine=args.engine,
            out=args.out,
            overrides=tuple(args.overrides),
        )
    except ValueError as error:
        parser.error(str(error))
    try:
        run_demo(options)
    except TrainingFailed as error:
        if str(error):
            print(f"\ndemo: {error}", file=sys.stderr)
        return error.exit_status
    except KeyboardInterrupt:
        print(
            "\ndemo: interrupted; run again to go on after the last finished phase", file=sys.stderr
        )
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m megatron_sgopd.demo",
        description="Trains a small teacher and student, distils by each arm, and compares them.",
    )
    parser.add_argument("--seed", type=int, default=42, help="problems, weights and sampling")
    parser.add_argument(
        "--level", choices=list(LEVELS), default="normal", help="longer chains: hard"
    )
    parser.add_argument("--quick", action="store_true", help="smoke form, no claim on accuracy")
    parser.add_argument(
        "--engine",
        choices=["embedded", "vllm"],
        default="embedded",
        help="what makes the arms' rollouts; vllm after `make vllm`",
    )
    parser.add_argument(
        "--arms",
        help=f"names with commas, or all; default {','.join(DEFAULT_ARMS)}; "
        f"recipes are there for {', '.join(available_arms())}",
    )
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="default runs/demo")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="for every run of the trainer"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
