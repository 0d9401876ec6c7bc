"""Reads the problems of a data set: a JSONL or Parquet file, or a data set of the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_sgopd.data.rows import (
    Row,
    good_rows,
    hub_files,
    id_field,
    is_hub_data_set,
    number_field,
    read_rows,
    text_field,
)


@dataclass(frozen=True)
class Problem:
    """One row of a data set."""

    id: str
    problem: str
    answer: str
    solution: str | None = None


def load_problems(
    path: str,
    *,
    problem_field: str,
    answer_field: str,
    solution_field: str | None,
    min_difficulty: float | None,
    section: str = "data",
) -> list[Problem]:
    """Problems of a JSONL or Parquet file, or of a hub data set's train split.

    `section`: of the recipe, where the fields' names stand.

    Raises:
        ValueError: what is wrong, with file, line and field.
    """
    problems: list[Problem] = []
    ids: dict[str, str] = {}
    required = (problem_field, answer_field, *([solution_field] if solution_field else []))
    for where, row in _rows(path, required, ("id", "difficulty")):
        if min_difficulty is not None:
            hint = "; leave out data.min_difficulty if the set has none"
            difficulty = number_field(row, "difficulty", where, hint)
            if difficulty is None:
                raise ValueError(
                    f"{where}: field 'difficulty' is missing or null, a number is wanted{hint}"
                )
            if difficulty < min_difficulty:
                continue
        problem = Problem(
            id=id_field(row, "id", where) or where,
            problem=text_field(row, problem_field, where, f"{section}.problem_field"),
            answer=text_field(row, answer_field, where, f"{section}.answer_field"),
            solution=text_field(row, solution_field, where, "data.solution_field")
            if solution_field
            else None,
        )
        if problem.id in ids:
            raise ValueError(f"{where}: id {problem.id!r} is also that of {ids[problem.id]}")
        ids[problem.id] = where
        problems.append(problem)
    if not problems:
        raise ValueError(
            f"{path} holds no problems"
            + ("" if min_difficulty is None else f" of difficulty {min_difficulty} or more")
        )
    return problems


def _rows(
    path: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of every row."""
    if is_hub_data_set(path):
        files = hub_files(path, "train")
    elif Path(path).is_file():
        files = [(Path(path).name, Path(path))]
    else:
        raise ValueError(
            f"{path} {'is no file' if Path(path).exists() else 'does not exist'}: give a .jsonl or "
            ".parquet file, or a hub data set OWNER/NAME"
        )
    for label, file in files:
        yield from good_rows(read_rows(file, label, required, optional))
