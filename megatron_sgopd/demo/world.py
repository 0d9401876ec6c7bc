"""The demonstration's maths problems: chains of +, - and * modulo 10, worked from left to right.

A problem reads `From left to right, mod 10: 7+4*3-8=` and its worked solution
`7+4=1;1*3=3;3-8=5;\\boxed{5}`. Every problem belongs to one split by a hash of its text, so that
the splits of all seeds and levels are disjoint by construction.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MODULUS = 10
OPERATORS = "+-*"
INSTRUCTION = "From left to right, mod 10: "

Split = Literal["train", "dev", "test"]
Fault = Callable[
    [int, str, int, int], int
]  # (left, operator, right, true result) -> written result
Row = dict[str, object]


@dataclass(frozen=True)
class Level:
    """Describes how hard the problems are: operations are uniform in the closed range."""

    min_operations: int
    max_operations: int


LEVELS = {"normal": Level(4, 6), "hard": Level(6, 8)}


@dataclass(frozen=True)
class WorldSizes:
    """Rows per file. The student's rows are read in order: the noisy ones, then the terse ones."""

    train: int = 1280  # 40 steps of 32 prompts: no problem is seen twice
    dev: int = 100
    test: int = 200
    teacher: int = 64 * 450
    student_noisy: int = 64 * 380
    student_terse: int = 64 * 80


# The smoke form of the demonstration: the same path, nothing learnt worth mentioning.
QUICK_SIZES = WorldSizes(32, 8, 16, 64 * 4, 64 * 3, 64)

# What the models are taught wrongly. Measured on dev: the student below solves about one problem
# in ten when it samples, and the teacher about one in three of those that meet a fault.
TEACHER_FAULT_RATE = 0.7  # of products with a factor 7: one too many
STUDENT_NOISE_FIRST, STUDENT_NOISE_THEN = 0.20, 0.18  # of all results: any other digit
STUDENT_TERSE_RATE = 0.98  # of the second lesson: running results only


@dataclass(frozen=True)
class Problem:
    """`start` and then (operator, operand) pairs, applied from left to right modulo 10."""

    start: int
    operations: tuple[tuple[str, int], ...]

    @property
    def text(self) -> str:
        chain = "".join(f"{operator}{operand}" for operator, operand in self.operations)
        return f"{INSTRUCTION}{self.start}{chain}="

    @property
    def answer(self) -> int:
        result = self.start
        for operator, operand in self.operations:
            result = apply(result, operator, operand)
        return result


def apply(left: int, operator: str, right: int) -> int:
    """One step of a chain, modulo 10."""
    match operator:
        case "+":
            return (left + right) % MODULUS
        case "-":
            return (left - right) % MODULUS
        case "*":
            return (left * right) % MODULUS
    raise ValueError(f"operator is {operator!r}; a chain knows {', '.join(OPERATORS)}")


def split_of(text: str) -> Split:
    """The split of a problem, whatever the seed: 10 % dev, 10 % test, by SHA-256 of the text."""
    bucket = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 10
    return "test" if bucket == 0 else "dev" if bucket == 1 else "train"


def draw_problem(rng: random.Random, level: Level) -> Problem:
    num_operations = rng.randint(level.min_operations, level.max_operations)
    start = rng.randrange(MODULUS)
    operations = ((rng.choice(OPERATORS), rng.randrange(MODULUS)) for _ in range(num_operations))
    return Problem(start, tuple(operations))


def worked_solution(problem: Problem, fault: Fault | None = None, *, terse: bool = False) -> str:
    """The solution as somebody with this fault writes it; a wrong result is carried on.

    `terse` leaves out what was computed: `1;3;5;\\boxed{5}`.
    """
    result, steps = problem.start, []
    for operator, operand in problem.operations:
        written = apply(result, operator, operand)
        if fault is not None:
            written = fault(result, operator, operand, written)
        steps.append(f"{written};" if terse else f"{result}{operator}{operand}={written};")
        result = written
    return "".join(steps) + f"\\boxed{{{result}}}"


