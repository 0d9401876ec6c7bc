"""tools/label_rollouts.py: labels in order, resumes, and names what is wrong with a record."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOL = Path(__file__).parents[2] / "tools" / "label_rollouts.py"
Main = Callable[[list[str]], int]


@pytest.fixture(scope="module")
def main() -> Main:
    spec = importlib.util.spec_from_file_location("label_rollouts", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["label_rollouts"] = module
    spec.loader.exec_module(module)
    main: Main = module.main
    return main


def records(count: int) -> list[dict[str, Any]]:
    return [
        {"id": i, "completion": rf"so \boxed{{{i % 10}}}", "answer": str(i % 7), "note": "−½"}
        for i in range(count)
    ]


def write(path: Path, items: list[Any]) -> None:
    path.write_text("".join(json.dumps(item) + "\n" for item in items))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_labels_in_order(main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    items = records(1200)
    items[3] |= {"completion": r"\boxed{\frac{\sqrt{3}}{3}}", "answer": r"\frac{1}{\sqrt{3}}"}
    items[4] |= {"completion": "no box"}
    items[5] |= {"completion": "half a pair \ud800 \\boxed{5}", "answer": 5}
    write(source, items)
    assert main([str(source), str(target), "--workers", "1"]) == 0
    labelled = read(target)
    labels = [(row.pop("is_correct"), row.pop("extracted"), row.pop("reason")) for row in labelled]
    assert labelled == items
    assert labels[3] == (True, r"\frac{\sqrt{3}}{3}", "equal")
    assert labels[4] == (False, None, "no_boxed")
    assert labels[5] == (True, "5", "equal")
    assert labels[6:] == [
        (i % 10 == i % 7, str(i % 10), "equal" if i % 10 == i % 7 else "different")
        for i in range(6, 1200)
    ]
    right = sum(is_correct for is_correct, _, _ in labels)
    closing = f"{target}: 1200 records: {right} correct, {1200 - right} wrong (different "
    assert capsys.readouterr().out.startswith(closing)


def test_other_fields(main: Main, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, [{"text": r"\boxed{5}", "gold": "5.0"}])
    assert main([str(source), str(target), "--completion-field", "text"]) == 1
    options = ["--completion-field", "text", "--answer-field", "gold"]
    assert main([str(source), str(target), *options]) == 0
    assert read(target)[0]["is_correct"] is True


@pytest.mark.parametrize("kept_bytes", ["none", "half of a line", "whole lines", "all"])
def test_resumes_where_it_stopped(
    main: Main, tmp_path: Path, kept_bytes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target, whole = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "whole.jsonl"))
    write(source, records(40))
    assert main([str(source), str(whole)]) == 0
    lines = whole.read_bytes().splitlines(keepends=True)
    kept = {"none": 0, "half of a line": 12, "whole lines": 12, "all": 40}[kept_bytes]
    partial = lines[kept][:-5] if kept_bytes == "half of a line" else b""
    # A label that only an earlier run can have left shows that its lines are not made again.
    old = [line.replace(b'"different"', b'"earlier"') for line in lines[:kept]]
    target.write_bytes(b"".join(old) + partial)
    capsys.readouterr()
    assert main([str(source), str(target)]) == 0
    assert target.read_bytes() == b"".join([*old, *lines[kept:]])
    closing = capsys.readouterr().out
    assert (f"({kept} of them by an earlier run)" in closing) is (kept > 0)
    assert f"{target}: 40 records" in closing


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "a JSON object is wanted, this is a list"),
        ('{"completion": "5"}', "no field 'answer'"),
        ('{"answer": "5"}', "no field 'completion'"),
        ('{"completion": 5, "answer": "5"}', "field 'completion' is a int"),
        ('{"completion": "5", "answer": null}', "field 'answer' is a NoneType"),
        ('{"completion": "5", "answer": true}', "field 'answer' is a bool"),
        ('{"completion": "\udcff", "answer": "5"}', "not JSON"),
    ],
)
def test_malformed_record_is_named_and_work_kept(
    main: Main, tmp_path: Path, line: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    good = [json.dumps(record) for record in records(6)]
    lines = [*good[:3], "", *good[3:5], line, good[5]]  # a blank line is passed over, and counted
    source.write_bytes("\n".join(lines).encode(errors="surrogateescape"))
    assert main([str(source), str(target)]) == 1
    error = capsys.readouterr().err
    assert f"error: {source}:7: {complaint}" in error
    assert [row["id"] for row in read(target)] == [0, 1, 2, 3, 4]
    # The line mended, it goes on.
    source.write_text("\n".join([*lines[:6], *lines[7:]]))
    assert main([str(source), str(target)]) == 0
    assert [row["id"] for row in read(target)] == [0, 1, 2, 3, 4, 5]


def test_output_of_another_input_is_left_alone(
    main: Main, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write(source, records(5))
    main([str(source), str(target)])
    before = target.read_bytes()
    write(source, [*records(2), {"completion": "x", "answer": "5"}, *records(9)])
    assert main([str(source), str(target)]) == 1
    assert f"{target}:3: not the input's record" in capsys.readouterr().err
    write(source, records(4))
    assert main([str(source), str(target)]) == 1
    assert f"{target}:5: the input has fewer records" in capsys.readouterr().err
    assert target.read_bytes() == before
    assert main([str(source), str(source)]) == 1
    assert main([str(tmp_path / "missing"), str(target)]) == 1
    assert main([str(source), str(tmp_path / "new"), "--verifier", "no.such.function"]) == 1
    assert "no.such.function" in capsys.readouterr().err
    with target.open("rb") as other_run:
        fcntl.flock(other_run, fcntl.LOCK_EX)
        assert main([str(source), str(target)]) == 1
    assert "written by another run" in capsys.readouterr().err


def test_another_verifier_from_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "my_checks.py").write_text(
        "def last_word(completion, answer):\n    return completion.split()[-1] == answer\n"
    )
    write(tmp_path / "in.jsonl", [{"completion": "it is 5", "answer": "5"}])
    command = [sys.executable, str(TOOL), "in.jsonl", "out.jsonl"]
    subprocess.run(
        [*command, "--verifier", "my_checks.last_word"],
        cwd=tmp_path,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert read(tmp_path / "out.jsonl")[0]["is_correct"] is True


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import runpy, sys; sys.argv = ['label_rollouts.py', '--help']\n"
        "try: runpy.run_path(sys.orig_argv[-1], run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'sympy', 'math_verify', 'tqdm'} & set(sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(TOOL)], capture_output=True, text=True, check=True
    )
    for word in ("IN.jsonl", "OUT.jsonl", "--completion-field", "--verifier", "--timeout"):
        assert word in result.stdout
