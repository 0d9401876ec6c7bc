"""Teacher and reference: GPTs on the student's ranks, without gradient, optimizer or DDP buffers.

What a frozen model hands over is small: for `sampled` one log-probability a token; for `full_vocab`
its final hidden states and its own LM-head shard, never logits. So a teacher may have its own width
and depth.

Shapes: R x L tokens of a micro-batch, T = R * L; D hidden; V local vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sgopd.loss import Objective
from megatron_sgopd.model import DistillationGPTModel
from megatron_sgopd.packing import MicroBatch
from megatron_sgopd.parallel import Groups
from megatron_sgopd.vocab_parallel import Rows, sampled_logprobs


@dataclass(frozen=True)
class Frozen:
    """A frozen model that holds its weights."""

    module: DistillationGPTModel
    groups: Groups

    @torch.no_grad()
    def hidden_states(self, micro_batch: MicroBatch) -> Tensor:
        """Final hidden states, after the last norm, [T, D]."""
        was_training = self.module.training
        self.module.eval()
        with self.module.handing_over_hidden_states():
            hidden = self.module(micro_batch.input_ids, micro_batch.position_ids, None)
        self.module.train(was_training)
        return hidden.transpose(0, 1).flatten(0, 1)  # Megatron's [L, R, D] -> [R * L, D]

    def score(self, micro_batch: MicroBatch, objective: Objective) -> Rows:
        """Log-probs [T] of the targets (`sampled`, one collective), or (hidden, head shard)."""
        rows = (self.hidden_states(micro_batch), self.module.lm_head_weight().detach())
        if objective.estimator == "full_vocab":
            return rows
        return sampled_logprobs(
            rows,
            tokens=micro_batch.targets.flatten(),
            mask=micro_batch.loss_mask.flatten(),
            group=self.groups.tp_group,
            vocab_size=self.module.true_vocab_size,
            temperature=objective.temperature,
            chunk_tokens=objective.chunk_tokens,
        )
