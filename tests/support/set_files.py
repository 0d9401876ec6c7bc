"""Small files with the columns, types and layout of the published data sets, and the tool."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet

TOOL = Path(__file__).parents[2] / "tools" / "prepare_prompts.py"
Prepare = Callable[..., int]

TEXT, INTEGER, REAL = arrow.string(), arrow.int64(), arrow.float64()
TEXTS = arrow.list_(TEXT)
MESSAGES = arrow.list_(arrow.struct([("content", TEXT), ("role", TEXT)]))

DAPO_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'

AIME = (
    "Every morning Aya goes for a $9$-kilometer-long walk and stops at a coffee shop afterwards. "
    "When she walks at a constant speed of $s$ kilometers per hour, the walk takes her 4 hours, "
    "including $t$ minutes spent in the coffee shop. Find the number of minutes the walk takes her."
)

SCHEMAS: dict[str, dict[str, Any]] = {
    "deepmath": {
        "question": TEXT,
        "final_answer": TEXT,
        "difficulty": REAL,
        "topic": TEXT,
        "r1_solution_1": TEXT,
        "r1_solution_2": TEXT,
        "r1_solution_3": TEXT,
    },
    "dapo": {
        "data_source": TEXT,
        "prompt": MESSAGES,
        "ability": TEXT,
        "reward_model": arrow.struct([("ground_truth", TEXT), ("style", TEXT)]),
        "extra_info": arrow.struct([("index", TEXT)]),
    },
    "math500": {
        "problem": TEXT,
        "solution": TEXT,
        "answer": TEXT,
        "subject": TEXT,
        "level": INTEGER,
        "unique_id": TEXT,
    },
    "aime24": {
        "id": INTEGER,
        "problem": TEXT,
        "solution": TEXT,
        "answer": TEXT,
        "url": TEXT,
        "year": TEXT,
    },
    "aime24_maxwell": {"ID": TEXT, "Problem": TEXT, "Solution": TEXT, "Answer": INTEGER},
    "aime25": {"problem_idx": INTEGER, "problem": TEXT, "answer": INTEGER, "problem_type": TEXTS},
    "hmmt25_feb": {"problem_idx": INTEGER, "problem": TEXT, "answer": TEXT, "problem_type": TEXTS},
}
SCHEMAS["hmmt25_nov"] = SCHEMAS["hmmt25_feb"]


def deepmath(question: str, answer: str, difficulty: float | None = 6.0) -> dict[str, Any]:
    solutions = {f"r1_solution_{i}": "a long chain of thought" for i in (1, 2, 3)}
    return {
        "question": question,
        "final_answer": answer,
        "difficulty": difficulty,
        "topic": "Mathematics -> Algebra",
    } | solutions


def dapo(question: str, answer: str, index: str) -> dict[str, Any]:
    return {
        "data_source": "math_dapo",
        "prompt": [{"content": DAPO_BEFORE + question + DAPO_AFTER, "role": "user"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": answer, "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": index},
    }


def write_parquet(path: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    schema = arrow.schema(list(SCHEMAS[name].items()))
    parquet.write_table(arrow.Table.from_pylist(rows, schema=schema), path)
    return path


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prepare_into(folder: Path) -> Prepare:
    """`run("aime24", file, "--strict")` -> exit code; the outputs are `folder`/out.*."""
    name = "prepare_prompts"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, TOOL)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])

    def run(*arguments: Any, out: str = "out.jsonl") -> int:
        code: int = sys.modules[name].main([*map(str, arguments), "--out", str(folder / out)])
        return code

    return run


def kept(folder: Path) -> list[dict[str, Any]]:
    return read_jsonl(folder / "out.jsonl")


def rejects(folder: Path) -> list[tuple[str, str]]:
    return [(r["where"], r["reason"]) for r in read_jsonl(folder / "out.rejects.jsonl")]


def manifest(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "out.manifest.json").read_text())
    return content
