"""Megatron checkpoints on disk: found, and checked to be whole before anything is made of them.

A checkpoint is a folder of torch's distributed format as Megatron writes it, and in `hf/` what
makes it self-contained: config.json, tokenizer, and for a run its recipe. `.metadata` is a pickle,
as torch writes it: open checkpoints of people you trust.

Layout: RUN_DIR/checkpoints/step-00000050/{metadata.json, .metadata, common.pt, *.distcp, hf/}
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

NAME = re.compile(r"step-(\d{8})")
COMPANIONS = "hf"  # the folder in a checkpoint
RECIPE = "recipe.yaml"
PARTS = ("metadata.json", ".metadata", "common.pt")
OURS = (*PARTS, "*.distcp", COMPANIONS)
WEIGHTS = ("embedding.", "decoder.", "output_layer.")  # begin the keys that are no optimizer state


@dataclass(frozen=True)
class Stored:
    """A whole checkpoint."""

    path: Path
    shapes: dict[str, tuple[int, ...]]  # of the weights, by Megatron's names
    dtype: torch.dtype

    @property
    def companions(self) -> Path:
        return self.path / COMPANIONS

    @property
    def step(self) -> int | None:
        match = NAME.fullmatch(self.path.name)
        return int(match[1]) if match else None

    @property
    def run_dir(self) -> Path | None:
        """Returns the folder of the run that wrote it."""
        return self.path.parent.parent if self.path.parent.name == "checkpoints" else None


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    folder = run_dir / "checkpoints"
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if NAME.fullmatch(p.name))


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that was named, or the newest of the run that was named.

    Raises:
        ValueError: neither; says what is there.
    """
    if not path.is_dir():
        raise ValueError(f"{path} is no folder: give a checkpoint or the folder of a run")
    if not (path / "checkpoints").is_dir():
        return path
    if complete := list_checkpoints(path):
        return complete[-1]
    others = sorted(p.name for p in (path / "checkpoints").iterdir())
    found = f"only {others[0]}, which is half-written" if others else "none"
    raise ValueError(f"{path / 'checkpoints'} holds no complete checkpoint ({found})")


def open_checkpoint(path: Path) -> Stored:
    """Checks that a checkpoint is whole and self-contained.

    Raises:
        ValueError: half-written, a file missing or cut short, or not of this kind, by name.
    """
    for name in PARTS:
        if not (path / name).is_file():
            raise ValueError(f"{path} is no complete checkpoint: {name} is missing")
    if path.name.endswith(".sgopd-tmp"):
        raise ValueError(f"{path} is half-written: its writer was stopped; take a complete one")
    if not (path / COMPANIONS / "config.json").is_file():
        raise ValueError(
            f"{path} has no {COMPANIONS}/config.json, so it does not say what model it is: put the "
            f"Hugging Face config.json and tokenizer files of the model into {path / COMPANIONS}"
        )
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:  # a damaged pickle may raise anything
        raise ValueError(f"{path / '.metadata'} is damaged or cut short: {error}") from error
    ends: dict[str, int] = {}
    for part in (metadata.storage_data or {}).values():
        end = part.offset + part.length
        ends[part.relative_path] = max(end, ends.get(part.relative_path, 0))
    for name, end in sorted(ends.items()):
        if not (path / name).is_file():
            raise ValueError(f"{path} is no complete checkpoint: {name} is missing")
        if (size := (path / name).stat().st_size) < end:
            raise ValueError(f"{path / name} is cut short: it has {size} bytes of {end}")
    return _stored(path, metadata.state_dict_metadata)


def _stored(path: Path, entries: dict[str, Any]) -> Stored:
    tensors = {
        key: entry
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and key.startswith(WEIGHTS)
    }
    dtypes = {entry.properties.dtype for entry in tensors.values()}
    if len(dtypes) != 1:
        raise ValueError(
            f"{path} holds weights of {len(dtypes)} types ({sorted(map(str, dtypes))}); one is "
            "wanted: is it a checkpoint of this project?"
        )
    return Stored(path, {k: tuple(e.size) for k, e in tensors.items()}, dtypes.pop())