def sevens_fault(rng: random.Random) -> Fault:
    """The teacher's systematic fault: a product with a factor 7 comes out one too large, mostly."""

    def fault(left: int, operator: str, right: int, result: int) -> int:
        if operator == "*" and 7 in (left, right) and rng.random() < TEACHER_FAULT_RATE:
            return (result + 1) % MODULUS
        return result

    return fault


def noise_fault(rng: random.Random, rate: float) -> Fault:
    """The student's slips: any result may come out as any other digit."""

    def fault(left: int, operator: str, right: int, result: int) -> int:
        if rng.random() < rate:
            return (result + rng.randrange(1, MODULUS)) % MODULUS
        return result

    return fault


def write_world(directory: Path, *, seed: int, level: str, sizes: WorldSizes) -> dict[str, int]:
    """Writes train, dev, test, teacher_sft and student_sft as JSONL; rows per file come back.

    Raises ValueError for an unknown level, or when two files share a problem.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; allowed are {', '.join(LEVELS)}")
    draws = _Draws(seed, level)
    teacher, student = _lesson_rng(seed, level, "teacher"), _lesson_rng(seed, level, "student")
    files = {
        "test": [_row(p) for p in draws.take("test", sizes.test)],
        "dev": [_row(p) for p in draws.take("dev", sizes.dev)],
        "train": [_row(p) for p in draws.take("train", sizes.train)],
        "teacher_sft": list(_teacher_lessons(draws, sizes, teacher)),
        "student_sft": list(_student_lessons(draws, sizes, student)),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in files.items():
        lines = [json.dumps({"id": f"{name}-{i}", **row}) for i, row in enumerate(rows)]
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    check_disjoint(directory)
    return {name: len(rows) for name, rows in files.items()}


def check_disjoint(directory: Path) -> None:
    """Reads the files back; ValueError names the first problem that stands in two places."""
    seen: dict[str, str] = {}
    for path in sorted(directory.glob("*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            text = json.loads(line)["problem"]
            place = f"{path.name} line {number}"
            if text in seen:
                raise ValueError(f"{place}: the problem {text!r} is in {seen[text]} already")
            seen[text] = place


class _Draws:
    """Draws problems of a split, none of them twice."""

    def __init__(self, seed: int, level: str) -> None:
        self._rng = _lesson_rng(seed, level, "problems")
        self._level = LEVELS[level]
        self._taken: set[Problem] = set()

    def take(self, split: Split, count: int) -> Iterator[Problem]:
        while count:
            problem = draw_problem(self._rng, self._level)
            if problem not in self._taken and split_of(problem.text) == split:
                self._taken.add(problem)
                count -= 1
                yield problem


def _lesson_rng(seed: int, level: str, purpose: str) -> random.Random:
    return random.Random(f"{seed}/{level}/{purpose}")


def _teacher_lessons(draws: _Draws, sizes: WorldSizes, rng: random.Random) -> Iterator[Row]:
    fault = sevens_fault(rng)
    for problem in draws.take("train", sizes.teacher):
        yield _row(problem, worked_solution(problem, fault))


def _student_lessons(draws: _Draws, sizes: WorldSizes, rng: random.Random) -> Iterator[Row]:
    first, then = noise_fault(rng, STUDENT_NOISE_FIRST), noise_fault(rng, STUDENT_NOISE_THEN)
    for problem in draws.take("train", sizes.student_noisy):
        yield _row(problem, worked_solution(problem, first))
    for problem in draws.take("train", sizes.student_terse):
        terse = rng.random() < STUDENT_TERSE_RATE
        yield _row(problem, worked_solution(problem, then, terse=terse))


def _row(problem: Problem, solution: str | None = None) -> Row:
    """`answer` is the true one even where the solution ends elsewhere."""
    solution = worked_solution(problem) if solution is None else solution
    return {"problem": problem.text, "answer": str(problem.answer), "solution": solution}
