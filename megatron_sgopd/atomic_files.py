"""Folders that appear whole or not at all, and never take the place of somebody else's."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path


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
    """Whether `path` is free, empty, or a folder of ours with nothing else in it.

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
