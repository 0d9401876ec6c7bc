"""Label completions offline with the trainer's own verifier.

Reads IN.jsonl, one JSON object a line with a completion and its reference answer, and writes
OUT.jsonl: the same records in the same order, each with `is_correct`, `extracted` (the content of
the last box, or null) and `reason`. Run again after an interruption it goes on where OUT stops.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron_sgopd.verifier import Verdict, VerifierPool

Record = dict[str, Any]
Outcomes = Counter[tuple[bool, str]]  # (is_correct, reason) -> records

LABELS = ("is_correct", "extracted", "reason")
CHUNK_RECORDS = 512  # read ahead of the verdicts at most
CHUNK_CHARS = 32_000_000


class MalformedRecord(ValueError):
    """A line that cannot be labelled; the message begins with FILE:LINE."""


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", type=Path, metavar="IN.jsonl")
    parser.add_argument("output", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--completion-field", default="completion", help="default: %(default)s")
    parser.add_argument("--answer-field", default="answer", help="default: %(default)s")
    parser.add_argument(
        "--verifier",
        default="math_verify",
        help="math_verify, or the dotted path of a function (completion, answer) -> bool or "
        "Verdict; default: %(default)s",
    )
    parser.add_argument(
        "--timeout", type=float, default=5.0, help="seconds per answer; default: %(default)s"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="default: one per core"
    )
    parser.add_argument(
        "--memory-mb", type=int, default=2048, help="per worker; default: %(default)s"
    )
    return parser.parse_args(argv)


def read_records(path: Path, fields: tuple[str, str]) -> Iterator[Record]:
    """The records of `path`, blank lines passed over, numbers as reference answers made text.

    `fields` are the completion's and the answer's. Raises MalformedRecord.
    """
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise MalformedRecord(f"{path}:{number}: not JSON: {error}") from error
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise MalformedRecord(f"{path}:{number}: a JSON object is wanted, this is a {kind}")
            for field in fields:
                if field not in record:
                    raise MalformedRecord(
                        f"{path}:{number}: no field {field!r}; there are {sorted(record)}"
                    )
                if not isinstance(record[field], str) and not (
                    field == fields[1] and type(record[field]) in (int, float)
                ):
                    kind = type(record[field]).__name__
                    raise MalformedRecord(
                        f"{path}:{number}: field {field!r} is a {kind}; a string is wanted"
                    )
            yield record


def _unlabelled(record: Record) -> Record:
    return {key: value for key, value in record.items() if key not in LABELS}


def skip_labelled(output: IO[bytes], records: Iterator[Record], path: Path) -> Outcomes:
    """Advance `records` past those that `output` holds, leave `output` after the last of them.

    A last line cut short is removed. Returns how often each outcome occurs in `output`. Raises
    ValueError where a line of `output` is not the labelled form of its record: then it belongs to
    another input, and nothing is changed.
    """
    outcomes: Outcomes = Counter()
    for number, line in enumerate(output, start=1):
        if not line.endswith(b"\n"):
            output.seek(-len(line), os.SEEK_END)
            break
        try:
            labelled = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number}: not JSON; remove the file to begin anew") from error
        record = next(records, None)
        if not isinstance(labelled, dict) or not set(LABELS) <= set(labelled):
            raise ValueError(f"{path}:{number}: no label; remove the file or choose another output")
        if record is None or _unlabelled(labelled) != _unlabelled(record):
            what = "the input has fewer records" if record is None else "not the input's record"
            raise ValueError(
                f"{path}:{number}: {what}; this file was made from another input: remove it or "
                "choose another output"
            )
        outcomes[labelled["is_correct"], labelled["reason"]] += 1
    output.truncate(output.tell())
    return outcomes


def label(
    records: Iterable[Record], fields: tuple[str, str], pool: VerifierPool
) -> Iterator[tuple[Record, Verdict]]:
    """Each record with its verdict, in order and as early as order allows.

    A MalformedRecord of `records` is raised once every record before it has been yielded.
    """
    iterator = iter(records)
    failure: MalformedRecord | None = None
    while failure is None:
        chunk: list[Record] = []
        chars = 0
        try:
            while len(chunk) < CHUNK_RECORDS and chars < CHUNK_CHARS:
                chunk.append(next(iterator))
                chars += len(chunk[-1][fields[0]])
        except StopIteration:
            if not chunk:
                return
        except MalformedRecord as error:
            failure = error
        pairs = ((record[fields[0]], str(record[fields[1]])) for record in chunk)
        verdicts: dict[int, Verdict] = {}
        position = 0
        for index, verdict in pool.verify_iter(pairs):
            verdicts[index] = verdict
            while position in verdicts:
                yield chunk[position], verdicts.pop(position)
                position += 1
    raise failure


def encode(record: Record, verdict: Verdict) -> bytes:
    labels = (verdict.is_correct, verdict.extracted, verdict.reason)
    labelled = record | dict(zip(LABELS, labels, strict=True))
    try:
        return (json.dumps(labelled, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a byte-level tokenizer may leave
        return (json.dumps(labelled) + "\n").encode()


def count_lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def run(args: argparse.Namespace) -> str:
    """Label the input; returns the closing line. Raises ValueError and OSError for users."""
    from tqdm import tqdm

    from megatron_sgopd.verifier import VerifierPool

    fields = (args.completion_field, args.answer_field)
    total = count_lines(args.input)
    if args.output.exists() and args.output.samefile(args.input):
        raise ValueError(f"{args.output} is the input; choose another output")
    args.output.touch()
    with (
        args.output.open("r+b") as output,
        VerifierPool(args.verifier, args.timeout, args.workers, args.memory_mb) as pool,
    ):
        try:
            fcntl.flock(output, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{args.output} is being written by another run") from error
        records = read_records(args.input, fields)
        outcomes = skip_labelled(output, records, args.output)
        done = outcomes.total()
        interval = 0.5 if sys.stderr.isatty() else 30.0
        with tqdm(
            total=total, initial=done, unit=" answers", desc="labelling", mininterval=interval
        ) as bar:
            flushed = time.monotonic()
            for record, verdict in label(records, fields, pool):
                output.write(encode(record, verdict))
                if time.monotonic() - flushed > 1:
                    output.flush()
                    flushed = time.monotonic()
                outcomes[verdict.is_correct, verdict.reason] += 1
                bar.update()
    return summary(args.output, outcomes, done)


def summary(path: Path, outcomes: Outcomes, done: int) -> str:
    """The closing line: how many records, right and wrong, and why wrong."""
    correct = sum(count for (is_correct, _), count in outcomes.items() if is_correct)
    wrong = outcomes.total() - correct
    why = ", ".join(
        f"{reason} {count}"
        for (is_correct, reason), count in outcomes.most_common()
        if not is_correct
    )
    earlier = f" ({done} of them by an earlier run)" if done else ""
    counts = f"{correct} correct, {wrong} wrong" + (f" ({why})" if why else "")
    return f"{path}: {outcomes.total()} records{earlier}: {counts}"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        if isinstance(error, MalformedRecord):
            print(
                f"The records before it are labelled in {args.output}; mend the line and run the "
                "same command again to go on.",
                file=sys.stderr,
            )
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
