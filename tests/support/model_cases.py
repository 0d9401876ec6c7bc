"""Rank functions of the tests of models, weights, engine and metrics; they run in the pool."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sgopd.distributed.groups import Groups, inner_groups
from megatron_sgopd.metrics import reduced_means
from megatron_sgopd.model.families import hf_shapes
from megatron_sgopd.model.gpt import ShardedModel, build_model
from megatron_sgopd.model.hf_location import read_hf_config
from megatron_sgopd.model.hf_reader import iter_safetensors
from megatron_sgopd.model.hf_writer import write_hf_dir
from megatron_sgopd.model.weight_stream import (
    init_random_weights,
    iter_hf_weights,
    load_hf_weights,
    load_stream,
    source_of,
)
from megatron_sgopd.rollouts.embedded_engine import EmbeddedEngine
from megatron_sgopd.types import Completion, Request
from tests.support.layouts import layout

CPU = torch.device("cpu")


def build(path: str, groups: Groups, **options: Any) -> ShardedModel:
    settings = {"dtype": torch.float32, "trainable": False}
    return build_model(read_hf_config(Path(path)), groups, **{**settings, **options})


# -- models ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Of one rank's Megatron model with transformers on the same weights; max|d| / max|ref|."""

    logits_error: float
    hand_over_error: float
    vocabulary: tuple[int, int]  # padded rows in all, rows on this rank
    padding: int  # rows on all ranks beyond the true vocabulary


def compare_with_transformers(
    path: str, tp: int, lengths: Sequence[int], divisible_by: int = 4
) -> Comparison:
    """Right-padded batches; only the real positions are compared."""
    with layout(tp, make_vocab_size_divisible_by=divisible_by) as groups:
        model = build(path, groups)
        chunk = model.last_chunk
        load_hf_weights(model, Path(path))
        reference: Any = AutoModelForCausalLM.from_pretrained(
            path, attn_implementation="eager", dtype=torch.float32
        ).eval()
        generator = torch.Generator().manual_seed(len(lengths))
        shape = (len(lengths), max(lengths))
        ids = torch.randint(model.true_vocab_size, shape, generator=generator)
        real = torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]
        positions = torch.arange(shape[1]).expand(shape)
        with torch.no_grad():
            expected = reference(input_ids=ids, attention_mask=real.long()).logits
            local = chunk(ids, positions, None)
            with chunk.returning_hidden_states():
                hidden = chunk(ids, positions, None)
            again = hidden.transpose(0, 1) @ chunk.lm_head_weight().T
        assert hidden.shape == (shape[1], shape[0], chunk.config.hidden_size)
        logits = gather_last(local, groups)[..., : model.true_vocab_size]
        return Comparison(
            relative_error(logits[real], expected[real]),
            relative_error(again, local),
            (chunk.vocab_size, chunk.lm_head_weight().shape[0]),
            groups.tp_size * local.shape[-1] - model.true_vocab_size,
        )


def gather_last(x: Tensor, groups: Groups) -> Tensor:
    shards = [torch.empty_like(x) for _ in range(groups.tp_size)]
    dist.all_gather(shards, x.contiguous(), group=groups.tp_group)
    return torch.cat(shards, -1)


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


def tensor_parallel_marks(path: str, tp: int) -> dict[str, tuple[bool, int | None, int | None]]:
    """Megatron name -> (marked?, dimension marked, dimension our name table cuts)."""
    with layout(tp) as groups:
        model = build(path, groups, trainable=True)
        return {
            name: (
                bool(getattr(p, "tensor_model_parallel", False)),
                getattr(p, "partition_dim", None),
                source_of(name).dim,
            )
            for name, p in model.named_parameters()
        }


def built_modes(path: str) -> dict[bool, tuple[bool, set[bool], set[torch.dtype]]]:
    """trainable? -> (training mode, requires_grad of the parameters, their types)."""
    with layout() as groups:
        return {
            trainable: (
                model.last_chunk.training,
                {p.requires_grad for p in model.parameters()},
                {p.dtype for p in model.parameters()},
            )
            for trainable in (True, False)
            for model in [build(path, groups, trainable=trainable, dtype=torch.bfloat16)]
        }


def refusal(
    path: str,
    tp: int,
    changes: dict[str, Any],
    parallel: dict[str, Any] | None = None,
    **options: Any,
) -> str | None:
    """What `build_model` says to a changed config; None where it says nothing."""
    with layout(tp, **(parallel or {})) as groups:
        config = read_hf_config(Path(path))
        for key, value in changes.items():
            setattr(config, key, value)
        try:
            build_model(config, groups, dtype=torch.float32, trainable=False, **options)
        except ValueError as error:
            return str(error)
    return None


def refusal_without_te(path: str) -> str | None:
    """As on a machine without Transformer Engine, whether it is here or not."""
    with patch("importlib.util.find_spec", return_value=None):
        return refusal(path, 1, {}, transformer_impl="transformer_engine")


# -- weights ---------------------------------------------------------------------------------------

