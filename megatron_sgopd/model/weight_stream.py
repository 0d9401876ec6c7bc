"""Hugging Face weights <-> Megatron shards, and the one stream of full weights.

`iter_hf_weights` yields (Hugging Face name, full tensor); engine resync, export and checks read it.
Which Hugging Face tensors make up a Megatron parameter, and how it is cut over TP, is one table.
Megatron's names here have the layers counted over the whole model (`ShardedModel`).

QKV in Megatron: [groups, (heads per group + 2) * head_dim, hidden], a group's queries then its key
and value. Gate and up: each rank holds its rows of both, gate first.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.distributed.groups import gather_objects
from megatron_sgopd.model.families import (
    EMBEDDING,
    GATE_UP,
    HEAD,
    QKV,
    QKV_BIAS,
    head_dim,
    hf_shapes,
    tied_pair,
)
from megatron_sgopd.model.gpt import ShardedModel
from megatron_sgopd.model.hf_reader import StoredWeights, check_none_missing, check_tensor

# This rank's tensors of these Megatron parameters.
Fetch = Callable[[Sequence[str]], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Source:
    """The Hugging Face tensors that a Megatron parameter is made of, and how.

    Attributes:
        names: in their order.
        dim: the dimension that is cut over tensor parallel ranks; None: every rank has all of it.
        layout: `plain`, one tensor; `vocabulary`, one whose rows are padded; `qkv`, three, mixed
            group by group; `gate_up`, two, of which each rank holds its rows of both.
    """

    names: tuple[str, ...]
    dim: int | None
    layout: Literal["plain", "vocabulary", "qkv", "gate_up"] = "plain"


# By Megatron's names; those of a layer without its prefix.
TOP = {
    "embedding.word_embeddings.weight": Source((EMBEDDING,), 0, "vocabulary"),
    "decoder.final_layernorm.weight": Source(("model.norm.weight",), None),
    "output_layer.weight": Source((HEAD,), 0, "vocabulary"),
}
LAYER = {
    "input_layernorm.weight": Source(("input_layernorm.weight",), None),
    "pre_mlp_layernorm.weight": Source(("post_attention_layernorm.weight",), None),
    "self_attention.linear_qkv.weight": Source(QKV, 0, "qkv"),
    "self_attention.linear_qkv.bias": Source(QKV_BIAS, 0, "qkv"),
    "self_attention.linear_proj.weight": Source(("self_attn.o_proj.weight",), 1),
    "self_attention.q_layernorm.weight": Source(("self_attn.q_norm.weight",), None),
    "self_attention.k_layernorm.weight": Source(("self_attn.k_norm.weight",), None),
    "mlp.linear_fc1.weight": Source(GATE_UP, 0, "gate_up"),
    "mlp.linear_fc2.weight": Source(("mlp.down_proj.weight",), 1),
    # Transformer Engine fuses the norms into the linears; the content is the same.
    "self_attention.linear_qkv.layer_norm_weight": Source(("input_layernorm.weight",), None),
    "mlp.linear_fc1.layer_norm_weight": Source(("post_attention_layernorm.weight",), None),
}


def source_of(megatron_name: str, *, tied: bool = False) -> Source:
    """Returns what a Megatron parameter is made of; `tied`: a head is read from the embedding.

    Raises:
        ValueError: a name that is not in the table.
    """
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", megatron_name)
    table, key, prefix = (
        (LAYER, match[2], f"model.layers.{match[1]}.") if match else (TOP, megatron_name, "")
    )
    if key not in table:
        raise ValueError(f"no Hugging Face name is known for Megatron's {megatron_name!r}")
    source = table[key]
    if tied and source.names == (HEAD,):
        return replace(source, names=(EMBEDDING,))
    return replace(source, names=tuple(prefix + name for name in source.names))


# -- Hugging Face -> Megatron ----------------------------------------------------------------------


def load_hf_weights(model: ShardedModel, path: Path) -> None:
    """Loads a directory's weights; each rank keeps its part. Streams: a parameter at a time.

    Raises:
        ValueError: a missing, unknown or misshapen tensor, by name.
    """
    stored = StoredWeights(path)
    stored.check(hf_shapes(model.hf_config), tied_pair(model.hf_config))
    load_stream(model, stored, source=str(path))


def init_random_weights(model: ShardedModel, seed: int) -> None:
    """Draws the weights as the config says (normal, initializer_range; norms 1).

    Each tensor is drawn whole from a seed of its own, so that the weights do not depend on the
    layout.
    """
    scale = getattr(model.hf_config, "initializer_range", 0.02)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape)
        if name.endswith(".bias"):
            return torch.zeros(shape)
        digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 2)
        return torch.randn(shape, generator=generator) * scale

    stream = ((n, draw(n, shape)) for n, shape in hf_shapes(model.hf_config).items())
    load_stream(model, stream, source="random initialisation")


@torch.no_grad()
def load_stream(model: ShardedModel, stream: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Consumes (name, full tensor) pairs in any order, each name exactly once."""
    expected, tied = hf_shapes(model.hf_config), model.hf_config.tie_word_embeddings
    waiting = {
        name: (p, source_of(name, tied=tied)) for name, p in model.named_parameters()
    }  # on this pipeline stage
    users: dict[str, list[str]] = {}  # Hugging Face name -> parameters that are made of it
    for name, (_, made_of) in waiting.items():
        for hf_name in made_of.names:
            users.setdefault(hf_name, []).append(name)
    held: dict[str, Tensor] = {}
    seen: set[str] = set()
    for name, tensor in stream:
        if name == HEAD and tied:
            continue  # some writers store the tied head a second time
        check_tensor(name, tuple(tensor.shape), expected, source)
        if name in seen:
            raise ValueError(f"{source} holds {name!r} twice")
        seen.add(name)
        if name not in users:
            continue
        held[name] = tensor
        for key in list(users[name]):
            parameter, made_of = waiting[key]
            if not held.keys() >= set(made_of.names):
                continue
            parts = [held[n] for n in made_of.names]
            parameter.copy_(_to_shard(parts, made_of, model, parameter))
            del waiting[key]
            for hf_name in made_of.names:
                users[hf_name].remove(key)
                if not users[hf_name]:  # a tensor is kept only as long as a parameter lacks it
                    del held[hf_name]
    check_none_missing(seen, expected, source)
    assert not waiting, f"no tensor came for {sorted(waiting)}"


