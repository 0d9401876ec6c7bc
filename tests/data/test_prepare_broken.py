"""tools/prepare_prompts.py on broken input, and what it writes and refuses to write."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from tests.support.set_files import (
    Prepare,
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


GOOD = {"id": 1, "problem": "Find $x$.", "answer": "1"}


def line(**fields: Any) -> bytes:
    return json.dumps({"id": 2, "problem": "Find y.", "answer": "2"} | fields).encode()


# -- rows ------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[bytes, str, str | None, str]] = {  # line, reason, field, in the detail
    "cut short": (b'{"id": 2, "problem": ', "not_json", None, "column"),
    "a list": (b"[1]", "not_an_object", None, "got list"),
    "huge number": (b'{"answer": ' + b"9" * 5000 + b"}", "not_json", None, "not JSON"),
    "nested without end": (b"[" * 100_000, "not_json", None, "recursion"),
    "latin-1": ('{"problem": "für", "answer": "2"}'.encode("latin-1"), "not_utf8", None, "byte 14"),
    "no answer": (b'{"problem": "Find y."}', "missing_field", "answer", "it has problem"),
    "other names": (b'{"q": "y", "answer": 2}', "missing_field", "problem", "--problem-field"),
    "empty answer": (line(answer=" \n"), "empty", "answer", "is empty"),
    "empty problem": (line(problem=""), "empty", "problem", "is empty"),
    "null answer": (line(answer=None), "wrong_type", "answer", "NoneType"),
    "true answer": (line(answer=True), "wrong_type", "answer", "bool"),
    "list problem": (line(problem=["Find y."]), "wrong_type", "problem", "list"),
    "nan answer": (line(answer=float("nan")), "wrong_type", "answer", "nan"),
    "list id": (line(id=[1]), "wrong_type", "id", "list"),
    "same id": (line(id=1), "duplicate_id", "id", "that of d.jsonl:1"),
    "half a surrogate": (line(problem="\ud83d"), "not_unicode", "problem", "surrogate"),
    "lost backslash": (line(problem="$\frac12$"), "control_character", "problem", "\\x0crac12"),
    "long": (line(problem="x" * 1_000_000), "too_long", "problem", "1000000 characters"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_listed_and_the_others_are_kept(
    run: Prepare, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, reason, field, detail = BROKEN[name]
    last = {"id": 3, "problem": "Find z.", "answer": "3"}
    rows = [json.dumps(GOOD).encode(), b"", content, json.dumps(last).encode()]
    source = tmp_path / "d.jsonl"
    source.write_bytes(b"\n".join(rows) + b"\n")
    assert run("aime24", source) == 0
    assert [p["id"] for p in kept(tmp_path)] == ["aime24-1", "aime24-3"]
    (reject,) = read_jsonl(tmp_path / "out.rejects.jsonl")
    assert (reject["where"], reject["reason"], reject.get("field")) == ("d.jsonl:3", reason, field)
    assert detail in reject["detail"]
    assert len(json.dumps(reject)) < 1000
    assert run("aime24", source, "--strict", out="strict.jsonl") == 2
    error = capsys.readouterr().err
    assert "error: d.jsonl:3: " in error and detail in error
    assert list(tmp_path.glob("strict*")) == []


def test_a_column_of_another_type_and_bytes_that_are_no_text(run: Prepare, tmp_path: Path) -> None:
    problems = arrow.array([b"Find x.", b"Find \xff.", b"Find y."]).cast(arrow.binary())
    text = arrow.Array.from_buffers(arrow.string(), 3, problems.buffers())
    levels = arrow.array(["7", "8", "9"])
    ids = arrow.array([1, 2, 3])
    table = {"problem": text, "answer": arrow.array([1, 2, 3]), "id": ids}
    parquet.write_table(arrow.table(table), tmp_path / "d.parquet")
    assert run("aime24", tmp_path / "d.parquet") == 0
    assert [p["id"] for p in kept(tmp_path)] == ["aime24-1", "aime24-3"]
    assert rejects(tmp_path) == [("d.parquet:2", "not_utf8")]
    rows = {"question": text.take([0, 2]), "final_answer": ids[:2], "difficulty": levels[:2]}
    parquet.write_table(arrow.table(rows), tmp_path / "e.parquet")
    assert run("deepmath", tmp_path / "e.parquet", "--overwrite") == 2  # none is left
    assert rejects(tmp_path) == [("e.parquet:1", "wrong_type"), ("e.parquet:2", "wrong_type")]


def test_a_row_without_the_difficulty_that_is_asked_for(run: Prepare, tmp_path: Path) -> None:
    rows = [deepmath("Find $x$.", "1", None), deepmath("Find $y$.", "1", float("nan"))]
    rows.append(deepmath("Find $z$.", "1"))
    source = write_parquet(tmp_path / "d.parquet", "deepmath", rows)
    assert run("deepmath", source) == 0
    assert rejects(tmp_path) == [("d.parquet:1", "missing_field"), ("d.parquet:2", "wrong_type")]
    assert run("deepmath", source, "--min-difficulty", "none", "--overwrite") == 0
    assert ["difficulty" in p for p in kept(tmp_path)] == [False, True]


def test_bom_crlf_and_a_missing_last_newline_are_no_trouble(run: Prepare, tmp_path: Path) -> None:
    plain = [GOOD, {"id": 2, "problem": "π:\nnow", "answer": "ü"}]
    write_jsonl(tmp_path / "plain.jsonl", plain)
    assert run("aime24", tmp_path / "plain.jsonl") == 0
    expected = (tmp_path / "out.jsonl").read_bytes()
    text = "\r\n".join(json.dumps(row).replace("\\n", "\\r\\n") for row in plain)
    (tmp_path / "windows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert run("aime24", tmp_path / "windows.jsonl", out="w.jsonl") == 0
    assert (tmp_path / "w.jsonl").read_bytes() == expected
    assert rejects(tmp_path) == []


# -- files -----------------------------------------------------------------------------------------


def test_files_that_cannot_be_read_stop_the_work(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [deepmath(f"Find ${i}$: {'abc' * i}", str(i)) for i in range(500)]
    whole = write_parquet(tmp_path / "whole.parquet", "deepmath", rows).read_bytes()
    other = write_parquet(tmp_path / "o.parquet", "aime25", []).read_bytes()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("x")
    damaged = bytearray(whole)
    damaged[100:2000] = b"\0" * 1900
    files = {
        "short.parquet": (whole[:-100], "not a readable Parquet file"),
        "nothing.parquet": (b"", "not a readable Parquet file"),
        "damaged.parquet": (bytes(damaged), "not a readable Parquet file"),
        "other.parquet": (other, "no column for field 'question'; it has problem_idx, problem"),
        "empty.jsonl": (b"", "holds no rows"),
        "blank.jsonl": (b"\xef\xbb\xbf\n\r\n", "holds no rows"),
        "utf16.jsonl": (json.dumps(GOOD).encode("utf-16"), "is UTF-16, UTF-8 is wanted"),
        "missing.jsonl": (None, "does not exist"),
        "folder": (None, "holds no .parquet or .jsonl file"),
    }
    for name, (content, complaint) in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        assert run("deepmath", tmp_path / name) == 2, name
        error = capsys.readouterr().err
        assert name in error and complaint in error, error
        assert list(tmp_path.glob("out*")) == []


def test_a_shard_cut_short_loses_nothing_silently(run: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(2):
        rows = [deepmath(f"Find ${i}+{j}$.", "1") for j in range(50)]
        write_parquet(folder / f"train-{i}.parquet", "deepmath", rows)
    assert run("deepmath", folder) == 0
    assert len(kept(tmp_path)) == 100
    second = folder / "train-1.parquet"
    second.write_bytes(second.read_bytes()[:-8])
    assert run("deepmath", folder, "--overwrite") == 2
    assert len(kept(tmp_path)) == 100


def test_a_folder_is_read_in_order_of_names_and_of_its_split(run: Prepare, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / ".cache").mkdir(parents=True)
    for name in ("train-1", "train-0", "test-0", ".cache/train-2"):
        write_parquet(folder / f"{name}.parquet", "deepmath", [deepmath(f"{name}?", "1")])
    assert run("deepmath", folder) == 0
    assert [p["problem"] for p in kept(tmp_path)] == ["train-0?", "train-1?"]
    assert [s["file"] for s in manifest(tmp_path)["sources"]] == [
        *("train-0.parquet", "train-1.parquet")
    ]


def test_a_hub_set_is_downloaded_or_the_error_says_what_to_do(
    run: Prepare,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "hub").mkdir()
    write_jsonl(tmp_path / "hub" / "test.jsonl", [GOOD | {"level": 5, "unique_id": "u"}])
    asked: list[str] = []

    def snapshot_download(name: str, repo_type: str, allow_patterns: list[str]) -> str:
        asked.append(f"{repo_type} {name}")
        return str(tmp_path / "hub")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert run("math500", "--against", "math500") == 2  # every problem is the benchmark's
    assert rejects(tmp_path) == [("HuggingFaceH4/MATH-500/test.jsonl:1", "contaminated")]
    assert asked == ["dataset HuggingFaceH4/MATH-500"] * 2
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: 1 / 0)
    assert run("math500") == 2
    assert "hf download HuggingFaceH4/MATH-500 --repo-type dataset" in capsys.readouterr().err


def test_files_of_one_name_are_told_apart_and_a_file_given_twice_is_refused(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, answer in (("a", "1"), ("b", "2")):
        (tmp_path / folder).mkdir()
        write_jsonl(tmp_path / folder / "d.jsonl", [GOOD | {"answer": answer}, line_of(answer)])
    first, second = tmp_path / "a" / "d.jsonl", tmp_path / "b" / "d.jsonl"
    assert run("aime24", first, second) == 0
    assert rejects(tmp_path) == [(f"{first}:1", "conflict"), (f"{second}:1", "conflict")]
    assert run("aime24", first, tmp_path / "a", out="twice.jsonl") == 2
    assert "is given twice" in capsys.readouterr().err


def line_of(name: str) -> dict[str, Any]:
    return {"id": f"only-{name}", "problem": f"Find {name}.", "answer": "1"}


# -- what is written -------------------------------------------------------------------------------


def test_the_same_input_gives_the_same_bytes_for_any_number_of_workers(
    run: Prepare, tmp_path: Path
) -> None:
    rows = []
    for i in range(10):
        rows.append(deepmath(f"Find ${i}$.", f"\\frac{{{i}}}{{2}}"))
        spelling = f"{i}/2" if i % 3 else f"\\frac{{\\sqrt{{{i}}}}}{{2}}"  # SymPy compares these
        rows.append(deepmath(f"Find  ${i}$.", spelling))
        rows.append(deepmath(f"Prove {i}.", "}" if i % 5 == 0 else str(i)))
        # Long answers go to the workers, short ones are decided at once and overtake them.
        items = ", ".join(map(str, range(i, 100 + i)))
        rows.append(deepmath(f"List {i}.", f"\\{{{items}\\}}"))
    source = write_parquet(tmp_path / "d.parquet", "deepmath", rows)
    written = []
    for workers in ("1", "2"):
        assert run("deepmath", source, "--num-workers", workers, "--overwrite") == 0
        written.append([p.read_bytes() for p in sorted(tmp_path.glob("out.*"))])
    assert len(written[0]) == 3
    assert written[0] == written[1]
    in_order = [row["question"] for row in rows if row["question"][0] in "PL"]
    found = [p["problem"] for p in kept(tmp_path) if p["problem"][0] in "PL"]
    assert found == [q for q in in_order if q not in ("Prove 0.", "Prove 5.")]
    reasons = manifest(tmp_path)["counts"]["rejected"]
    assert reasons["unverified"] == 2 and reasons["duplicate"] > 0 and reasons["conflict"] > 0


def test_the_manifest_says_what_was_made_of_what(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [GOOD, GOOD, {"id": 9, "problem": "Q", "answer": "}"}]
    source = write_jsonl(tmp_path / "d.jsonl", rows)
    assert run("aime24", source, "--ngram", 10) == 0
    about = manifest(tmp_path)
    sha = hashlib.sha256((tmp_path / "out.jsonl").read_bytes()).hexdigest()
    assert about["sha256"] == sha and sha in capsys.readouterr().out
    rejected = hashlib.sha256((tmp_path / "out.rejects.jsonl").read_bytes()).hexdigest()
    assert about["rejects_sha256"] == rejected
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert about["sources"] == [{"file": "d.jsonl", "sha256": digest, "rows": 3}]
    assert about["counts"] == {
        "read": 3,
        "kept": 1,
        "below_min_difficulty": 0,
        "rejected": {"duplicate": 1, "unverified": 1},
        "contaminated_by": {},
    }
    assert about["options"]["ngram_words"] == 10
    assert about["versions"]["math-verify"] is not None
    assert str(tmp_path) not in json.dumps(about)


def test_another_content_is_not_overwritten_unless_told(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [GOOD])
    assert run("aime24", source) == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert run("aime24", source) == 0  # the same again
    write_jsonl(source, [GOOD | {"answer": "2"}])
    before["d.jsonl"] = source.read_bytes()
    assert run("aime24", source) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert run("aime24", source, "--overwrite") == 0
    assert kept(tmp_path)[0]["answer"] == "2"
    assert run("aime24", source, out="d.jsonl") == 2
    assert "is an input" in capsys.readouterr().err
    assert run("aime24", source, out="out.json") == 2
    assert "ends in .jsonl" in capsys.readouterr().err


def test_a_write_that_fails_leaves_the_old_files(
    run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [GOOD])
    assert run("aime24", source) == 0
    write_jsonl(source, [GOOD | {"answer": "2"}])
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    write_bytes = Path.write_bytes

    def full(self: Path, data: bytes) -> int:
        if "manifest" in self.name:
            write_bytes(self, data[:10])
            raise OSError(28, os.strerror(28))
        return write_bytes(self, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    assert run("aime24", source, "--overwrite") == 2
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_where_nothing_is_left_the_rejects_say_why(
    run: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [{"question": "x", "answer": 1}] * 3)
    assert run("aime24", source) == 2
    error = capsys.readouterr().err
    assert "none of 3 rows is left: d.jsonl:1: no field 'problem'; it has answer, que" in error
    assert "out.rejects.jsonl" in error
    assert not (tmp_path / "out.jsonl").exists()
    assert {reason for _, reason in rejects(tmp_path)} == {"missing_field"}
