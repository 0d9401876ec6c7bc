"""Megatron's core attention by torch's scaled dot product, without Transformer Engine.

Causal; padded rows or packed sequences; alone or over context parallel ranks, where each rank holds
of every sequence chunks r and 2 C - 1 - r (zigzag, as Megatron's rotary embedding assumes) and
gathers the keys and values of the others. C ranks then share the work of the causal triangle
equally.

Shapes: s positions of this rank, b rows, t packed positions, h query heads, g key heads, d.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sgopd.distributed.collectives import all_gather, reduce_scatter


class SDPAttention(MegatronModule):
    """[s, b, h, d] -> [s, b, h * d]; packed [t, h, d] -> [t, h * d]. Fewer key heads are GQA."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.softmax_scale = softmax_scale
        self.cp_group: dist.ProcessGroup | None = None
        if config.context_parallel_size > 1:
            group = getattr(pg_collection, "cp", None)
            self.cp_group = group or parallel_state.get_context_parallel_group()

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: Any = None,
        **_: Any,
    ) -> Tensor:
        if packed_seq_params is None:
            bounds = [0, len(query) * (self.cp_group.size() if self.cp_group else 1)]
            return self._attend(query, key, value, bounds)
        # On the host, once a call: the kernels are launched one sequence at a time.
        bounds = packed_seq_params.cu_seqlens_q.tolist()
        q, k, v = (x.unsqueeze(1) for x in (query, key, value))
        out = self._attend(q, k, v, bounds)
        return out.squeeze(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, bounds: Sequence[int]) -> Tensor:
        """Sequences lie one after the other along s; `bounds` count positions of all CP ranks."""
        if self.cp_group is not None:
            return self._attend_over_ranks(query, key, value, bounds, self.cp_group)
        # Split, not sliced one by one: a slice's backward is a gradient of full size.
        lengths = [end - begin for begin, end in pairwise(bounds)]
        pieces = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        parts = [self._causal(q, k, v) for q, k, v in pieces if len(q)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_over_ranks(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bounds: Sequence[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        size, rank = group.size(), group.rank()
        if cut := [end - begin for begin, end in pairwise(bounds) if (end - begin) % (2 * size)]:
            raise ValueError(
                f"a sequence of {cut[0]} positions cannot be cut into {2 * size} equal chunks for "
                f"{size} context parallel ranks: pad sequences to a multiple of {2 * size}"
            )
        shards = _GatherAlongSequence.apply(torch.cat([key, value], -1), group)  # [C, s, b, g, 2 d]
        parts = []
        lengths = [(end - begin) // size for begin, end in pairwise(bounds)]
        pieces = zip(query.split(lengths), shards.split(lengths, dim=1), strict=True)
        for queries, shard in pieces:
            if not len(queries):
                continue
            # Rank r's first half is chunk r, its second half chunk 2 C - 1 - r.
            first, second = shard.chunk(2, dim=1)
            whole = torch.cat([first.flatten(0, 1), second.flip(0).flatten(0, 1)])
            k, v = whole.chunk(2, dim=-1)
            early, late = queries.chunk(2)
            n = len(early)
            for part, stop in ((early, (rank + 1) * n), (late, (2 * size - rank) * n)):
                parts.append(self._causal(part, k[:stop], v[:stop]))
        return torch.cat(parts)

    def _causal(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The queries are the last of the keys' positions."""
        n, m = len(query), len(key)
        mask = None
        if n != m:
            mask = torch.ones(n, m, dtype=torch.bool, device=query.device).tril(m - n)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class _GatherAlongSequence(torch.autograd.Function):
    """[s, ...] of each rank -> [C, s, ...] on all; backward sums every rank's use of a shard."""

    @staticmethod
    def forward(ctx, x: Tensor, group: dist.ProcessGroup) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.group = group
        return all_gather(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return reduce_scatter(grad, ctx.group), None
