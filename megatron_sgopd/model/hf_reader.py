"""Reads the weights of a Hugging Face directory tensor by tensor; `hf_writer` writes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sgopd.model.hf_location import weight_files

DTYPES = {  # safetensors' names of the types a model may have
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}


@dataclass(frozen=True)
class Entry:
    """A tensor on disk."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it


class StoredWeights:
    """A directory's tensors by name, each read when it is asked for and no earlier.

    Raises:
        ValueError: no weights, pickled ones, a broken index, a file that is missing, damaged or
            cut short, or a name that comes twice.
    """

    def __init__(self, path: Path, *, allow_pickle: bool = False) -> None:
        self.path = path
        self._pickled: dict[str, Tensor] = {}
        files = weight_files(path, allow_pickle=allow_pickle)
        self.entries: dict[str, Entry] = {}
        for file in files:
            for name, entry in self._entries_of(file):
                if name in self.entries:
                    raise ValueError(f"{name} is in {path} twice")
                self.entries[name] = entry

    def get(self, name: str) -> Tensor:
        """The tensor; the file is mapped into memory for as long as it lives."""
        if name in self._pickled:
            return self._pickled[name]
        file = self.entries[name].file
        try:
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short: {error}") from error

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of all, one in memory at a time."""
        return ((name, self.get(name)) for name in self.entries)

    def check_types(self) -> dict[str, str]:
        """safetensors' types of the tensors, each with a tensor of it.

        Raises:
            ValueError: a type that no model here has.
        """
        found = {entry.dtype: name for name, entry in self.entries.items()}
        if strange := sorted(set(found) - set(DTYPES)):
            raise ValueError(
                f"{self.path}: {found[strange[0]]!r} has the type {strange[0]}, of quantised "
                f"weights or other data; supported are {', '.join(DTYPES)}"
            )
        return found

    @cached_property
    def dtype(self) -> torch.dtype:
        """Returns the one type of all tensors.

        Raises:
            ValueError: a type that no model here has, or several of them.
        """
        found = self.check_types()
        if len(found) > 1:
            kinds = ", ".join(f"{dtype} ({name})" for dtype, name in sorted(found.items()))
            raise ValueError(
                f"{self.path} holds tensors of several types: {kinds}. A model here has one: "
                "choose it with --dtype (float32 loses nothing)"
            )
        return DTYPES[next(iter(found))]

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], tied: tuple[str, str] | None = None
    ) -> None:
        """Checks that exactly these tensors are there.

        `tied`: (head, embedding) of a tied model, whose head some writers store a second time.

        Raises:
            ValueError: a missing, unknown or misshapen tensor, or a tied head of its own, by name.
        """
        for name, entry in self.entries.items():
            if tied is None or name != tied[0]:
                check_tensor(name, entry.shape, shapes, str(self.path))
        check_none_missing(self.entries, shapes, str(self.path))
        if tied is not None and tied[0] in self.entries:
            head, embedding = map(self.get, tied)
            if not torch.equal(head, embedding):
                raise ValueError(
                    f"{self.path}: config.json has tie_word_embeddings true, and {tied[0]!r} is "
                    f"not {tied[1]!r}: set it to false to keep the head"
                )

    def _entries_of(self, file: Path) -> Iterator[tuple[str, Entry]]:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118 (not a dict)
                        part = tensors.get_slice(name)
                        yield name, Entry(file, tuple(part.get_shape()), part.get_dtype())
            except SafetensorError as error:
                raise ValueError(f"{file} is damaged or cut short: {error}") from error
            return
        try:  # weights_only: plain tensors and nothing that runs
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            tensors = {str(k): v for k, v in loaded.items() if isinstance(v, Tensor)}
        except Exception as error:  # whose text tells how to read it all the same
            raise ValueError(
                f"{file} cannot be read as plain tensors ({type(error).__name__}): it is damaged, "
                "or holds objects that could run code"
            ) from error
        codes = {dtype: code for code, dtype in DTYPES.items()}
        for name, tensor in tensors.items():
            self._pickled[name] = tensor
            yield name, Entry(file, tuple(tensor.shape), codes.get(tensor.dtype, str(tensor.dtype)))


def check_tensor(
    name: str, shape: tuple[int, ...], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    if name not in expected:
        raise ValueError(f"{source} holds {name!r}, which this architecture does not have")
    if shape != expected[name]:
        raise ValueError(f"{source}: {name!r} has shape {shape}, config.json says {expected[name]}")


def check_none_missing(
    seen: Mapping[str, Any] | set[str], expected: Mapping[str, tuple[int, ...]], source: str
) -> None:
    if missing := sorted(set(expected) - set(seen)):
        raise ValueError(f"{source} lacks {missing[0]!r} ({len(missing)} tensors are missing)")


def iter_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a directory's weights, one in memory at a time; see `StoredWeights`."""
    yield from StoredWeights(path)
