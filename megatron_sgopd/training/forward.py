"""Runs a stage of the model on a micro-batch, padded or packed.

Shapes: R rows of a micro-batch, L positions, V vocabulary rows of this rank, D hidden.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_sgopd.training.packing import MicroBatch


def forward(chunk: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """The chunk's output for this rank's part of a micro-batch; `chunk` may be wrapped in DDP.

    Logits [R, L, V] on the last stage (hidden states [L, R, D], under sequence parallelism
    [L / TP, R, D], while they are handed over), activations for the next stage elsewhere.
    """
    packed = None
    if batch.cu_seqlens is not None:
        cu = torch.tensor(batch.cu_seqlens, dtype=torch.int32, device=batch.input_ids.device)
        longest = max(b - a for a, b in pairwise(batch.cu_seqlens))
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=cu,
            cu_seqlens_kv=cu,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
    output: Tensor = chunk(batch.input_ids, batch.position_ids, None, packed_seq_params=packed)
    return output
