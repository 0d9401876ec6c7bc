"""One micro-batch as this rank sees it: its vocabulary rows and the tokens that count.

Shapes: T tokens, D hidden, V vocabulary rows held by this rank (the last ones may be padding), N
active (masked-in) tokens, W ranks of the group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.distributed.collectives import all_gather, start_all_gather

# A model's rows: logits [T, V], or (hidden [T, D], LM-head shard [V, D]), projected in chunks.
Rows = Tensor | tuple[Tensor, Tensor]


def num_local_rows(rows: Rows) -> int:
    """V of logits [T, V] or of a head shard [V, D]."""
    return rows.shape[-1] if isinstance(rows, Tensor) else rows[1].shape[0]


def is_logprobs(rows: Rows | None) -> bool:
    """Tells whether `rows` are log-probs [T] already."""
    return isinstance(rows, Tensor) and rows.dim() == 1


def check_inputs(
    models: Mapping[str, Rows],
    tokens: Tensor,
    mask: Tensor,
    per_token: Mapping[str, object] | None = None,
) -> None:
    """Raises ValueError where the inputs are not of the same T tokens.

    `per_token`: whatever else may be a tensor [T].
    """
    if tokens.dim() != 1:
        raise ValueError(f"tokens is {list(tokens.shape)}; [T] is wanted: flatten the batch")
    num = len(tokens)
    for name, rows in models.items():
        if isinstance(rows, Tensor):
            shapes, allowed = [rows.shape], (2,) if name == "student" else (1, 2)
            wanted = "[T, V]" if name == "student" else "[T, V], or log-probs [T]"
        else:
            shapes, allowed = [rows[0].shape, rows[1].shape], (2,)
            wanted = "hidden [T, D] and head [V, D]"
        fits = len(shapes[0]) in allowed and shapes[0][0] == num
        if len(shapes) == 2:
            fits = fits and len(shapes[1]) == 2 and shapes[0][1] == shapes[1][1]
        if not fits:
            came = " and ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"the {name} is {came}; wanted is {wanted}, with {num} tokens")
    for name, values in {"mask": mask, **(per_token or {})}.items():
        if isinstance(values, Tensor) and values.numel() != num:
            raise ValueError(f"{name} is {list(values.shape)}; [T] is wanted, with {num} tokens")


@dataclass(frozen=True)
class Shard:
    """Holds which tokens count and which columns are this rank's."""

    num_tokens: int  # T
    active: Tensor  # [N] indices of the masked-in tokens
    local_token: Tensor  # [N] this rank's row of the sampled token, 0 where another rank owns it
    owned: Tensor  # [N] whether this rank holds the sampled token's row
    first: int  # the vocabulary id of this rank's row 0
    valid: int  # rows of this rank that are not padding; 0 on a rank of padding only
    group: dist.ProcessGroup | None
    temperature: float
    dtype: torch.dtype  # of the arithmetic: fp32, or float64 on float64

    @classmethod
    def from_rows(
        cls,
        rows: Rows,
        *,
        tokens: Tensor,
        mask: Tensor,
        group: dist.ProcessGroup | None,
        vocab_size: int,
        temperature: float,
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
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature is {temperature}; a finite one above 0 is wanted")
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; the models' true size is wanted")
        valid = max(0, min(width, vocab_size - rank * width))
        active = mask.reshape(-1).nonzero()[:, 0]
        local = tokens[active]
        if not local.is_cuda and len(local):  # on GPUs looking would cost a wait
            low, high = int(local.min()), int(local.max())
            if low < 0 or high >= vocab_size:
                raise ValueError(
                    f"a token to train on is {low if low < 0 else high}; ids from 0 to "
                    f"{vocab_size - 1} (vocab_size {vocab_size}) are wanted: mask the others"
                )
        local = local - rank * width
        return cls(
            num_tokens=tokens.shape[0],
            active=active,
            local_token=local.clamp(0, max(0, valid - 1)),
            owned=(local >= 0) & (local < valid),
            first=rank * width,
            valid=valid,
            group=group,
            temperature=temperature,
            dtype=torch.float64 if some.dtype == torch.float64 else torch.float32,
        )

    @property
    def size(self) -> int:
        """W, the ranks that share the vocabulary."""
        return 1 if self.group is None else self.group.size()

    @cached_property
    def all_active(self) -> bool:
        return len(self.active) == self.num_tokens

    def all_gather(self, columns: Tensor) -> Tensor:
        """[C, n] of this rank -> [W, C, n] of all, in one collective."""
        if self.group is None or self.group.size() == 1:
            return columns[None]
        return all_gather(columns, self.group)

    def begin_all_gather(self, columns: Tensor) -> Callable[[], Tensor]:
        """Starts the same; the function that it gives waits for it."""
        if self.group is None or self.group.size() == 1:
            return lambda: columns[None]
        return start_all_gather(columns, self.group)

    def to_all_tokens(self, values: Tensor) -> Tensor:
        """[N] -> [T] in the arithmetic's type, 0 where masked out."""
        return self.spread(values.to(self.dtype))

    def spread(self, values: Tensor) -> Tensor:
        """[N] -> [T], 0 where masked out."""
        if self.all_active:
            return values
        out = values.new_zeros(self.num_tokens)
        return out.index_copy_(0, self.active, values)
