"""Rollouts -> micro-batches, with what the loss must know of each token.

Two forms. *Padded*: R rows of L columns, right-padded; under causal attention no real token sees
the padding, so that no attention mask is needed. *Packed*: R = 1, the rollouts one after the other
up to a token budget, each attending to itself alone (`cu_seqlens`).

Shapes: R rows, L columns (inputs and targets are shifted by one), T = R * L tokens when flattened.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from megatron_sgopd.types import Rollout

AGGREGATIONS = ("seq_mean_token_mean", "token_mean")


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. All tensors are [R, L]; column t of a row predicts `targets[:, t]`."""

    input_ids: Tensor  # int64
    position_ids: Tensor  # int64
    targets: Tensor  # int64, the next token
    loss_mask: Tensor  # bool: the target is a completion token to learn from
    token_scale: Tensor  # float32: the token's share of the step's loss; 0 where masked
    verifier_advantage: Tensor  # float32, a1 of the token's rollout
    is_correct: Tensor  # bool
    is_imitated: Tensor  # bool: a teacher's or a data set's tokens, learnt by cross-entropy
    sampled_logprobs: Tensor  # float32, by the engine; 0 where the loss mask is 0
    sequence_ids: Tensor  # int64: which of the micro-batch's sequences a token belongs to
    # Packed: where each sequence begins, and the end; of the whole micro-batch on every CP rank.
    cu_seqlens: tuple[int, ...] | None = None

    def to(self, device: torch.device) -> MicroBatch:
        return replace(self, **{n: x.to(device) for n, x in self._tensors().items()})

    def context_shard(self, rank: int, size: int) -> MicroBatch:
        """The columns of one context parallel rank: of every sequence chunks r and 2 size - 1 - r.

        Sequences are a multiple of 2 `size` long (`micro_batches` sees to it).
        """
        if size == 1:
            return self
        columns = context_columns(self.shape[1], self.cu_seqlens, rank, size)
        columns = columns.to(self.input_ids.device)
        return replace(self, **{n: x[:, columns] for n, x in self._tensors().items()})

    @property
    def shape(self) -> tuple[int, int]:
        """(R, L)."""
        rows, columns = self.input_ids.shape
        return rows, columns

    def _tensors(self) -> dict[str, Any]:
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return {n: x for n, x in values.items() if isinstance(x, Tensor)}


def context_columns(length: int, cu_seqlens: Sequence[int] | None, rank: int, size: int) -> Tensor:
    """Returns which of `length` columns a context parallel rank holds, in its order (zigzag)."""
    pieces = []
    for begin, end in pairwise(cu_seqlens or (0, length)):
        chunk = (end - begin) // (2 * size)
        for index in (rank, 2 * size - 1 - rank):
            pieces.append(torch.arange(begin + index * chunk, begin + (index + 1) * chunk))
    return torch.cat(pieces)


def num_tokens(rollout: Rollout) -> int:
    """Prompt and completion."""
    return len(rollout.prompt.token_ids) + len(rollout.completion.token_ids)


def num_loss_tokens(rollout: Rollout, mask_truncated: bool) -> int:
    """|y_i|: the tokens of the completion that carry loss; EOS counts, a masked one has none."""
    if mask_truncated and rollout.completion.finish_reason == "length":
        return 0
    return len(rollout.completion.token_ids)


def token_scales(
    rollouts: Sequence[Rollout],
    *,
    aggregation: str,
    num_sequences: int,
    num_tokens: int,
    mask_truncated: bool,
) -> list[float]:
    """Returns what one loss token of each rollout weighs in the step's loss.

    `seq_mean_token_mean`: 1 / (B |y_i|); `token_mean`: 1 / sum |y_i|. B (`num_sequences`) and
    `num_tokens` are those of the whole optimizer step over all replicas; an empty or wholly masked
    completion counts in B and adds 0.
    """
    lengths = [num_loss_tokens(r, mask_truncated) for r in rollouts]
    if aggregation == "token_mean":
        return [1.0 / max(num_tokens, 1)] * len(lengths)
    if aggregation != "seq_mean_token_mean":
        raise ValueError(f"loss_agg is {aggregation!r}; allowed are {AGGREGATIONS}")
    return [1.0 / (num_sequences * n) if n else 0.0 for n in lengths]


