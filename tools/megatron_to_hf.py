"""Convert a Megatron checkpoint into a Hugging Face directory.

The checkpoint is one of tools/hf_to_megatron.py or of a run (RUN/checkpoints/step-…; RUN itself
means its newest), written under any layout. The directory has sharded safetensors, config,
generation config, tokenizer and a model card with the run's recipe and results; rows that pad the
vocabulary are left out. No rank holds the model: its layers pass one by one.
"""

from __future__ import annotations

import argparse
import re
import sys

UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def size(text: str) -> int:
    """Bytes of "5GB" or "500MiB"."""
    match = re.fullmatch(r"(\d+)\s*([a-z]*)", text.strip(), re.IGNORECASE)
    if match is None or match[2].upper() not in UNITS:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB or 500MiB")
    return int(match[1]) * UNITS[match[2].upper()]


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from megatron_sgopd.cli.conversion import add_layout

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="DIR", help="a checkpoint, or the folder of a run"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="Hugging Face directory")
    add_layout(parser)
    parser.add_argument(
        "--max-shard-size",
        type=size,
        default=size("5GB"),
        metavar="SIZE",
        help="of a safetensors file, such as 5GB or 500MiB (costs no memory); default: 5GB",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from megatron_sgopd.cli.conversion import run
    from megatron_sgopd.model.conversion_job import ToHf

    return run(
        lambda: ToHf(
            out=args.out,
            tensor_parallel=args.tensor_model_parallel_size,
            pipeline_parallel=args.pipeline_model_parallel_size,
            dtype=args.dtype,
            checkpoint=args.checkpoint,
            max_shard_bytes=args.max_shard_size,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
