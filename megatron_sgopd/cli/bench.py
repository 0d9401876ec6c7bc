"""`sgopd bench kl|step|plot …`: ours beside other projects' losses, in a process of its own.

The arguments behind it are the bench's: `sgopd bench kl --help`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

from megatron_sgopd.cli.common import Commands, add_command


def add(commands: Commands) -> None:
    text = (
        "measure the loss (kl) or whole steps (step) beside others', as ratios, or draw them (plot)"
    )
    command = add_command(commands, "bench", bench, text)
    command.add_argument(
        "arguments",
        nargs=argparse.REMAINDER,
        metavar="kl|step|plot …",
        help="each has its own --help",
    )


def bench(arguments: argparse.Namespace) -> int:
    """Return the bench's exit code; of a process ended by a signal 128 and the signal."""
    command = [sys.executable, "-m", "megatron_sgopd.bench", *arguments.arguments]
    try:
        code = subprocess.run(command).returncode
    except KeyboardInterrupt:  # the bench got it too, and has ended
        return 130
    return 128 - code if code < 0 else code
