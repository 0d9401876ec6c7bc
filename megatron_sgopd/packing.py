"""Rollouts -> micro-batches of padded token matrices, with what the loss must know of each token.

Shapes: R rollouts of the micro-batch, L its longest sequence less one (inputs and targets are
shifted by one), T = R * L tokens when flattened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_sgopd.types import Rollout


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass. All tensors are [R, L]; position t of a row predicts `targets[:, t]`.

    Rows are right-padded: under causal attention no real token sees the padding, so that no
    attention mask is needed.
    """

    input_ids: Tensor  # int64
    position_ids: Tensor  # int64
    targets: Tensor  # int64, the next token
    loss_mask: Tensor  # bool: the target is a completion token to learn from
    verifier_advantage: Tensor  # float32, a1 of the row's rollout
    is_correct: Tensor  # bool
    is_imitated: Tensor  # bool: a teacher's or a data set's tokens, learnt by cross-entropy
    sampled_logprobs: Tensor  # float32, by the engine; 0 where the loss mask is 0

    def to(self, device: torch.device) -> MicroBatch:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def num_tokens(rollout: Rollout) -> int:
    """Prompt and completion."""
    return len(rollout.prompt.token_ids) + len(rollout.completion.token_ids)


def num_loss_tokens(rollout: Rollout, mask_truncated: bool) -> int:
    """|y_i|: the tokens of the completion that carry loss; EOS counts, a masked one has none."""
    if mask_truncated and rollout.completion.finish_reason == "length":
        return 0
    return len(rollout.completion.token_ids)


def micro_batches(
    rollouts: Sequence[Rollout], *, micro_batch_size: int, mask_truncated: bool = False
) -> list[MicroBatch]:
    """Cuts rollouts, in their order, into micro-batches of at most `micro_batch_size` rows."""
    return [
        _collate(rollouts[i : i + micro_batch_size], mask_truncated)
        for i in range(0, len(rollouts), micro_batch_size)
    ]


def _collate(rollouts: Sequence[Rollout], mask_truncated: bool) -> MicroBatch:
    sequences = [r.prompt.token_ids + r.completion.token_ids for r in rollouts]
    # An empty completion after a one-token prompt leaves nothing to feed; keep one column.
    shape = (len(rollouts), max(1, max(len(s) for s in sequences) - 1))
    ids = torch.zeros(shape, dtype=torch.long)
    targets = torch.zeros(shape, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape, dtype=torch.float32)
    for row, (rollout, sequence) in enumerate(zip(rollouts, sequences, strict=True)):
        length, start = len(sequence) - 1, len(rollout.prompt.token_ids) - 1
        ids[row, :length] = torch.tensor(sequence[:-1], dtype=torch.long)
        targets[row, :length] = torch.tensor(sequence[1:], dtype=torch.long)
        logprobs[row, start:length] = torch.tensor(rollout.completion.logprobs)
        if num_loss_tokens(rollout, mask_truncated):
            mask[row, start:length] = True

    def column(values: list[float] | list[bool], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype)[:, None].expand(shape).contiguous()

    return MicroBatch(
        input_ids=ids,
        position_ids=torch.arange(shape[1])[None].expand(shape).contiguous(),
        targets=targets,
        loss_mask=mask,
        verifier_advantage=column([r.verifier_advantage for r in rollouts], torch.float32),
        is_correct=column([r.is_correct for r in rollouts], torch.bool),
        is_imitated=column([r.source != "student" for r in rollouts], torch.bool),
        sampled_logprobs=logprobs,
    )


def token_scales(
    rollouts: Sequence[Rollout],
    *,
    aggregation: str,
    num_sequences: int,
    num_tokens: int,
    mask_truncated: bool,
) -> list[float]:
    """What one loss token of each rollout weighs in the step's loss.

    `seq_mean_token_mean`: 1 / (B |y_i|); `token_mean`: 1 / sum |y_i|. B (`num_sequences`) and
    `num_tokens` are those of the whole optimizer step over all replicas; an empty or wholly masked
    completion counts in B and adds 0.
    """
    lengths = [num_loss_tokens(r, mask_truncated) for r in rollouts]
    if aggregation == "token_mean":
        return [1.0 / max(num_tokens, 1)] * len(lengths)
    if aggregation != "seq_mean_token_mean":
        raise ValueError(
            f"loss_agg is {aggregation!r}; allowed are 'seq_mean_token_mean' and 'token_mean'"
        )
    return [1.0 / (num_sequences * n) if n else 0.0 for n in lengths]
