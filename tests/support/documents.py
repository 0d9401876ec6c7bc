"""What docs/metrics.md and docs/run_folder.md name, and real run folders compared with them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_sgopd"
METRICS, RUN_FOLDER = ROOT / "docs" / "metrics.md", ROOT / "docs" / "run_folder.md"
LOGGING = ("train.py", "run.py", "metrics.py", "training/*.py", "rollouts/**/*.py")
NAME = re.compile(r"(?!time/)[a-z]+/(?:[a-z_]|\\w\+)+(?<!_)")  # of a metric; \w+ is put in


def first_cells(document: Path, section: str = "") -> list[str]:
    """Lists the quoted first cell of every row of a document's tables, in order.

    `section`: the heading of the one section to read.
    """
    text = document.read_text(encoding="utf-8")
    if section:
        text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([^`]+)`", text, re.MULTILINE)


def logged_names() -> set[str]:
    """Collects the names of metrics in the code, as regular expressions.

    Names are the strings of the form area/quantity in the files that log, and the spans of a
    `Clock`; a part of a name that the code puts in matches any word.
    """
    names: set[str] = set()
    for pattern in LOGGING:
        for path in PACKAGE.glob(pattern):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names |= {text for text in _strings(tree) if NAME.fullmatch(text)}
            names |= set(_spans(tree))
    return names


def _strings(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr | ast.Constant) and (text := _text(node)):
            yield text


def _spans(tree: ast.AST) -> Iterator[str]:
    """Yields the names under which calls of a clock's methods are logged."""
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args):
            continue
        owner, method, text = ast.unparse(node.func.value), node.func.attr, _text(node.args[0])
        if owner.endswith("clock") and method in ("span", "add", "take") and text:
            yield f"time/{text}_s"
            if method == "take":
                yield f"time/{text}_cpu_s"


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or r"\w+" for part in node.values)
    is_text = isinstance(node, ast.Constant) and isinstance(node.value, str)
    return str(node.value) if is_text else ""  # type: ignore[attr-defined]


def written_names() -> set[str]:
    """Collects the parts of paths in the code: of Python's strings and of Slurm's scripts."""
    texts: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        texts |= set(_strings(ast.parse(path.read_text(encoding="utf-8"))))
    for path in (ROOT / "slurm").rglob("*.sh"):
        texts |= set(re.split(r"[\s\"']+", path.read_text(encoding="utf-8")))
    return {part for text in texts for part in text.split("/")}


def status_words() -> set[str]:
    """Collects the words that the code writes into a file `status`."""
    calls = re.compile(r"set_status\((?:\w+, )?\"(\w+)\"|_write_status\(\w+, \"(\w+)\"")
    texts = [path.read_text(encoding="utf-8") for path in PACKAGE.rglob("*.py")]
    return {word for text in texts for words in calls.findall(text) for word in words if word}


def check_run_folder(folder: Path) -> None:
    """Asserts that the documents name every metric and every file of a run folder."""
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    names = {name for line in lines for name in json.loads(line)} - {"step"}
    unknown = sorted(names - set(first_cells(METRICS)))
    assert not unknown, f"docs/metrics.md does not name {unknown}"
    check_files(folder, "The run folder")


def check_files(folder: Path, section: str) -> None:
    """Asserts that a section of docs/run_folder.md names every file below a folder."""
    patterns = [cell + "*" * cell.endswith("/") for cell in first_cells(RUN_FOLDER, section)]
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()]
    assert names, f"{folder} is empty"
    unknown = sorted(n for n in names if not any(fnmatch(n, pattern) for pattern in patterns))
    assert not unknown, f"docs/run_folder.md does not name {unknown}"