# -- which rollouts share a micro-batch ------------------------------------------------------------


def micro_batches(
    rollouts: Sequence[Rollout],
    scales: Sequence[float],
    *,
    micro_batch_size: int,
    max_tokens: int | None = None,
    mask_truncated: bool = False,
    align: int = 1,
    align_sequence: int = 1,
    multiple_of: int = 1,
) -> list[MicroBatch]:
    """Cuts rollouts into micro-batches: padded rows of like length, or packed up to `max_tokens`.

    Args:
        scales: each rollout's `token_scales`.
        micro_batch_size: rows of a padded micro-batch; `max_tokens` None chooses this form.
        align: L is a multiple of it (sequence parallel ranks share the columns).
        align_sequence: so is the length of each packed sequence (context parallel ranks).
        multiple_of: so is the number of micro-batches (interleaved stages), empty ones included.
    Raises:
        ValueError: a rollout longer than `max_tokens`.
    """
    inputs = [max(0, num_tokens(r) - 1) for r in rollouts]
    if max_tokens is None:
        order = sorted(range(len(rollouts)), key=lambda i: -inputs[i])
        parts = [order[i : i + micro_batch_size] for i in range(0, len(order), micro_batch_size)]
        parts += [[]] * (-len(parts) % multiple_of)
    else:
        lengths = [_round_up(n, align_sequence) for n in inputs]
        parts = balanced_bins(lengths, max_tokens, multiple_of=multiple_of)
    collate = _pad if max_tokens is None else _pack
    return [
        collate(
            [rollouts[i] for i in part],
            [scales[i] for i in part],
            mask_truncated,
            align,
            align_sequence,
        )
        for part in parts
    ]


