"""Writes files and folders that appear whole or not at all, and reads what was cut short.

A folder never takes the place of one that somebody else made.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

# -- files -----------------------------------------------------------------------------------------


def write_file(path: Path, *parts: bytes | str) -> None:
    """Writes a file, and its folder, so that readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Named after the process: two that write the same file do not write into each other's.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            for part in parts:
                file.write(part.encode() if isinstance(part, str) else part)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes one JSON value, indented."""
    write_file(path, json.dumps(value, indent=1, ensure_ascii=False), "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line."""
    write_file(path, *map(json_line, rows))


def json_line(row: Mapping[str, Any]) -> bytes:
    """Encodes one line of JSON, its end included."""
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half of a surrogate pair, as a byte-level tokenizer may leave
        return (json.dumps(row) + "\n").encode()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Reads the rows of a JSONL file: none where it is missing, without a last line cut short.

    A process that was killed leaves such a line.

    Raises:
        ValueError: any other line that is not a JSON object, with its place.
    """
    if not path.is_file():
        return
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.endswith(b"\n"):
                return
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(
                    f"{path}:{number}: not JSON ({error}); mend it or remove the file"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}:{number}: a JSON object is wanted, got {type(row).__name__}"
                )
            yield row


# -- folders ---------------------------------------------------------------------------------------


def begin_folder(path: Path) -> Path:
    """An empty folder beside `path` to be filled, then to be put in its place.

    Of a link it is the place that it leads to, on whatever disk that is; the link stays.
    """
    path = path.resolve()
    old, new = _neighbour(path, "old"), _neighbour(path, "tmp")
    if old.is_dir():  # of a process that was killed in `finish_folder`
        if path.exists():
            shutil.rmtree(old)
        else:
            old.rename(path)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def finish_folder(path: Path) -> None:
    """Puts the filled folder in the place of what is at `path`.

    Killed in between, the old one is left beside it and the next `begin_folder` puts it back.
    """
    path = path.resolve()
    old, new = _neighbour(path, "old"), _neighbour(path, "tmp")
    if path.exists():
        path.rename(old)
    new.rename(path)
    shutil.rmtree(old, ignore_errors=True)


def discard_folder(path: Path) -> None:
    """Removes what a failed attempt has filled so far."""
    shutil.rmtree(_neighbour(path.resolve(), "tmp"), ignore_errors=True)


def _neighbour(path: Path, kind: str) -> Path:
    """Hidden, and named so that no folder of anybody else is called like it."""
    return path.with_name(f".{path.name}.sgopd-{kind}")


def check_replaceable(path: Path, ours: Sequence[str], mark: str) -> None:
    """Tells whether `path` is free, empty, or a folder of ours with nothing else in it.

    `ours`: patterns of the names that we write; `mark`: the one that only we write.

    Raises:
        ValueError: replacing it would delete something that we did not write, naming it; or it is
            a mount point, which cannot be replaced.
    """
    if not path.exists():
        return
    remedy = "choose another --out, or remove it yourself"
    if not path.is_dir():
        raise ValueError(f"{path} exists and is no folder: {remedy}")
    if path.is_mount():
        raise ValueError(f"{path} is where a disk is mounted: give a folder in it as --out")
    names = sorted(p.name for p in path.iterdir())
    if strange := [n for n in names if not any(fnmatch(n, pattern) for pattern in ours)]:
        raise ValueError(f"{path} exists and holds {strange[0]}, which is not ours: {remedy}")
    if names and mark not in names:
        raise ValueError(f"{path} exists and was not written by this tool (no {mark}): {remedy}")
