"""tools/prepare_prompts.py on small files of the real schemas, and on broken ones."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.config.schema import DataConfig
from megatron_sgopd.data.problems import Problem, load_problems
from megatron_sgopd.data.rendering import render
from tests.data.test_problems import byte_tokenizer
from tests.support.set_files import (
    AIME,
    TOOL,
    Prepare,
    dapo,
    deepmath,
    kept,
    manifest,
    prepare_into,
    read_jsonl,
    rejects,
    write_jsonl,
    write_parquet,
)


@pytest.fixture
def run(tmp_path: Path) -> Prepare:
    return prepare_into(tmp_path)


# -- the sets of the table -------------------------------------------------------------------------

LISTED = ["Algebra", "Number Theory"]
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # a row, and what becomes of it
    "deepmath": (
        deepmath("Find $\\lim x$.", "\\dfrac{1}{2}", 7.5),
        {"problem": "Find $\\lim x$.", "answer": "\\dfrac{1}{2}", "difficulty": 7.5},
    ),
    "dapo": (
        dapo("Solve $x=34$.", "34", "9a9b6eb4"),
        {"id": "dapo-9a9b6eb4", "problem": "Solve $x=34$.", "answer": "34"},
    ),
    "math500": (
        {
            "problem": "Convert $(0,3)$.",
            "solution": "long",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "subject": "Precalculus",
            "level": 2,
            "unique_id": "test/precalculus/807.json",
        },
        {
            "id": "math500-test/precalculus/807.json",
            "problem": "Convert $(0,3)$.",
            "answer": "\\left( 3, \\frac{\\pi}{2} \\right)",
            "difficulty": 2,
        },
    ),
    "aime24": (
        {"id": 60, "problem": "P", "solution": "s", "answer": "025", "url": "u", "year": "2024"},
        {"id": "aime24-60", "problem": "P", "answer": "025"},
    ),
    "aime24_maxwell": (
        {"ID": "2024-II-4", "Problem": "P", "Solution": "s", "Answer": 33},
        {"id": "aime24_maxwell-2024-II-4", "problem": "P", "answer": "33"},
    ),
    "aime25": (
        {"problem_idx": 1, "problem": "P", "answer": 70, "problem_type": LISTED},
        {"id": "aime25-1", "problem": "P", "answer": "70"},
    ),
    "hmmt25_feb": (
        {"problem_idx": 3, "problem": "P", "answer": "\\sqrt{2}", "problem_type": LISTED},
        {"id": "hmmt25_feb-3", "problem": "P", "answer": "\\sqrt{2}"},
    ),
    "hmmt25_nov": (
        {"problem_idx": 3, "problem": "P", "answer": "10!", "problem_type": []},
        {"id": "hmmt25_nov-3", "problem": "P", "answer": "10!"},
    ),
}


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "folder"])
@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_every_set(run: Prepare, tmp_path: Path, name: str, kind: str) -> None:
    row, expected = ROWS[name]
    (tmp_path / "data").mkdir()
    if kind == "jsonl":
        source = write_jsonl(tmp_path / "data" / "rows.jsonl", [row])
    else:
        source = write_parquet(tmp_path / "data" / "train-0-of-1.parquet", name, [row])
    assert run(name, tmp_path / "data" if kind == "folder" else source) == 0
    (problem,) = kept(tmp_path)
    if "id" not in expected:
        assert problem.pop("id").startswith(f"{name}-")
    assert problem == expected | {"source": name}
    assert rejects(tmp_path) == []


def test_difficulty_is_kept_from_the_bound_on(run: Prepare, tmp_path: Path) -> None:
    levels = [5.5, 6.0, 5.999, 6.5, 9.0, -1.0]
    rows = [deepmath(f"Find ${i}+x$.", str(i), level) for i, level in enumerate(levels)]
    source = write_parquet(tmp_path / "d.parquet", "deepmath", rows)
    assert run("deepmath", source) == 0
    assert [p["difficulty"] for p in kept(tmp_path)] == [6.0, 6.5, 9.0]
    assert manifest(tmp_path)["counts"]["below_min_difficulty"] == 3
    assert run("deepmath", source, "--min-difficulty", "6.5", "--overwrite") == 0
    assert [p["difficulty"] for p in kept(tmp_path)] == [6.5, 9.0]
    assert run("deepmath", source, "--min-difficulty", "none", "--overwrite") == 0
    assert [p["difficulty"] for p in kept(tmp_path)] == levels


def test_instructions_are_taken_off_exactly(run: Prepare, tmp_path: Path) -> None:
    questions = ["Solve the last problem.", 'mother\'s "Answer:"', "Answer: $Answer"]
    rows = [dapo(question, "1", f"i{n}") for n, question in enumerate(questions)]
    rows.append(dapo("cut", "1", "cut"))
    rows[-1]["prompt"][0]["content"] = rows[-1]["prompt"][0]["content"].removesuffix(".")
    rows.append(dapo("bare", "1", "bare"))
    rows[-1]["prompt"][0]["content"] = "bare"
    rows.append(dapo("", "1", "nothing"))
    rows.append(dapo("none", "1", "none") | {"prompt": []})
    assert run("dapo", write_parquet(tmp_path / "d.parquet", "dapo", rows)) == 0
    assert [p["problem"] for p in kept(tmp_path)] == questions
    assert rejects(tmp_path) == [
        ("d.parquet:4", "no_suffix"),
        ("d.parquet:5", "no_prefix"),
        ("d.parquet:6", "empty"),
        ("d.parquet:7", "missing_field"),
    ]


def test_any_set_by_its_fields(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"q": "Q: 1+1? Box it.", "meta": {"gold": 2}, "key": 5, "hard": 3, "more": [1]}
    source = write_jsonl(tmp_path / "d.jsonl", [row])
    fields = ["--problem-field", "q", "--answer-field", "meta.gold"]
    others = ["--id-field", "key", "--difficulty-field", "hard", "--prefix", "Q: "]
    assert run("mine", source, *fields, *others, "--suffix", " Box it.") == 0
    expected = {"id": "mine-5", "problem": "1+1?", "answer": "2", "difficulty": 3, "source": "mine"}
    assert kept(tmp_path) == [expected]
    assert run("mine", source, *fields[:2], out="other.jsonl") == 2
    assert "--problem-field and --answer-field" in capsys.readouterr().err
    assert run("mine", source, *fields, "--min-difficulty", 3, out="other.jsonl") == 2
    assert "--difficulty-field" in capsys.readouterr().err


def test_prepared_files_join_with_their_ids_and_sources(run: Prepare, tmp_path: Path) -> None:
    for name, problem in (("aime24", "P"), ("aime25", "Q")):
        row = ROWS[name][0] | {"problem": problem}
        bad = row | {"problem": "unverified", "answer": "}"}
        assert run(name, write_jsonl(tmp_path / "d.jsonl", [row, bad]), out=f"{name}.jsonl") == 0
    parts = [tmp_path / "aime24.jsonl", tmp_path / "aime25.jsonl"]
    assert run("prepared", *parts) == 0
    assert kept(tmp_path) == [row for part in parts for row in read_jsonl(part)]
    assert [row["source"] for row in kept(tmp_path)] == ["aime24", "aime25"]
    (tmp_path / "folder").mkdir()
    for part in tmp_path.glob("aime2*"):  # with their rejects and manifests
        part.rename(tmp_path / "folder" / part.name)
    assert run("prepared", tmp_path / "folder", out="again.jsonl") == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "out.jsonl").read_bytes()


# -- what is rejected ------------------------------------------------------------------------------


def test_repeats_are_one_problem(run: Prepare, tmp_path: Path) -> None:
    rows = [dapo("Find $x+1$.", "3", "a"), dapo("Find y.", "1", "b")] * 100
    rows.append(dapo("Find \\(x + 1\\).", "3", "c"))  # another row of the same problem
    rows.append(dapo("Find y.", "1.0", "b"))  # and another spelling of the same answer
    assert run("dapo", write_parquet(tmp_path / "d.parquet", "dapo", rows)) == 0
    assert [p["id"] for p in kept(tmp_path)] == ["dapo-a", "dapo-b"]
    lines = read_jsonl(tmp_path / "out.rejects.jsonl")
    assert [(r["where"], r["reason"], r.get("rows", 1)) for r in lines] == [
        ("d.parquet:3", "duplicate", 100),
        ("d.parquet:4", "duplicate", 99),
        ("d.parquet:202", "duplicate", 1),
    ]
    assert manifest(tmp_path)["counts"]["rejected"] == {"duplicate": 200}


def test_a_problem_with_two_answers_is_a_conflict_and_neither_is_kept(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        deepmath("Find $x$.", "\\frac{1}{2}"),
        deepmath("Find y.", "1"),
        deepmath("Find  x.", "0.5"),  # the verifier takes it for the first
        deepmath("Find x.", "0.25"),
        deepmath("Find x.", "0.25"),
    ]
    assert run("deepmath", write_parquet(tmp_path / "d.parquet", "deepmath", rows)) == 0
    assert [p["problem"] for p in kept(tmp_path)] == ["Find y."]
    lines = read_jsonl(tmp_path / "out.rejects.jsonl")
    assert [(r["where"], r["reason"], r.get("rows", 1)) for r in lines] == [
        ("d.parquet:1", "conflict", 1),
        ("d.parquet:3", "conflict", 1),
        ("d.parquet:4", "conflict", 2),
    ]
    assert "'\\\\frac{1}{2}' at d.parquet:1, '0.5' at d.parquet:3, '0.25'" in lines[0]["detail"]
    assert lines[0]["field"] == "final_answer"
    assert re.search(r"^conflict +4$", capsys.readouterr().out, re.MULTILINE)


def test_contamination_is_found_and_said(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    aime = {"id": 60, "problem": AIME, "solution": "", "answer": "204", "url": "", "year": "2024"}
    short = {"problem_idx": 7, "problem": "Find $\\cos 1$.", "answer": "1", "problem_type": LISTED}
    benchmark = write_parquet(tmp_path / "aime.parquet", "aime24", [aime])
    assert run("aime24", benchmark, out="aime24.jsonl") == 0
    (tmp_path / "hmmt").mkdir()
    write_parquet(tmp_path / "hmmt" / "train.parquet", "hmmt25_feb", [short])
    rows = [
        deepmath("Planted. " + AIME.replace("9", "8"), "204"),
        deepmath("Find  \\(\\cos 1\\).", "1"),
        deepmath("Aya walks 9 km at s km/h and rests t minutes, 4 hours in all. How long?", "204"),
        deepmath("Find $\\cos 2$.", "2"),
    ]
    source = write_parquet(tmp_path / "d.parquet", "deepmath", rows)
    against = ["--against", tmp_path / "aime24.jsonl", f"hmmt25_feb={tmp_path / 'hmmt'}"]
    assert run("deepmath", source, *against) == 0
    assert [p["answer"] for p in kept(tmp_path)] == ["204", "2"]  # the paraphrase passes
    assert rejects(tmp_path) == [("d.parquet:1", "contaminated"), ("d.parquet:2", "contaminated")]
    details = [r["detail"] for r in read_jsonl(tmp_path / "out.rejects.jsonl")]
    assert "aime24-60 of aime24: 0.9" in details[0]
    assert "'every morning aya goes for" not in details[0]  # its n-gram holds the changed number
    assert "kilometer long walk and stops at a coffee shop" in details[0]
    assert "hmmt25_feb-7 of hmmt25_feb: 1.00" in details[1] and "the whole text" in details[1]
    said = capsys.readouterr().out
    assert manifest(tmp_path)["counts"]["contaminated_by"] == {"aime24": 1, "hmmt25_feb": 1}
    assert re.search(r"by aime24 +1\n +by hmmt25_feb +1\n", said)
    assert [s["file"] for s in manifest(tmp_path)["against"]] == ["aime24.jsonl", "train.parquet"]


def test_without_a_benchmark_the_table_says_so(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [ROWS["aime24"][0]])
    assert run("aime24", source) == 0
    assert "not decontaminated" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"problem": "P", "answer": ""}', ["bench.jsonl:1", "'answer' is empty"]),
        ("nonsense", ["bench.jsonl:1", "not JSON"]),
        ("", ["holds no rows"]),
        (None, ["bench.jsonl is neither a file nor a set", "aime24"]),
    ],
)
def test_a_broken_benchmark_stops_the_work(
    run: Prepare,
    tmp_path: Path,
    content: str | None,
    named: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [ROWS["aime24"][0]])
    if content is not None:
        (tmp_path / "bench.jsonl").write_text(content)
    assert run("aime24", source, "--against", tmp_path / "bench.jsonl") == 2
    error = capsys.readouterr().err
    assert [part for part in named if part not in error] == []
    assert not (tmp_path / "out.jsonl").exists()


def test_answers_that_do_not_verify_against_themselves(run: Prepare, tmp_path: Path) -> None:
    answers = ["5", "\\frac{1}{", "}", "a } b {", "\\text{}", "9" * 5000, "\\text{Yes}"]
    rows = [deepmath(f"Find {i}.", answer) for i, answer in enumerate(answers)]
    assert run("deepmath", write_parquet(tmp_path / "d.parquet", "deepmath", rows)) == 0
    assert [p["answer"] for p in kept(tmp_path)] == ["5", "\\text{Yes}"]
    lines = read_jsonl(tmp_path / "out.rejects.jsonl")
    assert {(r["reason"], r["field"]) for r in lines} == {("unverified", "final_answer")}
    assert [r["detail"].rpartition(" ")[2] for r in lines] == [
        *("unclosed", "empty", "unparsable", "no_reference", "too_long")
    ]


def test_a_verifier_that_hangs_on_an_answer_loses_that_row_only(
    run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_checks.py").write_text(
        "import time\n\n\ndef check(completion, answer):\n"
        "    time.sleep(600 if answer == 'slow' else 0)\n    return True\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    rows = [deepmath(f"Find {i}.", answer) for i, answer in enumerate(["1", "slow", "3"])]
    source = write_parquet(tmp_path / "d.parquet", "deepmath", rows)
    options = ["--verifier", "slow_checks.check", "--timeout", "1", "--num-workers", "1"]
    assert run("deepmath", source, *options) == 0
    assert [p["answer"] for p in kept(tmp_path)] == ["1", "3"]
    assert "timeout" in read_jsonl(tmp_path / "out.rejects.jsonl")[0]["detail"]


# -- the end to end --------------------------------------------------------------------------------


def test_the_trainer_reads_and_renders_what_was_prepared(run: Prepare, tmp_path: Path) -> None:
    questions = ["Find $\\pi$:\r\nnow.", "  Ein Würfel “π”? "]
    rows = [deepmath(q, "\\frac{1}{2}", 6.0 + i) for i, q in enumerate(questions)]
    assert run("deepmath", write_parquet(tmp_path / "d.parquet", "deepmath", rows)) == 0
    problems = load_problems(
        str(tmp_path / "out.jsonl"),
        problem_field="problem",
        answer_field="answer",
        solution_field=None,
        min_difficulty=7.0,
    )
    assert problems == [Problem(kept(tmp_path)[1]["id"], "Ein Würfel “π”?", "\\frac{1}{2}")]
    assert kept(tmp_path)[0]["problem"] == "Find $\\pi$:\nnow."
    suffix = "\nPut your final answer within \\boxed{}."
    tokenizer = byte_tokenizer("{{ messages[0].content }}")
    (prompt,) = render(problems, tokenizer, DataConfig(prompt_suffix=suffix), 1000)
    assert tokenizer.decode(prompt.token_ids) == "Ein Würfel “π”?" + suffix


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import runpy, sys; sys.argv = ['prepare_prompts.py', '--help']\n"
        "try: runpy.run_path(sys.orig_argv[-1], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'sympy', 'pyarrow', 'huggingface_hub', 'tqdm'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(TOOL)], capture_output=True, text=True, check=True
    )
    for word in ("deepmath", "--against", "--strict", "--min-difficulty", "--num-workers"):
        assert word in result.stdout
