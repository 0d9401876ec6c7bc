"""Phases with a memory: a result is reused while its inputs and its files are unchanged.

A phase's folder holds `phase.json` with the key of its inputs and the SHA-256 of every file it
left, written last, so that an interrupted phase has none and is done again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_sgopd.atomic_files import write_json

MARKER = "phase.json"
_LIBRARIES = ("torch", "megatron-core", "transformers", "tokenizers", "numpy", "math-verify")
_PACKAGE = Path(__file__).resolve().parents[1]
# Not part of a run: the demonstration's own driver, and the page made from finished runs.
_BESIDE_THE_RUNS = ("demo", "evaluation/report.py", "evaluation/report_figures.py")


def content_key(parts: Mapping[str, Any]) -> str:
    """SHA-256 of the parts, whatever their order."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def source_key(package: Path = _PACKAGE) -> str:
    """The trainer's source: every module of the package that a run can depend on."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        relative = path.relative_to(package)
        if not any(relative.is_relative_to(beside) for beside in _BESIDE_THE_RUNS):
            digest.update(f"{relative}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def library_versions() -> dict[str, str | None]:
    """Installed versions; null where a library is missing."""
    return {name: _version(name) for name in _LIBRARIES}


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file below `directory` but the marker, by relative path."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MARKER
    }


def reusable(directory: Path, key: str) -> tuple[bool, str]:
    """Tells whether the folder holds a finished result of these inputs, and if not, why not.

    The reason is empty where nothing was there to reuse.
    """
    marker = directory / MARKER
    if not marker.exists():
        left_over = directory.exists() and any(directory.iterdir())
        return False, "an earlier attempt did not finish" if left_over else ""
    try:
        content = json.loads(marker.read_text())
        known_key, known_files = content["key"], content["files"]
    except (ValueError, KeyError, TypeError):
        return False, f"{marker} cannot be read"
    if known_key != key:
        return False, "recipe, world, source or versions have changed"
    found = file_hashes(directory)
    for name in sorted(found.keys() | known_files.keys()):
        if found.get(name) != known_files.get(name):
            what = "is missing" if name not in found else "has changed since"
            return False, f"{name} {what}"
    return True, ""


def results_key(directory: Path) -> str:
    """Returns what later phases read of a finished phase: its `hf/` folder, or all of it.

    Logs and timings of a run done again do not count, its weights do.
    """
    files: dict[str, str] = json.loads((directory / MARKER).read_text())["files"]
    weights = {name: digest for name, digest in files.items() if name.startswith("hf/")}
    return content_key(weights or files)


def seconds_of(directory: Path) -> float:
    """Returns how long the finished phase took when it ran."""
    return float(json.loads((directory / MARKER).read_text())["seconds"])


def clear(directory: Path) -> None:
    """Removes a folder made by an earlier phase."""
    if directory.exists():
        shutil.rmtree(directory)


def mark_finished(directory: Path, key: str, seconds: float) -> None:
    """Makes the folder reusable."""
    content = {"key": key, "seconds": round(seconds, 1), "files": file_hashes(directory)}
    write_json(directory / MARKER, content)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
