"""Rank functions, inputs and the reference of model/test_attention: they run in the worker pool."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sgopd.model.attention import SDPAttention

NAMES = ("output", "query", "key", "value")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor",
)
HEAD_DIM = 8


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]  # of all context parallel ranks; one length if the rows are padded
    rows: int | None = None  # None is packed
    heads: int = 4
    key_heads: int = 2
    softmax_scale: float | None = None
    dtype: str = "float64"
    checkpoint: bool = False


def draw(case: Case) -> dict[str, Tensor]:
    """Query, key, value and the gradient of the output, of all ranks: [s, b, heads, d], float64."""
    g = torch.Generator().manual_seed(sum(case.lengths))

    def normal(heads: int) -> Tensor:
        x = torch.randn(sum(case.lengths), case.rows or 1, heads, HEAD_DIM, generator=g)
        return x.to(getattr(torch, case.dtype)).double()

    return {
        "query": normal(case.heads) * 2,  # a softmax far from uniform
        "key": normal(case.key_heads),
        "value": normal(case.key_heads),
        "gradient": normal(case.heads).flatten(2),
    }


def reference(case: Case, x: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output and gradients by an explicit softmax under a mask [s, s]."""
    leaves = [x[name].clone().requires_grad_() for name in NAMES[1:]]
    group = case.heads // case.key_heads
    q, k, v = leaves[0], *(y.repeat_interleave(group, dim=2) for y in leaves[1:])
    sequence = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths))
    position = torch.arange(len(sequence))
    seen = (sequence[:, None] == sequence) & (position[:, None] >= position)
    scale = HEAD_DIM**-0.5 if case.softmax_scale is None else case.softmax_scale
    scores = torch.einsum("ibhd,jbhd->bhij", q, k) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    out = torch.einsum("bhij,jbhd->ibhd", weights, v).flatten(2)
    return dict(zip(NAMES, (out, *torch.autograd.grad(out, leaves, x["gradient"])), strict=True))


def my_positions(lengths: tuple[int, ...], rank: int, size: int) -> list[int]:
    """What a rank holds: of every sequence, chunks `rank` and 2 size - 1 - rank."""
    mine: list[int] = []
    for begin, end in pairwise(accumulate(lengths, initial=0)):
        chunk, rest = divmod(end - begin, 2 * size) if size > 1 else (end - begin, 0)
        assert rest == 0, "the case's lengths are cut in 2 C equal chunks"
        for c in (rank, 2 * size - 1 - rank) if size > 1 else (0,):
            mine += range(begin + c * chunk, begin + (c + 1) * chunk)
    return mine


def attend(case: Case, x: dict[str, Tensor], group: dist.ProcessGroup | None) -> dict[str, Tensor]:
    """Output and gradients of this rank's positions, by the module as Megatron calls it."""
    rank, size = (group.rank(), group.size()) if group else (0, 1)
    mine = my_positions(case.lengths, rank, size)
    dtype = getattr(torch, case.dtype)
    leaves = [x[name][mine].to(dtype).requires_grad_() for name in NAMES[1:]]
    module = SDPAttention(
        TransformerConfig(
            num_layers=1,
            hidden_size=case.heads * HEAD_DIM,
            num_attention_heads=case.heads,
            num_query_groups=case.key_heads,
            context_parallel_size=size,
            use_cpu_initialization=True,
        ),
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type="self",
        softmax_scale=case.softmax_scale,
        pg_collection=SimpleNamespace(cp=group),
    )
    packed, inputs = None, leaves
    if case.rows is None:
        cu = torch.tensor([0, *accumulate(case.lengths)], dtype=torch.int32)
        packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=cu, cu_seqlens_kv=cu)
        inputs = [leaf.squeeze(1) for leaf in leaves]
    if case.checkpoint:
        layer = SimpleNamespace(core_attention=module, attn_mask_type=AttnMaskType.causal)
        out = Attention._checkpointed_attention_forward(
            layer, *inputs, None, packed_seq_params=packed
        )
    else:
        out = module(
            *inputs,
            None,
            attn_mask_type=AttnMaskType.causal,
            attention_bias=None,
            packed_seq_params=packed,
        )
    if case.rows is None:
        out = out.reshape(len(mine), 1, -1)  # as Megatron's Attention does
    out.backward(x["gradient"][mine].to(dtype))
    found = (out.detach(), *(leaf.grad for leaf in leaves))
    return dict(zip(NAMES, found, strict=True))


@contextmanager
def recording(owner: Any, names: tuple[str, ...], call: Callable[..., Any]) -> Iterator[list[Any]]:
    """Inside, `call(name, *args)` is noted of each call of the owner's functions."""
    kept = {name: getattr(owner, name) for name in names}
    notes: list[Any] = []

    def noted(name: str) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            notes.append(call(name, *args))
            return kept[name](*args, **kwargs)

        return run

    for name in names:
        setattr(owner, name, noted(name))
    try:
        yield notes
    finally:
        for name in names:
            setattr(owner, name, kept[name])


@contextmanager
def context_group(size: int) -> Iterator[dist.ProcessGroup | None]:
    """Ranks of a world that lie `world / size` apart; None for one rank."""
    world, rank = dist.get_world_size(), dist.get_rank()
    stride = world // size
    groups = [dist.new_group(list(range(i, world, stride))) for i in range(stride)]
    yield groups[rank % stride] if size > 1 else None
    for i, group in enumerate(groups):
        if i == rank % stride:
            dist.destroy_process_group(group)


def compare(case: Case, size: int) -> dict[str, float]:
    """The largest difference of output and gradients from the reference, over its largest value."""
    x = draw(case)
    # Groups beside each other hold different numbers.
    x["query"] = x["query"] + dist.get_rank() % (dist.get_world_size() // size)
    with context_group(size) as group:
        found = attend(case, x, group)
        mine = my_positions(case.lengths, group.rank() if group else 0, size)
    errors = {}
    for name, whole in reference(case, x).items():
        assert found[name].shape == whole[mine].shape, name
        difference = (found[name].double() - whole[mine]).abs().max()
        errors[name] = float(difference / whole.abs().max())
    return errors


def influence(case: Case, size: int, changed: int) -> dict[str, Any]:
    """What new numbers in one sequence change in it (`inside`) and in the others (`outside`)."""
    x = draw(case)
    begin = sum(case.lengths[:changed])
    other = {name: tensor.clone() for name, tensor in x.items()}
    for tensor in other.values():
        tensor[begin : begin + case.lengths[changed]] *= -1.5
    with context_group(size) as group:
        before, after = attend(case, x, group), attend(case, other, group)
        mine = my_positions(case.lengths, group.rank() if group else 0, size)
    inside = [begin <= position < begin + case.lengths[changed] for position in mine]
    outside = [not i for i in inside]
    return {
        "inside": [float((after[n] - before[n])[inside].abs().max()) for n in NAMES],
        "outside": all(torch.equal(after[n][outside], before[n][outside]) for n in NAMES),
    }


def cost(case: Case, size: int) -> dict[str, Any]:
    """[(queries, keys)] of the attention calls, and the collectives, of forward and backward."""
    with (
        context_group(size) as group,
        recording(
            F, ("scaled_dot_product_attention",), lambda _, q, k, *a: (q.shape[2], k.shape[2])
        ) as products,
        recording(dist, COLLECTIVES, lambda name, *_: name) as collectives,
    ):
        attend(case, draw(case), group)
    return {"products": products, "collectives": collectives}
