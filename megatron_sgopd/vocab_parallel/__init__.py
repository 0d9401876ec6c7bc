"""Distillation losses on logits sharded over the vocabulary, which are never gathered.

shard        which tokens count and which columns are this rank's
softmax      statistics of a sharded row, and their merge
blocks       rows in blocks that stay in the cache
objective    the two passes of any objective; one file for each: sampled, reverse_kl,
             divergences (forward KL, JSD), candidate, top_k
projection   logits of one chunk at a time, from hidden states and LM-head shards
choice       which objective the options ask for
loss         statistics, coefficients and gradient put together
"""

from megatron_sgopd.vocab_parallel.loss import distillation_loss, sampled_logprobs
from megatron_sgopd.vocab_parallel.shard import Rows
from megatron_sgopd.vocab_parallel.task import LossResult, Statistics

__all__ = ["LossResult", "Rows", "Statistics", "distillation_loss", "sampled_logprobs"]
