"""Finds Hugging Face directories and what lies in them. Imports no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_sgopd.config.hub_names import is_hub_name

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED_FILE, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "vocab*",
    "merges.txt",
    "added_tokens*",
    "*.model",  # sentencepiece's
    "*.tiktoken",
)
CHAT_TEMPLATES = ("chat_template*", "additional_chat_templates")
LICENCES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
# What travels with the weights, beside config.json.
COMPANIONS = (*TOKENIZER_FILES, *CHAT_TEMPLATES, *LICENCES, "generation_config.json")


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
    if not is_hub_name(path):
        raise ValueError(
            f"{path} does not exist: give a Hugging Face model directory or a hub name OWNER/NAME"
        )
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.jinja", "README.md", *TOKENIZER_FILES, *LICENCES]
        patterns += ["*.safetensors"] if weights else []
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
        reason = str(error).partition("\n")[0]  # advice on upgrading transformers follows
        raise ValueError(f"{path / 'config.json'} cannot be read: {reason}") from error


def has_tokenizer(path: Path) -> bool:
    """Tells whether a vocabulary is there; tokenizer_config.json alone is none."""
    vocabularies = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken")
    return any(file.is_file() for pattern in vocabularies for file in path.glob(pattern))


def weight_files(path: Path, *, allow_pickle: bool = False) -> list[Path]:
    """The safetensors files of a directory, or its pickled ones where they are allowed.

    Raises:
        ValueError: none, only pickled weights, a broken index, or a file it names is missing.
    """
    if (path / INDEX).is_file():
        return _indexed(path, INDEX, "safetensors")
    if (path / ONE_FILE).is_file():
        return [path / ONE_FILE]
    pickled = sorted(path.glob("*.bin")) + sorted(path.glob("*.pt"))
    if allow_pickle and (path / PICKLED_INDEX).is_file():
        return _indexed(path, PICKLED_INDEX, "pickled")
    if allow_pickle and (path / PICKLED_FILE).is_file():
        return [path / PICKLED_FILE]
    if pickled and not allow_pickle:
        raise ValueError(
            f"{path} holds pickled weights only ({pickled[0].name}), which can run code when read: "
            "convert them to safetensors (tools/hf_to_megatron.py --allow-pickle reads plain "
            f"tensors from {PICKLED_FILE}, and tools/megatron_to_hf.py writes safetensors)"
        )
    raise ValueError(f"{path} holds no weights: {ONE_FILE} or {INDEX} is missing")


def _indexed(path: Path, index: str, kind: str) -> list[Path]:
    try:
        weight_map = json.loads((path / index).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path / index} is not an index of {kind} files ({error!r})") from error
    if outside := [n for n in names if Path(n).name != n]:
        raise ValueError(f"{path / index} names {outside[0]}, which is not a file of its folder")
    if absent := [n for n in names if not (path / n).is_file()]:
        raise ValueError(f"{path / index} names {absent[0]}, which is missing")
    return [path / n for n in names]