def balanced_bins(
    lengths: Sequence[int], capacity: int, *, multiple_of: int = 1
) -> list[list[int]]:
    """Indices in as few bins as a greedy search finds, evenly filled, none above `capacity`.

    Longest first into the emptiest bin; one more bin (`multiple_of` more) whenever one does not
    fit.

    Raises:
        ValueError: one length alone is above the capacity.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(
            f"a rollout of {max(lengths)} tokens does not fit parallel.micro_batch_tokens "
            f"{capacity}: raise it to the longest prompt and completion together"
        )
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    count = _round_up(max(1, -(-sum(lengths) // capacity)), multiple_of)
    while True:
        bins: list[list[int]] = [[] for _ in range(count)]
        emptiest = [(0, i) for i in range(count)]
        for index in order:
            filled, i = heapq.heappop(emptiest)
            if filled + lengths[index] > capacity:
                break
            bins[i].append(index)
            heapq.heappush(emptiest, (filled + lengths[index], i))
        else:
            return bins
        count += multiple_of


def balanced_shares(lengths: Sequence[Sequence[int]]) -> list[list[tuple[int, int]]]:
    """Evens out the tokens of data parallel replicas: for each, the rollouts it trains.

    `lengths[d]` are the tokens of replica d's rollouts; the answer lists (replica, index) pairs.
    Every replica keeps its own, shortest given away last, while it is below the mean; the rest go,
    longest first, to whoever has least. A pure function, so that all ranks find the same.
    """
    mean = sum(map(sum, lengths)) / max(1, len(lengths))
    shares: list[list[tuple[int, int]]] = []
    homeless: list[tuple[int, int, int]] = []
    filled = []
    for replica, own in enumerate(lengths):
        total = 0
        kept: list[tuple[int, int]] = []
        for index in sorted(range(len(own)), key=lambda i: (own[i], i)):
            if total + own[index] <= mean or not kept:
                kept.append((replica, index))
                total += own[index]
            else:
                homeless.append((own[index], replica, index))
        shares.append(kept)
        filled.append(total)
    for length, replica, index in sorted(homeless, reverse=True):
        # At home where that is no worse: nothing has to travel.
        least = min(filled)
        taker = replica if filled[replica] == least else filled.index(least)
        shares[taker].append((replica, index))
        filled[taker] += length
    return shares


def padding_share(batches: Sequence[MicroBatch], rollouts: Sequence[Rollout]) -> tuple[int, int]:
    """(padded positions, all positions) of the micro-batches."""
    computed = sum(rows * columns for rows, columns in (b.shape for b in batches))
    real = sum(max(0, num_tokens(r) - 1) for r in rollouts)
    return computed - real, computed


# -- from rollouts to tensors ----------------------------------------------------------------------


def _pad(
    rollouts: Sequence[Rollout],
    scales: Sequence[float],
    mask_truncated: bool,
    align: int,
    align_sequence: int,
) -> MicroBatch:
    """One row a rollout; a micro-batch of none is a row of padding."""
    width = max([1, *(num_tokens(r) - 1 for r in rollouts)])
    width = _round_up(width, align * align_sequence)
    rows = max(1, len(rollouts))
    flat = _one_after_the_other(rollouts, scales, mask_truncated, [width] * rows)
    whole: dict[str, Any] = {n: x.view(rows, width) for n, x in flat.items()}
    return MicroBatch(**whole)


def _pack(
    rollouts: Sequence[Rollout],
    scales: Sequence[float],
    mask_truncated: bool,
    align: int,
    align_sequence: int,
) -> MicroBatch:
    """All rollouts in one row; what fills it up to `align` is a sequence of its own."""
    inputs = [(r, s, num_tokens(r) - 1) for r, s in zip(rollouts, scales, strict=True)]
    inputs = [(r, s, n) for r, s, n in inputs if n > 0]
    widths = [_round_up(n, align_sequence) for _, _, n in inputs]
    if fill := _round_up(max(1, sum(widths)), align * align_sequence) - sum(widths):
        widths.append(fill)
    flat = _one_after_the_other(
        [r for r, _, _ in inputs], [s for _, s, _ in inputs], mask_truncated, widths
    )
    whole: dict[str, Any] = {n: x[None] for n, x in flat.items()}
    return MicroBatch(**whole, cu_seqlens=(0, *accumulate(widths)))


def _one_after_the_other(
    rollouts: Sequence[Rollout],
    scales: Sequence[float],
    mask_truncated: bool,
    widths: Sequence[int],
) -> dict[str, Tensor]:
    """A micro-batch's tensors [sum of widths], inputs and targets shifted by one.

    Each sequence is right-padded to its width with zeros, except that positions go on counting; a
    width beyond the rollouts is all padding.
    """
    inputs: list[int] = []
    targets: list[int] = []
    logprobs: list[float] = []
    lengths, starts = [], []  # of a sequence, and where its loss begins
    for rollout, width in zip(rollouts, widths[: len(rollouts)], strict=True):
        prompt, completion = rollout.prompt.token_ids, rollout.completion
        ids = (*prompt, *completion.token_ids)
        length = max(0, len(ids) - 1)
        prefix, zeros = length - len(completion.token_ids), (0,) * (width - length)
        inputs += (*ids[:length], *zeros)
        targets += (*ids[1:], *zeros)
        logprobs += (*(0.0,) * prefix, *completion.logprobs, *zeros)
        lengths.append(length)
        starts.append(prefix if num_loss_tokens(rollout, mask_truncated) else length)
    total, repeats = sum(widths), torch.tensor(widths)

    def flat(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor([*values, *(0,) * (total - len(values))], dtype=dtype)

    def each(values: Sequence[float], dtype: torch.dtype) -> Tensor:
        """A sequence's value at all of its positions."""
        padded = [*values, *(0,) * (len(widths) - len(values))]
        return torch.tensor(padded, dtype=dtype).repeat_interleave(repeats)

    begins = [0, *accumulate(widths)][:-1]
    positions = torch.arange(total) - each(begins, torch.long)
    padding = positions >= each(lengths, torch.long)
    mask = ~padding & (positions >= each(starts, torch.long))
    advantages = [r.verifier_advantage for r in rollouts]
    imitated = [r.source != "student" for r in rollouts]
    return {
        "input_ids": flat(inputs, torch.long),
        "position_ids": positions,
        "targets": flat(targets, torch.long),
        "loss_mask": mask,
        "token_scale": each(scales, torch.float32).masked_fill_(~mask, 0.0),
        "verifier_advantage": each(advantages, torch.float32).masked_fill_(padding, 0.0),
        "is_correct": each([r.is_correct for r in rollouts], torch.bool) & ~padding,
        "is_imitated": each(imitated, torch.bool) & ~padding,
        "sampled_logprobs": flat(logprobs, torch.float32),
        "sequence_ids": each(range(len(widths)), torch.long),
    }


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
