"""Checks what a conversion between Hugging Face and Megatron is asked to do before it begins.

`conversion_ranks` does it, on ranks that `cli.conversion` starts for the programs in `tools/`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_sgopd.atomic_files import check_replaceable
from megatron_sgopd.model import checkpoint_files, hf_writer
from megatron_sgopd.model.checkpoint_files import RECIPE, Stored, find_checkpoint, open_checkpoint
from megatron_sgopd.model.families import (
    EMBEDDING,
    HEAD,
    check_layout,
    family_of,
    hf_shapes,
    tied_pair,
)
from megatron_sgopd.model.hf_location import has_tokenizer, read_hf_config
from megatron_sgopd.model.hf_reader import StoredWeights
from megatron_sgopd.model.model_card import Origin, model_card, origin_json, origin_of

Dtype = Literal["keep", "float32", "bfloat16", "float16"]
MEGATRON_VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")
DTYPES: tuple[Dtype, ...] = ("keep", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Job:
    out: str
    tensor_parallel: int
    pipeline_parallel: int
    dtype: Dtype

    @property
    def num_ranks(self) -> int:
        return self.tensor_parallel * self.pipeline_parallel

    def to_json(self) -> str:
        return json.dumps({"kind": type(self).__name__, **asdict(self)})

    def _check_sizes(self, hf_config: Any) -> None:
        family_of(hf_config)
        for name in ("tensor", "pipeline"):
            if (size := getattr(self, f"{name}_parallel")) < 1:
                raise ValueError(f"--{name}-model-parallel-size is {size}; at least 1 is wanted")
        check_layout(hf_config, self.tensor_parallel, self.pipeline_parallel)


@dataclass(frozen=True)
class ToMegatron(Job):
    hf: str  # a local directory
    name: str  # as it was asked for: it may be a hub name
    divisible_by: int = 128
    allow_pickle: bool = False

    @cached_property
    def weights(self) -> StoredWeights:
        return StoredWeights(Path(self.hf), allow_pickle=self.allow_pickle)

    @cached_property
    def hf_config(self) -> Any:
        return read_hf_config(Path(self.hf))

    @property
    def target_dtype(self) -> torch.dtype:
        return self.weights.dtype if self.dtype == "keep" else getattr(torch, self.dtype)

    @property
    def origin(self) -> Origin:
        return origin_of(self.name, Path(self.hf))

    def done(self) -> str:
        """Says what a person wants to know in the end."""
        count, dtype = len(hf_shapes(self.hf_config)), str(self.target_dtype)
        return f"{count} tensors of {self.name}, {dtype.removeprefix('torch.')}"

    def check(self) -> Sequence[str]:
        """Warnings.

        Raises:
            ValueError: what cannot be converted, by name.
        """
        check_replaceable(Path(self.out), checkpoint_files.OURS, checkpoint_files.COMPANIONS)
        if (Path(self.out) / checkpoint_files.COMPANIONS / RECIPE).exists():
            raise ValueError(f"{self.out} is a checkpoint of a run: choose another --out")
        if self.divisible_by < 1:
            raise ValueError(
                f"--make-vocab-size-divisible-by is {self.divisible_by}; at least 1 is wanted"
            )
        self._check_sizes(self.hf_config)
        self.weights.check(hf_shapes(self.hf_config), tied_pair(self.hf_config))
        self.weights.check_types()
        self.target_dtype  # noqa: B018 (several types are refused where none is chosen)
        return _missing_tokenizer(Path(self.hf))


@dataclass(frozen=True)
class ToHf(Job):
    checkpoint: str  # or the folder of a run
    max_shard_bytes: int = hf_writer.MAX_SHARD_BYTES

    @cached_property
    def stored(self) -> Stored:
        return open_checkpoint(find_checkpoint(Path(self.checkpoint)))

    @cached_property
    def hf_config(self) -> Any:
        return read_hf_config(self.stored.companions)

    @property
    def target_dtype(self) -> torch.dtype:
        return self.stored.dtype if self.dtype == "keep" else getattr(torch, self.dtype)

    def check(self) -> Sequence[str]:
        """Warnings.

        Raises:
            ValueError: what cannot be converted, by name.
        """
        check_replaceable(Path(self.out), hf_writer.OURS, hf_writer.ORIGIN_FILE)
        if self.max_shard_bytes < 1:
            raise ValueError(f"--max-shard-size is {self.max_shard_bytes} bytes; use 1 or more")
        self._check_sizes(self.hf_config)
        _check_shapes(self.stored, self.hf_config)
        return _missing_tokenizer(self.stored.companions)

    def done(self) -> str:
        """Says what a person wants to know in the end."""
        step = "" if self.stored.step is None else f" (step {self.stored.step})"
        return f"{len(hf_shapes(self.hf_config))} tensors of {self.stored.path}{step}"

    def texts(self) -> dict[str, str]:
        """Model card and what goes with it."""
        return card_texts(self.stored)


def card_texts(stored: Stored) -> dict[str, str]:
    """README.md, the mark and the recipe of a checkpoint's export."""
    origin = origin_of("", stored.companions)
    recipe_file = stored.companions / RECIPE
    recipe = recipe_file.read_text(encoding="utf-8") if recipe_file.is_file() else None
    results = None
    summary = stored.run_dir / "summary.json" if stored.run_dir else None
    if summary is not None and summary.is_file():
        results = json.loads(summary.read_text(encoding="utf-8"))
        if results.get("steps") != stored.step:
            results = None  # of another checkpoint
    card = model_card(origin, recipe=recipe, step=stored.step, results=results)
    return {hf_writer.README: card, hf_writer.ORIGIN_FILE: origin_json(origin)}


def _check_shapes(stored: Stored, hf_config: Any) -> None:
    """Checks that the weights are those of the config that lies beside them."""
    vocabulary = {n for n in hf_shapes(hf_config) if n in (EMBEDDING, HEAD)}
    body = sum(prod(s) for n, s in hf_shapes(hf_config).items() if n not in vocabulary)
    padded = {n: s for n, s in stored.shapes.items() if n in MEGATRON_VOCABULARY}
    for name, (rows, _) in padded.items():
        if rows < hf_config.vocab_size:
            raise ValueError(
                f"{stored.path} holds {rows} rows of {name!r}, its config.json has vocab_size "
                f"{hf_config.vocab_size}: put the model's own config.json there"
            )
    for name, shape in stored.shapes.items():
        if name.startswith("decoder.layers.") and shape[0] != hf_config.num_hidden_layers:
            raise ValueError(
                f"{stored.path} was written with {shape[0]} layers, its config.json has "
                f"num_hidden_layers {hf_config.num_hidden_layers}: put the model's own there"
            )
    found = sum(prod(s) for n, s in stored.shapes.items() if n not in padded)
    if found != body or len(padded) != len(vocabulary):
        raise ValueError(
            f"{stored.path} holds other weights than its config.json describes ({found} numbers "
            f"for {body}, vocabulary in {sorted(padded)}): put the model's own config.json there"
        )


def job_of_json(text: str) -> ToMegatron | ToHf:
    fields = json.loads(text)
    return {"ToMegatron": ToMegatron, "ToHf": ToHf}[fields.pop("kind")](**fields)


def _missing_tokenizer(folder: Path) -> list[str]:
    if has_tokenizer(folder):
        return []
    return [
        f"{folder} has no tokenizer: the result has none either. Put tokenizer.json and "
        "tokenizer_config.json beside the weights before you train or serve them"
    ]
