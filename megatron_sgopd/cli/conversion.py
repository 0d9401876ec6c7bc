"""Runs the converters of `tools/`: checks first, then ranks of their own, on the CPU.

`python -m megatron_sgopd.cli.conversion FOLDER JOB` is such a rank.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sgopd.cli.common import as_rank

if TYPE_CHECKING:
    from megatron_sgopd.model.conversion_job import ToHf, ToMegatron


def add_layout(parser: argparse.ArgumentParser) -> None:
    for kind in ("tensor", "pipeline"):
        parser.add_argument(
            f"--{kind}-model-parallel-size",
            type=int,
            default=1,
            metavar="N",
            help="ranks that share the work; default: %(default)s",
        )
    parser.add_argument(
        "--dtype",
        choices=("keep", "float32", "bfloat16", "float16"),
        default="keep",
        help="of the weights that are written; default: that of those read",
    )


def run(make_job: Callable[[], ToMegatron | ToHf]) -> int:
    """Checks the job and does it; the exit code. Errors are one line, with what to do."""
    from megatron_sgopd.atomic_files import begin_folder, discard_folder
    from megatron_sgopd.distributed.torchrun import run_ranks

    try:
        job = make_job()
        for warning in job.check():
            print(f"warning: {warning}", file=sys.stderr)
        begin_folder(Path(job.out))  # before ranks start: it may not be writable
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="sgopd-convert-") as folder:
        arguments = [folder, job.to_json()]
        code = run_ranks(
            job.num_ranks,
            arguments,
            Path(folder),
            module="megatron_sgopd.cli.conversion",
            stopping=None,
        )
    if code:
        discard_folder(Path(job.out))
        return code
    print(f"{job.out}: {job.done()}")
    return 0


def rank(folder: str, text: str) -> None:
    with as_rank(Path(folder)):
        from megatron_sgopd.model.conversion_job import job_of_json
        from megatron_sgopd.model.conversion_ranks import convert

        convert(job_of_json(text))


if __name__ == "__main__":
    rank(*sys.argv[1:])
