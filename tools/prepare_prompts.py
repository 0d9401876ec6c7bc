"""Make a data set fit to train or evaluate on: a JSONL file that the trainer reads.

Reads a set of the table (deepmath, dapo, math500, aime24, aime25, hmmt25_feb, hmmt25_nov, …) from
files, folders or the hub, or any other set whose two fields are named, and writes

  OUT.jsonl           id, problem, answer, difficulty (where known), source
  OUT.rejects.jsonl   the rows left out, each with its place and the reason
  OUT.manifest.json   sha256 of the output and of every source, options, counts, versions

Each problem once; none that a benchmark given by --against has; each reference answer verifies
against itself. The same input and options give the same bytes. Exit code 2 for an error.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sgopd.data.contamination import MIN_OVERLAP, NGRAM_WORDS
from megatron_sgopd.data.known_sets import SETS, PromptSet
from megatron_sgopd.data.prepare import MAX_PROBLEM_CHARS, Job, Prepared, outputs, prepare, write


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "set",
        metavar="SET",
        help=f"one of {', '.join(SETS)}; or a name of your own, with --problem-field and "
        "--answer-field",
    )
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help=".parquet or .jsonl files, folders of them, or a hub name; default: the set's own",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="OUT.jsonl")
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that differ")
    parser.add_argument("--strict", action="store_true", help="stop at the first row with a fault")

    fields = parser.add_argument_group("the set's layout (default: as the table has it)")
    fields.add_argument("--problem-field", metavar="FIELD", help="a column, or prompt.0.content")
    fields.add_argument("--answer-field", metavar="FIELD")
    fields.add_argument("--id-field", metavar="FIELD", help="default: ids made of the problem")
    fields.add_argument("--difficulty-field", metavar="FIELD")
    fields.add_argument("--prefix", metavar="TEXT", help="taken off; a row without it is rejected")
    fields.add_argument("--suffix", metavar="TEXT", help="taken off; a row without it is rejected")
    fields.add_argument(
        "--min-difficulty",
        type=_difficulty,
        metavar="D",
        help="keep rows of difficulty D or more, or 'none'; default: 6 for deepmath, else none",
    )
    fields.add_argument(
        "--max-problem-chars", type=int, default=MAX_PROBLEM_CHARS, help="default: %(default)s"
    )

    against = parser.add_argument_group("decontamination")
    against.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="BENCHMARK",
        help="prepared .jsonl files, sets (from the hub), or SET=FILE_OR_FOLDER",
    )
    against.add_argument(
        "--ngram", type=int, default=NGRAM_WORDS, help="words in a row; default: %(default)s"
    )
    against.add_argument(
        "--min-overlap",
        type=float,
        default=MIN_OVERLAP,
        help="of the shorter text's words, in order; 0: an n-gram is enough; default: %(default)s",
    )

    verifier = parser.add_argument_group("verifier")
    verifier.add_argument(
        "--verifier",
        default="math_verify",
        help="math_verify, or the dotted path of a function; default: %(default)s",
    )
    verifier.add_argument(
        "--timeout", type=float, default=5.0, help="seconds; default: %(default)s"
    )
    verifier.add_argument("--memory-mb", type=int, default=2048, help="default: %(default)s")
    verifier.add_argument(
        "--num-workers", type=int, default=os.cpu_count() or 1, help="default: one per core"
    )
    return parser.parse_args(argv)


def _difficulty(text: str) -> float:
    value = -math.inf if text == "none" else float(text)
    if math.isnan(value):
        raise argparse.ArgumentTypeError("a number or 'none' is wanted")
    return value


def chosen_set(args: argparse.Namespace) -> PromptSet:
    """The table's row, changed by what the options name. Raises ValueError for an unknown set."""
    given = {
        "problem": args.problem_field,
        "answer": args.answer_field,
        "id": args.id_field,
        "difficulty": args.difficulty_field,
        "prefix": args.prefix,
        "suffix": args.suffix,
        "min_difficulty": args.min_difficulty,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if given.get("min_difficulty") == -math.inf:
        given["min_difficulty"] = None
    if args.set in SETS:
        chosen = replace(SETS[args.set], **given)
    elif {"problem", "answer"} <= set(given):
        chosen = PromptSet(args.set, **given)
    else:
        raise ValueError(
            f"set {args.set!r} is not in the table ({', '.join(SETS)}): name its fields with "
            "--problem-field and --answer-field"
        )
    if chosen.min_difficulty is not None and chosen.difficulty is None:
        raise ValueError(f"set {args.set!r} has no difficulty: name it with --difficulty-field")
    return chosen


def run(args: argparse.Namespace) -> None:
    prompt_set = chosen_set(args)
    paths = args.paths or ([prompt_set.hub] if prompt_set.hub else [])
    if not paths:
        raise ValueError(f"set {args.set!r} is of no hub: give its files")
    for path in outputs(args.out):
        if path.exists() and any(Path(p).exists() and path.samefile(p) for p in paths):
            raise ValueError(f"{path} is an input; choose another output")
    job = Job(
        prompt_set,
        paths,
        args.against,
        args.ngram,
        args.min_overlap,
        args.max_problem_chars,
        args.verifier,
        args.timeout,
        args.memory_mb,
        args.strict,
        args.num_workers,
    )
    prepared = prepare(job, progress_bar)
    digest = write(prepared, job, args.out, overwrite=args.overwrite)
    print(table(prepared, job))
    print(f"{args.out}: sha256 {digest}")


def progress_bar(items: Iterable[Any], what: str, total: int) -> Iterable[Any]:
    from tqdm import tqdm

    interval = 0.5 if sys.stderr.isatty() else 30.0
    return tqdm(items, desc=what, total=total, unit=" rows", mininterval=interval)


def table(prepared: Prepared, job: Job) -> str:
    """Read, kept, and why not kept, in rows."""
    least = job.prompt_set.min_difficulty
    lines = [("read", prepared.read), ("kept", len(prepared.entries))]
    if least is not None:
        lines.append((f"below difficulty {least:g}", prepared.too_easy))
    for reason, rows in prepared.reasons.items():
        lines.append((reason, rows))
        if reason == "contaminated":
            lines += [(f"  by {name}", hits) for name, hits in prepared.hits.items()]
    text = "\n".join(f"{name:<28}{rows:>12,}" for name, rows in lines)
    return text if job.against else f"{text}\nnot decontaminated: no benchmark given by --against"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
