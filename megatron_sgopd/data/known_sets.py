r"""The data sets known by name, as a table, and a row of one -> id, problem, answer, difficulty.

A field is named by its column, or by a path into it: `prompt.0.content`. The fixed instructions
around a question are taken off as exact texts; a row that lacks them is not passed on as it is,
since it would train on another prompt than the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from megatron_sgopd.data.canonical_text import canonical
from megatron_sgopd.data.rows import BadRow, Row, id_field, number_field, read_rows, text_field


@dataclass(frozen=True)
class PromptSet:
    """Describes where a set's fields are and what is done to its rows."""

    name: str  # short, also the `source` of its problems and what their ids begin with
    problem: str
    answer: str
    id: str | None = None  # None: made of the problem's text
    difficulty: str | None = None
    hub: str | None = None
    split: str = "train"
    prefix: str = ""
    suffix: str = ""
    min_difficulty: float | None = None
    source: str | None = None  # of sets prepared before: their ids and sources stay

    @property
    def required(self) -> tuple[str, ...]:
        return (self.problem, self.answer)

    @property
    def optional(self) -> tuple[str, ...]:
        return tuple(name for name in (self.id, self.difficulty, self.source) if name)


_DAPO_PREFIX = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
_DAPO_SUFFIX = '\n\nRemember to put your answer on its own line after "Answer:".'

SETS = {
    s.name: s
    for s in (
        PromptSet(
            "deepmath", "question", "final_answer", difficulty="difficulty",
            hub="zwhe99/DeepMath-103K", min_difficulty=6.0,  # as G-OPD
        ),
        PromptSet(
            "dapo", "prompt.0.content", "reward_model.ground_truth", "extra_info.index",
            hub="BytedTsinghua-SIA/DAPO-Math-17k", prefix=_DAPO_PREFIX, suffix=_DAPO_SUFFIX,
        ),
        PromptSet(
            "math500", "problem", "answer", "unique_id", "level",
            hub="HuggingFaceH4/MATH-500", split="test",
        ),
        PromptSet("aime24", "problem", "answer", "id", hub="HuggingFaceH4/aime_2024"),
        PromptSet("aime24_maxwell", "Problem", "Answer", "ID", hub="Maxwell-Jia/AIME_2024"),
        PromptSet("aime25", "problem", "answer", "problem_idx", hub="MathArena/aime_2025"),
        PromptSet("hmmt25_feb", "problem", "answer", "problem_idx", hub="MathArena/hmmt_feb_2025"),
        PromptSet("hmmt25_nov", "problem", "answer", "problem_idx", hub="MathArena/hmmt_nov_2025"),
        PromptSet("prepared", "problem", "answer", "id", "difficulty", source="source"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """A row as it is read, before anything is compared. `where` takes no part in equality."""

    id: str
    problem: str
    answer: str
    source: str
    difficulty: float | None = None
    where: str = field(default="", compare=False)

    def record(self) -> dict[str, str | float]:
        """Returns what `problems.load_problems` reads."""
        known = {} if self.difficulty is None else {"difficulty": self.difficulty}
        return (
            {"id": self.id, "problem": self.problem, "answer": self.answer}
            | known
            | {"source": self.source}
        )


class TooEasy(Exception):
    """A row below the difficulty that is wanted."""


def read_entries(
    prompt_set: PromptSet, file: Path, label: str
) -> Iterator[Entry | BadRow | TooEasy]:
    """The rows of a file, one thing each. Raises ValueError for a file that cannot be read."""
    for where, row in read_rows(file, label, prompt_set.required, prompt_set.optional):
        if isinstance(row, BadRow):
            yield row
            continue
        try:
            yield entry(prompt_set, row, where)
        except (BadRow, TooEasy) as outcome:
            yield outcome


def entry(prompt_set: PromptSet, row: Row, where: str) -> Entry:
    """One row.

    Raises:
        BadRow: what is wrong with it.
        TooEasy: its difficulty is below `min_difficulty`.
    """
    s = prompt_set
    difficulty = number_field(row, s.difficulty, where) if s.difficulty else None
    if s.min_difficulty is not None:
        if difficulty is None:
            message = f"field {s.difficulty!r} is missing or null; a difficulty is wanted"
            raise BadRow("missing_field", where, message, s.difficulty)
        if difficulty < s.min_difficulty:
            raise TooEasy
    text = _clean(text_field(row, s.problem, where, "--problem-field"), s.problem, where)
    for part, starts, name in ((s.prefix, True, "prefix"), (s.suffix, False, "suffix")):
        if not (text.startswith(part) if starts else text.endswith(part)):
            message = f"field {s.problem!r} does not {'begin' if starts else 'end'} with {part!r}"
            raise BadRow(f"no_{name}", where, message, s.problem)
        text = text.removeprefix(part) if starts else text.removesuffix(part)
    problem = text.strip()
    if not problem:
        raise BadRow("empty", where, f"field {s.problem!r} holds its instructions only", s.problem)
    answer = _clean(text_field(row, s.answer, where, "--answer-field"), s.answer, where).strip()
    given = id_field(row, s.id, where) if s.id else None
    name = sha256(canonical(problem).encode()).hexdigest()[:16] if given is None else given
    source = id_field(row, s.source, where) if s.source else None
    return Entry(
        id=given if s.source and given is not None else f"{s.name}-{name}",
        problem=problem,
        answer=answer,
        source=source or s.name,
        difficulty=difficulty,
        where=where,
    )


def _clean(text: str, name: str, where: str) -> str:
    r"""Line ends made \n; other control characters refused.

    They are mostly LaTeX that lost its backslash on the way: \frac read as a form feed and "rac".
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
    if found := re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text):
        message = f"field {name!r} has the control character {found[0]!r}: {_around(text, found)}"
        raise BadRow("control_character", where, message, name)
    return text


def _around(text: str, found: re.Match[str]) -> str:
    return repr(text[max(0, found.start() - 10) : found.end() + 10])
