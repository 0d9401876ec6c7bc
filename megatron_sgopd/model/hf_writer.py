"""Writes Hugging Face directories from a stream of weights, whole or not at all.

A shard's header follows from names, shapes and type, so it is written first and every tensor goes
to its place as it comes: memory is one tensor, whatever the size of a shard.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sgopd.atomic_files import begin_folder, finish_folder
from megatron_sgopd.model.hf_location import COMPANIONS, INDEX, ONE_FILE
from megatron_sgopd.model.hf_reader import DTYPES

MAX_SHARD_BYTES = 5 * 10**9  # as transformers; a shard costs no memory here
README, ORIGIN_FILE = "README.md", "sgopd.json"
OURS = (*COMPANIONS, "config.json", README, ORIGIN_FILE, "model*.safetensors", INDEX, "recipe.yaml")
HEADER_ALIGNMENT = 8


@dataclass(frozen=True)
class Place:
    file: str
    offset: int  # of its first byte in the file
    size: int


def write_hf_dir(
    path: Path,
    files: Path,
    weights: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    *,
    texts: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    writes: bool = True,
) -> None:
    """Writes the weights in `dtype`, and beside them what travels with them from `files`.

    `weights` may be collective, so every rank calls this and reads it to the end; only the rank
    with `writes` touches the disk. `shapes`: of every tensor that will come. `texts`: other files,
    by name. config.json stays as its author wrote it, the weights' type aside.

    Raises:
        ValueError: a tensor that was not announced, misshapen, twice, or not there in the end.
    """
    if not writes:
        for _ in weights:
            pass
        return
    folder = begin_folder(path)
    copy_companions(files, folder, texts or {})
    _set_dtype(folder / "config.json", dtype)
    places = _plan(folder, shapes, dtype, max_shard_bytes)
    _fill(folder, weights, shapes, dtype, places)
    finish_folder(path)


def copy_companions(source: Path, target: Path, texts: Mapping[str, str]) -> None:
    """config.json, generation config, tokenizer, chat template, licence; and these texts."""
    target.mkdir(exist_ok=True)
    for pattern in (*COMPANIONS, "config.json"):
        for file in source.glob(pattern):
            if file.is_dir():
                shutil.copytree(file, target / file.name, dirs_exist_ok=True)
            else:
                shutil.copyfile(file, target / file.name)  # not its permissions
    for name, text in texts.items():
        (target / name).write_text(text, encoding="utf-8")


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    """transformers loads weights in the type that config.json names."""
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"
    if config.get(key) != name:
        config[key] = name
        config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _plan(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, max_shard_bytes: int
) -> dict[str, Place]:
    """Plans where tensors go; writes headers and index. A larger tensor has its own shard."""
    sizes = {name: prod(shape) * dtype.itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    places: dict[str, Place] = {}
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file = ONE_FILE if len(shards) == 1 else file
        header, start = _header({n: shapes[n] for n in names}, dtype)
        (folder / file).write_bytes(header)
        for name in names:
            places[name] = Place(file, start, sizes[name])
            start += sizes[name]
    if len(shards) > 1:
        weight_map = {name: place.file for name, place in places.items()}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX).write_text(text, encoding="utf-8")
    return places


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> tuple[bytes, int]:
    """The beginning of a safetensors file, and where its data begins.

    https://huggingface.co/docs/safetensors: 8 bytes of length, JSON padded with spaces, data.
    """
    code = {dtype: code for code, dtype in DTYPES.items()}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text, 8 + len(text)


def _fill(
    folder: Path,
    weights: Iterable[tuple[str, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    dtype: torch.dtype,
    places: Mapping[str, Place],
) -> None:
    waiting = set(shapes)
    for name, tensor in weights:
        if name not in waiting or tuple(tensor.shape) != shapes[name]:
            raise ValueError(
                f"{name!r} of shape {tuple(tensor.shape)} came to be written; "
                f"{shapes.get(name, 'none')} was announced, and each tensor once"
            )
        waiting.remove(name)
        place = places[name]
        flat = tensor.detach().to("cpu", dtype).contiguous().view(-1).view(torch.uint8)
        with open(folder / place.file, "r+b") as file:
            file.seek(place.offset)
            file.write(flat.numpy())  # type: ignore[arg-type]  # a buffer
    if waiting:
        raise ValueError(f"{min(waiting)!r} did not come to be written ({len(waiting)} missing)")