def _to_shard(parts: list[Tensor], source: Source, model: ShardedModel, like: Tensor) -> Tensor:
    """Makes this rank's Megatron tensor, of the shape of `like`, from Hugging Face tensors."""
    groups, dim = model.groups, source.dim

    def cut(x: Tensor) -> Tensor:
        return x if dim is None else x.chunk(groups.tp_size, dim)[groups.tp_rank]

    if source.layout == "gate_up":
        return torch.cat([cut(x) for x in parts])
    rows = like.shape[0] * (groups.tp_size if dim == 0 else 1)
    return cut(join_parts(parts, source, rows, model.hf_config))


def join_parts(parts: list[Tensor], source: Source, rows: int, hf_config: Any) -> Tensor:
    """Makes the parameter of all TP ranks together, as Megatron's checkpoints hold it.

    `rows`: with those that pad the vocabulary, zeros.
    """
    if source.layout == "qkv":
        return _interleave_qkv(parts, hf_config)
    if source.layout == "gate_up":
        return torch.cat(parts)
    (whole,) = parts
    if source.layout == "vocabulary" and (pad := rows - whole.shape[0]):
        return torch.cat([whole, whole.new_zeros(pad, whole.shape[1])])
    return whole


def _interleave_qkv(qkv: list[Tensor], hf_config: Any) -> Tensor:
    groups, tail = hf_config.num_key_value_heads, qkv[0].shape[1:]  # a bias has none
    by_group = [x.view(groups, -1, *tail) for x in qkv]
    return torch.cat(by_group, 1).flatten(0, 1)


