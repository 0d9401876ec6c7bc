"""Hugging Face directories: found, read name by name, and written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 2**30
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "added_tokens*")
EXTRA_FILES = (*TOKENIZER_FILES, "generation_config.json", "chat_template*")


def resolve_hf_dir(path: str, *, weights: bool = True) -> Path:
    """A local directory, or the local snapshot of a hub name (downloaded where that is possible).

    Without `weights`, of a hub name only what is small.

    Raises:
        ValueError: neither; says what was tried.
    """
    local = Path(path)
    if (local / "config.json").is_file():
        return local
    if local.exists():
        raise ValueError(f"{path} has no config.json: give a Hugging Face model directory")
    if path.count("/") != 1 or path.startswith((".", "/")):
        raise ValueError(
            f"{path} does not exist: give a Hugging Face model directory or a hub name OWNER/NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.jinja", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(path, allow_patterns=patterns))
    except Exception as error:
        raise ValueError(
            f"{path} is no local directory and could not be had from the hub "
            f"({type(error).__name__}: {error}): download it first and give its directory"
        ) from error


def read_hf_config(path: Path) -> Any:
    """The transformers config of a directory."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path / 'config.json'} cannot be read: {error}") from error


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory.

    Raises:
        ValueError: none, only pickled weights, a broken index, or a file it names is missing.
    """
    if (path / INDEX).is_file():
        try:
            weight_map = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path / INDEX} is not an index of safetensors files ({error!r})"
            ) from error
        if absent := [n for n in names if not (path / n).is_file()]:
            raise ValueError(f"{path / INDEX} names {absent[0]}, which is missing")
        return [path / n for n in names]
    if (path / ONE_FILE).is_file():
        return [path / ONE_FILE]
    if pickled := sorted(path.glob("*.bin")) + sorted(path.glob("*.pt")):
        raise ValueError(
            f"{path} holds pickled weights only ({pickled[0].name}), which can run code when read: "
            "convert them to safetensors"
        )
    raise ValueError(f"{path} holds no weights: {ONE_FILE} or {INDEX} is missing")


def iter_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a directory's weights, one in memory at a time.

    Raises:
        ValueError: a truncated or damaged file, or a name that comes twice.
    """
    seen: set[str] = set()
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    if name in seen:
                        raise ValueError(f"{name} is in {path} twice")
                    seen.add(name)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or cut short: {error}") from error


def write_hf_dir(
    path: Path,
    config: Any,
    weights: Iterable[tuple[str, Tensor]],
    extra_files_from: Path,
    *,
    writes: bool = True,
) -> None:
    """Writes config, weights and the source's tokenizer files; the folder appears whole.

    `weights` may be collective, so every rank calls this and reads it to the end; only the rank
    with `writes` touches the disk. Memory: one shard of at most MAX_SHARD_BYTES.
    """
    temporary = path.with_name(path.name + ".tmp")
    if writes:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    shard: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    size = total = 0

    def flush() -> None:
        nonlocal size
        if shard:
            save_file(shard, temporary / f"shard-{len(shards)}.tmp", metadata={"format": "pt"})
            shards.append(list(shard))
            shard.clear()
        size = 0

    for name, tensor in weights:
        if not writes:
            continue
        bytes_ = tensor.numel() * tensor.element_size()
        if size + bytes_ > MAX_SHARD_BYTES:
            flush()
        shard[name] = tensor.detach().to("cpu", copy=True).contiguous()
        size, total = size + bytes_, total + bytes_
    if not writes:
        return
    flush()
    _name_shards(temporary, shards, total)
    config.save_pretrained(temporary)
    for pattern in EXTRA_FILES:
        for file in extra_files_from.glob(pattern):
            shutil.copy2(file, temporary / file.name)
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


def _name_shards(folder: Path, shards: list[list[str]], total: int) -> None:
    if len(shards) == 1:
        (folder / "shard-0.tmp").rename(folder / ONE_FILE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"shard-{i}.tmp").rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
