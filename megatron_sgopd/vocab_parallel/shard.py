"""One micro-batch as this rank sees it: its vocabulary rows and the tokens that count.

Shapes: T tokens, D hidden, V vocabulary rows held by this rank (the last ones may be padding), N
active (masked-in) tokens, n those of one chunk, W ranks of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.collectives import all_gather

# A model's rows: logits [T, V], or (hidden [T, D], LM-head shard [V, D]), projected in chunks.
Rows = Tensor | tuple[Tensor, Tensor]


def num_local_rows(rows: Rows) -> int:
    """V of logits [T, V] or of a head shard [V, D]."""
    return rows.shape[-1] if isinstance(rows, Tensor) else rows[1].shape[0]


def is_logprobs(rows: Rows | None) -> bool:
    """Whether `rows` are log-probs [T] already."""
    return isinstance(rows, Tensor) and rows.dim() == 1


@dataclass(frozen=True)
class Shard:
    """Masked tokens cost nothing: rows are selected by `active` before anything is computed."""

    num_tokens: int  # T
    active: Tensor  # [N] indices of the masked-in tokens
    index: Tensor  # [N, 1] local row of the sampled token, 0 where another rank owns it
    owned: Tensor  # [N] whether this rank holds the sampled token's row
    valid: int  # rows of this rank that are not padding; 0 on a rank of padding only
    group: dist.ProcessGroup | None
    temperature: float
    dtype: torch.dtype  # of the arithmetic: fp32, or float64 on float64
    chunk_tokens: int

    @classmethod
    def of(
        cls,
        rows: Rows,
        *,
        tokens: Tensor,
        mask: Tensor,
        group: dist.ProcessGroup | None,
        vocab_size: int,
        temperature: float,
        chunk_tokens: int,
    ) -> Shard:
        """The shard for rows held by this rank of the group: rows [rank V, (rank + 1) V)."""
        width = num_local_rows(rows)
        some = rows if isinstance(rows, Tensor) else rows[1]
        rank, size = (group.rank(), group.size()) if group is not None else (0, 1)
        if width * size < vocab_size:
            raise ValueError(
                f"{size} ranks with {width} vocabulary rows each hold {size * width} rows, fewer "
                f"than vocab_size {vocab_size}: give each rank its shard and the model's true size"
            )
        if temperature <= 0:
            raise ValueError(f"temperature is {temperature}; a loss needs one above 0")
        valid = max(0, min(width, vocab_size - rank * width))
        active = mask.reshape(-1).nonzero()[:, 0]
        local = tokens[active] - rank * width
        return cls(
            num_tokens=tokens.shape[0],
            active=active,
            index=local.clamp(0, max(0, valid - 1))[:, None],
            owned=(local >= 0) & (local < valid),
            valid=valid,
            group=group,
            temperature=temperature,
            dtype=torch.float64 if some.dtype == torch.float64 else torch.float32,
            chunk_tokens=chunk_tokens,
        )

    def chunks(self) -> list[slice]:
        """Slices of the active tokens, at most `chunk_tokens` long."""
        n = len(self.active)
        return [slice(i, min(i + self.chunk_tokens, n)) for i in range(0, n, self.chunk_tokens)]

    def logits(self, rows: Rows, chunk: slice) -> Tensor:
        """The valid local logits of a chunk over the temperature, [n, valid]."""
        idx = self.active[chunk]
        if isinstance(rows, Tensor):
            x = rows.index_select(0, idx)[:, : self.valid]
        else:
            hidden, head = rows
            x = hidden.index_select(0, idx).to(head.dtype) @ head[: self.valid].T
        return x.to(self.dtype) / self.temperature

    def pick(self, x: Tensor, chunk: slice) -> Tensor:
        """x [n, valid] at the sampled token, [n]; -inf where another rank owns it."""
        if self.valid == 0:
            return x.new_full((x.shape[0],), -torch.inf)
        return x.gather(-1, self.index[chunk])[:, 0].masked_fill(~self.owned[chunk], -torch.inf)

    def all_gather(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: [N]} of this rank -> {name: [W, N]} of all, in one collective."""
        mine = torch.stack(list(columns.values()))
        if self.group is None or self.group.size() == 1:
            out = mine[None]
        else:
            out = all_gather(mine, self.group)
        return dict(zip(columns, out.unbind(1), strict=True))

    def to_all_tokens(self, values: Tensor) -> Tensor:
        """[N] -> [T], 0 where masked out."""
        return values.new_zeros(self.num_tokens).index_copy_(0, self.active, values)


def concatenate(
    chunks: Sequence[dict[str, Tensor]], names: Sequence[str], empty: Tensor
) -> dict[str, Tensor]:
    """Joins the columns of all chunks; `empty` [0] stands in where no token is active."""
    return {name: torch.cat([c[name] for c in chunks]) if chunks else empty for name in names}