Digest = tuple[str, str, tuple[int, ...], str]


def digests(stream: Iterable[tuple[str, Tensor]]) -> list[Digest]:
    """(name, type, shape, SHA-256 of the bytes) of a stream, in its order."""
    return [
        (
            name,
            str(x.dtype),
            tuple(x.shape),
            hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest(),
        )
        for name, x in stream
    ]


def round_trip(
    path: str,
    tp: int,
    dtype: torch.dtype,
    out: str | None = None,
    parallel: dict[str, Any] | None = None,
    own: tuple[int, int] | None = None,
) -> list[Digest]:
    """Loads, streams back, and writes the stream to `out` if given.

    `own`: (TP, PP) of a frozen model on the ranks of the layout.
    """
    with layout(tp, **{"make_vocab_size_divisible_by": 4, **(parallel or {})}) as groups:
        model = build(path, inner_groups(groups, *(own or (None, None))), dtype=dtype)
        load_hf_weights(model, Path(path))
        if out is not None:
            stream = iter_hf_weights(model)
            shapes, first = hf_shapes(model.hf_config), groups.rank == 0
            write_hf_dir(Path(out), Path(path), stream, shapes, dtype, writes=first)
            dist.barrier()
        return digests(iter_hf_weights(model))


def padded_rows(path: str, tp: int) -> float:
    """The largest entry of the embedding and head rows beyond the true vocabulary."""
    with layout(tp, make_vocab_size_divisible_by=16) as groups:
        model = build(path, groups)
        load_hf_weights(model, Path(path))
        chunk = model.last_chunk
        rows = [chunk.embedding.word_embeddings.weight, chunk.lm_head_weight()]
        local = torch.cat([r.T for r in rows])
        return gather_last(local, groups)[:, model.true_vocab_size :].abs().max().item()


def random_weights(
    path: str, tp: int, seed: int, parallel: dict[str, Any] | None = None
) -> list[Digest]:
    with layout(tp, **(parallel or {})) as groups:
        model = build(path, groups)
        init_random_weights(model, seed)
        return digests(iter_hf_weights(model))


def random_spread(path: str) -> dict[str, tuple[float, float]]:
    """name -> (mean, standard deviation) of freshly drawn weights."""
    with layout() as groups:
        model = build(path, groups)
        init_random_weights(model, 3)
        return {name: (x.mean().item(), x.std().item()) for name, x in iter_hf_weights(model)}


def load_error(path: str, tp: int, case: str) -> str | None:
    """What `load_stream` says to a spoilt stream; None where it says nothing."""
    with layout(tp) as groups:
        model = build(path, groups)
        try:
            load_stream(model, spoilt(iter_safetensors(Path(path)), case), "the test")
        except ValueError as error:
            return str(error)
    return None


def spoilt(stream: Iterable[tuple[str, Tensor]], case: str) -> Iterator[tuple[str, Tensor]]:
    """The stream with one fault: "KIND NAME"."""
    kind, _, spoilt_name = case.partition(" ")
    for name, tensor in stream:
        if name != spoilt_name:
            yield name, tensor
        elif kind == "twice":
            yield from [(name, tensor), (name, tensor)]
        elif kind == "transposed":
            yield name, tensor.T
        elif kind == "short":
            yield name, tensor[:-1]
        elif kind == "long":
            yield name, torch.cat([tensor, tensor[:1]])
        else:
            assert kind in ("missing", "unknown"), kind
    if kind == "unknown":
        yield spoilt_name, torch.zeros(2)


# -- engine and metrics ----------------------------------------------------------------------------


def make_engine(
    path: str, group: dist.ProcessGroup | None = None, **options: Any
) -> EmbeddedEngine:
    engine = EmbeddedEngine(read_hf_config(Path(path)), group=group, device=CPU, **options)
    engine.push_weights(lambda: iter_safetensors(Path(path)), 1)
    return engine


def answers(path: str, requests: list[Request]) -> list[Completion]:
    """A replica of TP 2 answers; the weights come through Megatron's stream."""
    with layout(2) as groups:
        model = build(path, groups)
        load_hf_weights(model, Path(path))
        engine = EmbeddedEngine(model.hf_config, group=groups.replica_group, device=CPU)
        engine.push_weights(lambda: iter_hf_weights(model), 1)
        return engine.generate(requests)


def means() -> dict[str, float]:
    rank = dist.get_rank()

    def pair(s: float, n: float) -> tuple[Tensor, Tensor]:
        return torch.tensor(s), torch.tensor(n)

    sums = {"a": pair(1, 2) if rank == 0 else pair(10, 3)}
    sums |= {"b": pair(1, 2)} if rank == 0 else {"c": pair(-12, 3), "d": pair(0, 0)}
    # float32 would lose the 1: each rank's part is exact in it, the sum is not.
    sums["big"] = (torch.tensor(2.0**25 if rank == 0 else 1.0), torch.tensor(float(rank)))
    return reduced_means(sums, ["d", "a", "big", "c", "b"], dist.group.WORLD, CPU)
