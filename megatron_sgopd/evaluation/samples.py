"""The samples of an evaluation: kept as they are made, joined, and put in order.

A row is one answer: `id` (of the problem), `sample` (from 0; GREEDY is the greedy one),
`completion` (text), `length` (tokens), `finish_reason`, and `is_correct` once it is verified. While
an evaluation runs, each rank appends to a journal of its own: a row when its answer is there, and
its verdict, a row of `id`, `sample` and `is_correct`, when that is. So a killed evaluation has lost
nothing that an engine made.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sgopd.atomic_files import json_line, read_json_lines, write_json_lines

GREEDY = -1
Row = dict[str, Any]
Key = tuple[str, int]  # (id, sample)


def join(rows: Iterable[Row]) -> dict[Key, Row]:
    """One row an answer, with its verdict where there is one; of two answers the first counts."""
    joined: dict[Key, Row] = {}
    for row in rows:
        kept = joined.setdefault((row["id"], row["sample"]), {})
        kept.update({key: value for key, value in row.items() if key not in kept})
    return {key: row for key, row in joined.items() if "completion" in row}


def records(
    problems: Sequence[Mapping[str, str]],
    rows: Mapping[Key, Row],
    *,
    n: int,
    greedy: bool,
    benchmark: str,
) -> list[dict[str, Any]]:
    """One record a problem, in order, for `accuracy`; from verified rows.

    Args:
        problems: `id`, `problem` and `answer` of each.
    """
    out = []
    for problem in problems:
        own = [rows[problem["id"], i] for i in range(n)]
        record: dict[str, Any] = {
            **problem,
            "benchmark": benchmark,
            "num_samples": n,
            "num_correct": sum(row["is_correct"] for row in own),
            "is_correct": [row["is_correct"] for row in own],
            "completions": [row["completion"] for row in own],
            "lengths": [row["length"] for row in own],
            "truncated": sum(row["finish_reason"] == "length" for row in own),
        }
        if greedy:
            first = rows[problem["id"], GREEDY]
            record["greedy_is_correct"] = first["is_correct"]
            record["greedy"] = first["completion"]
        out.append(record)
    return out


# -- on disk ---------------------------------------------------------------------------------------


class Journal:
    """Appends rows to one file, each in one write."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def append(self, row: Row) -> None:
        line = json_line(row)
        while line:  # a signal, or a full disk, may cut a write short
            line = line[os.write(self._file, line) :]

    def close(self) -> None:
        os.close(self._file)


def journal_path(folder: Path, benchmark: str, rank: int) -> Path:
    return folder / "journals" / f"{benchmark}.{rank:05d}.jsonl"


def _journals(folder: Path, benchmark: str) -> list[Path]:
    """Lists all ranks' journals: five digits, since aime.24 may be a benchmark beside aime."""
    return sorted((folder / "journals").glob(f"{benchmark}.{'[0-9]' * 5}.jsonl"))


def read_samples(folder: Path, benchmark: str) -> dict[Key, Row]:
    """All that is there of a benchmark: what was put in order, and the journals."""
    files = [_samples_path(folder, benchmark), *_journals(folder, benchmark)]
    return join(row for file in files for row in read_json_lines(file))


def merge_journals(
    folder: Path, benchmark: str, problems: Sequence[Mapping[str, str]], rows: Mapping[Key, Row]
) -> None:
    """Writes samples/BENCHMARK.jsonl in the order of the problems, and removes the journals."""
    place = {problem["id"]: i for i, problem in enumerate(problems)}
    order = sorted(rows, key=lambda key: (place[key[0]], key[1]))
    write_json_lines(_samples_path(folder, benchmark), (rows[key] for key in order))
    for journal in _journals(folder, benchmark):
        journal.unlink()


def _samples_path(folder: Path, benchmark: str) -> Path:
    return folder / "samples" / f"{benchmark}.jsonl"
