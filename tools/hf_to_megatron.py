"""Convert a Hugging Face model into a Megatron checkpoint.

The checkpoint is torch's distributed format as megatron-core writes it: it can be read under any
tensor and pipeline parallel sizes, and holds the model's config and tokenizer too, so that
tools/megatron_to_hf.py needs nothing else. No rank holds the model: its tensors pass one by one.
"""

from __future__ import annotations

import argparse
import sys


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    from megatron_sgopd.cli.conversion import add_layout

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--hf", required=True, metavar="DIR", help="Hugging Face directory, or hub name OWNER/NAME"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the checkpoint")
    add_layout(parser)
    parser.add_argument(
        "--make-vocab-size-divisible-by",
        type=int,
        default=128,
        metavar="N",
        help="pads the vocabulary to a multiple of N x TP; default: %(default)s",
    )
    parser.add_argument(
        "--allow-pickle",
        action="store_true",
        help="read pytorch_model*.bin too (plain tensors only: torch.load with weights_only)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    from megatron_sgopd.cli.conversion import run
    from megatron_sgopd.model.conversion_job import ToMegatron
    from megatron_sgopd.model.hf_location import resolve_hf_dir

    return run(
        lambda: ToMegatron(
            out=args.out,
            tensor_parallel=args.tensor_model_parallel_size,
            pipeline_parallel=args.pipeline_model_parallel_size,
            dtype=args.dtype,
            hf=str(resolve_hf_dir(args.hf)),
            name=args.hf,
            divisible_by=args.make_vocab_size_divisible_by,
            allow_pickle=args.allow_pickle,
        )
    )


if __name__ == "__main__":
    sys.exit(main())
