"""Finds a model's sizes: in its directory, the hub's cache, the table here, or on the hub."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.hub_names import is_hub_name
from megatron_sgopd.preflight.plan.architecture import Architecture, architecture_from_config

QWEN3_VOCAB, QWEN25_VOCAB, LLAMA_VOCAB = 151_936, 152_064, 128_256
# layers, hidden, heads, key-value heads, head width, feed-forward width, vocabulary, tied:
# config.json of each repository.
_DENSE = {
    "Qwen/Qwen3-0.6B": ("qwen3", 28, 1024, 16, 8, 128, 3072, QWEN3_VOCAB, True),
    "Qwen/Qwen3-1.7B": ("qwen3", 28, 2048, 16, 8, 128, 6144, QWEN3_VOCAB, True),
    "Qwen/Qwen3-4B": ("qwen3", 36, 2560, 32, 8, 128, 9728, QWEN3_VOCAB, True),
    "Qwen/Qwen3-8B": ("qwen3", 36, 4096, 32, 8, 128, 12288, QWEN3_VOCAB, False),
    "Qwen/Qwen3-14B": ("qwen3", 40, 5120, 40, 8, 128, 17408, QWEN3_VOCAB, False),
    "Qwen/Qwen3-32B": ("qwen3", 64, 5120, 64, 8, 128, 25600, QWEN3_VOCAB, False),
    "Qwen/Qwen2.5-0.5B": ("qwen2", 24, 896, 14, 2, 64, 4864, QWEN3_VOCAB, True),
    "Qwen/Qwen2.5-1.5B": ("qwen2", 28, 1536, 12, 2, 128, 8960, QWEN3_VOCAB, True),
    "Qwen/Qwen2.5-3B": ("qwen2", 36, 2048, 16, 2, 128, 11008, QWEN3_VOCAB, True),
    "Qwen/Qwen2.5-7B": ("qwen2", 28, 3584, 28, 4, 128, 18944, QWEN25_VOCAB, False),
    "Qwen/Qwen2.5-14B": ("qwen2", 48, 5120, 40, 8, 128, 13824, QWEN25_VOCAB, False),
    "Qwen/Qwen2.5-32B": ("qwen2", 64, 5120, 40, 8, 128, 27648, QWEN25_VOCAB, False),
    "Qwen/Qwen2.5-72B": ("qwen2", 80, 8192, 64, 8, 128, 29568, QWEN25_VOCAB, False),
    "meta-llama/Llama-3.1-8B": ("llama", 32, 4096, 32, 8, 128, 14336, LLAMA_VOCAB, False),
    "meta-llama/Llama-3.1-70B": ("llama", 80, 8192, 64, 8, 128, 28672, LLAMA_VOCAB, False),
    "meta-llama/Llama-3.2-1B": ("llama", 16, 2048, 32, 8, 64, 8192, LLAMA_VOCAB, True),
    "meta-llama/Llama-3.2-3B": ("llama", 28, 3072, 24, 8, 128, 8192, LLAMA_VOCAB, True),
}
# The same, then experts and experts of one token.
_MIXTURES = {
    "Qwen/Qwen3-30B-A3B": (48, 2048, 32, 4, 128, 768, QWEN3_VOCAB, False, 128, 8),
    "Qwen/Qwen3-235B-A22B": (94, 4096, 64, 4, 128, 1536, QWEN3_VOCAB, False, 128, 8),
}
KNOWN = {name: Architecture(*sizes) for name, sizes in _DENSE.items()}
KNOWN |= {name: Architecture("qwen3_moe", *sizes) for name, sizes in _MIXTURES.items()}
# Further training changes no size: these are what they were trained from.
TRAINED_FROM = {"Keven16/Qwen3-4B-Non-Thinking-RL-Math": "Qwen/Qwen3-4B"}
SUFFIXES = ("-2507", "-Base", "-Instruct", "-Thinking")
HUB_TIMEOUT_S = 5.0


def find_architecture(path: str, role: str) -> Architecture:
    """The sizes of the model at a directory or hub name; weights are not asked for.

    Raises:
        ConfigError: no directory, not in the table, and not to be had from the hub.
    """
    local = Path(path)
    if (local / "config.json").is_file():
        return _read(local / "config.json", str(local / "config.json"))
    if not is_hub_name(path):
        raise ConfigError(
            f"model.{role}.hf_path is {path}, which has no config.json: give a Hugging Face "
            "directory (config.json is enough to plan) or a hub name OWNER/NAME"
        )
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(path, "config.json")
    if isinstance(cached, str):
        return _read(Path(cached), f"config.json of {path} in the hub's cache")
    if (name := known_name(path)) is not None:
        return replace(KNOWN[name], source=f"the planner's table, as {name}")
    return architecture_from_config(_from_hub(path, role), f"config.json of {path} on the hub")


def _from_hub(path: str, role: str) -> dict[str, Any]:
    """One short try: the hub's own client would go on for half a minute where there is no way."""
    from huggingface_hub import constants, get_token, hf_hub_url

    try:
        if constants.HF_HUB_OFFLINE:
            raise OSError("HF_HUB_OFFLINE is set")
        token = get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        request = Request(hf_hub_url(path, "config.json"), headers=headers)
        with urlopen(request, timeout=HUB_TIMEOUT_S) as answer:
            return dict(json.load(answer))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"model.{role}.hf_path is {path}: no directory, not in the planner's table, and the "
            f"hub did not give its config.json ({error}). Give a directory with its config.json, "
            f"or plan with a model of the same sizes: model.{role}.hf_path= one of "
            f"{', '.join(KNOWN)}"
        ) from error


def known_name(path: str) -> str | None:
    """The table's name of a hub name; a base or instruct model has the sizes of its sibling."""
    name = TRAINED_FROM.get(path, path)
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name if name in KNOWN else None


def _read(file: Path, source: str) -> Architecture:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} holds no mapping: give a model's config.json")
    return architecture_from_config(values, source)