def _split_qkv(fused: Tensor, index: int, hf_config: Any) -> Tensor:
    groups, d = hf_config.num_key_value_heads, head_dim(hf_config)
    by_group = fused.unflatten(0, (groups, -1))
    parts = by_group.split([by_group.shape[1] - 2 * d, d, d], dim=1)
    return parts[index].flatten(0, 1)


# -- Megatron -> Hugging Face ----------------------------------------------------------------------


@torch.no_grad()
def iter_hf_weights(
    model: ShardedModel, fetch: Fetch | None = None
) -> Iterator[tuple[str, Tensor]]:
    """(name, full tensor) of every Hugging Face weight, once, the same on every rank.

    Collective over the model's ranks: each must read it to the end. Padded vocabulary rows are cut
    off; a tied head is not a weight of its own. Memory: one parameter at a time, or what `fetch`
    brings of a layer.
    """
    groups, shapes = model.groups, hf_shapes(model.hf_config)
    own = dict(model.named_parameters())
    fetch = fetch or (lambda names: {name: own[name] for name in names})
    # What lies on which stage: a tied head counts as the first stage's embedding.
    held = gather_objects([(name, p.dtype) for name, p in own.items()], groups.pp_group)
    places = [(stage, *entry) for stage, entries in enumerate(held) for entry in entries]
    wanted = [place for place in places if source_of(place[1]).names[0] in shapes]
    for _, layer in groupby(sorted(wanted, key=_depth), key=_depth):
        at_depth = list(layer)
        here = fetch([name for stage, name, _ in at_depth if stage == groups.pp_rank])
        for stage, name, dtype in at_depth:
            source = source_of(name)
            shards = None
            if stage == groups.pp_rank:
                shards = _all_shards(here[name].detach(), model, cut=source.dim is not None)
            for i, hf_name in enumerate(
                source.names
            ):  # one by one: a copy beside its parameter's shards
                if shards is not None:
                    tensor = _from_shards(shards, i, source, model)
                else:
                    tensor = torch.empty(shapes[hf_name], dtype=dtype, device=groups.device)
                yield hf_name, _from_stage(tensor, stage, groups.pp_group)
                del tensor
            del shards
        del here  # before the next layer's


def _depth(place: tuple[int, str, torch.dtype]) -> tuple[int, int]:
    """Sorts parameters from the embedding to the head, whatever stage they are on."""
    _, name, _ = place
    layer = re.search(r"layers\.(\d+)\.", name)
    if layer is not None:
        return 1, int(layer[1])
    return (0 if name.startswith("embedding") else 2), 0


def _from_stage(tensor: Tensor, stage: int, pp_group: dist.ProcessGroup) -> Tensor:
    """A stage's tensor on all stages."""
    if pp_group.size() == 1:
        return tensor
    tensor = tensor.contiguous()
    dist.broadcast(tensor, src=dist.get_global_rank(pp_group, stage), group=pp_group)
    return tensor


def _all_shards(tensor: Tensor, model: ShardedModel, *, cut: bool) -> Tensor:
    """[tp, ...]: every rank's part of a parameter that is cut over TP; [1, ...]: a whole one."""
    groups = model.groups
    if not cut or groups.tp_size == 1:
        return tensor.unsqueeze(0)
    shards = tensor.new_empty(groups.tp_size, *tensor.shape)
    dist.all_gather_into_tensor(shards.flatten(0, 1), tensor.contiguous(), group=groups.tp_group)
    return shards


def _from_shards(shards: Tensor, index: int, source: Source, model: ShardedModel) -> Tensor:
    """Returns the `index`-th of the tensors that a parameter is made of; a view if it can."""
    if source.layout == "gate_up":  # each rank's rows of gate, then its rows of up
        return shards.unflatten(1, (2, -1))[:, index].flatten(0, 1)
    if source.dim == 1:
        return torch.cat(shards.unbind(), 1)
    whole = shards.flatten(0, 1) if source.dim == 0 else shards[0]
    if source.layout == "qkv":
        return _split_qkv(whole, index, model.hf_config)
    return whole[: model.true_vocab_size] if source.layout == "vocabulary" else whole
