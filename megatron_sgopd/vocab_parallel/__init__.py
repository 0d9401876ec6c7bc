"""Distillation losses on logits sharded over the vocabulary, which are never gathered.

`shard` says which rows and tokens this rank works on, `statistics` reduces and merges the shards,
`gradients` writes the gradient of the local logits, `loss` puts them together.
"""

from megatron_sgopd.vocab_parallel.loss import (
    LossResult,
    Statistics,
    distillation_loss,
    sampled_logprobs,
)
from megatron_sgopd.vocab_parallel.shard import Rows

__all__ = ["LossResult", "Rows", "Statistics", "distillation_loss", "sampled_logprobs"]
