"""Other packages' losses as the suite calls them, each as its own trainer calls it.

They are imported when they are first called. What a function does not take (a mask, a vocabulary
size that leaves out padding) is not supplied here: masked tokens are zeroed afterwards, and padding
columns count where the function counts them.

    sgopd doctor --numerics --function megatron_sgopd.preflight.numerics.peers:trl
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_sgopd.preflight.numerics.adapter import WORLDS

# -- TRL: full logits on one rank ------------------------------------------------------------------


def _trl(student: Tensor, teacher: Tensor, mask: Tensor, beta: float) -> Tensor:
    """GKD's `generalized_jsd_loss`, its sum over the vocabulary per token; beta 1 is reverse KL."""
    from trl.experimental.gkd import GKDTrainer

    parts = GKDTrainer.generalized_jsd_loss(
        student[None], teacher[None], beta=beta, reduction="none"
    )
    return torch.where(mask, parts[0].sum(-1), 0.0)


trl = SimpleNamespace(
    reverse_kl=lambda s, t, *, group, vocab_size, mask: _trl(s, t, mask, 1.0),
    forward_kl=lambda s, t, *, group, vocab_size, mask: _trl(s, t, mask, 0.0),
    jsd=lambda s, t, *, beta, group, vocab_size, mask: _trl(s, t, mask, beta),
    worlds=(1,),
    needs=("trl",),
)


# -- ModelOpt and Megatron-Core: Megatron's own tensor-parallel group ------------------------------


def _use_group(group: ProcessGroup) -> None:
    """Megatron's functions ask its global state for the group; the suite's is the whole world."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=group.size())


def _modelopt(
    student: Tensor, teacher: Tensor, group: ProcessGroup, mask: Tensor, reverse: bool
) -> Tensor:
    """`LogitsKLLoss`; each rank has its columns' part, which Megatron Bridge sums like this."""
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    _use_group(group)
    config: Any = SimpleNamespace(tensor_model_parallel_size=group.size())
    loss = LogitsKLLoss(config, reverse=reverse)
    values, tp_reduce, _ = loss(student[:, None], teacher[:, None])  # [s, b, V] -> [b, s]
    values = values[0]
    if tp_reduce:
        values = reduce_from_tensor_model_parallel_region(values)
    return torch.where(mask, values, 0.0)


modelopt = SimpleNamespace(
    reverse_kl=lambda s, t, *, group, vocab_size, mask: _modelopt(s, t, group, mask, True),
    forward_kl=lambda s, t, *, group, vocab_size, mask: _modelopt(s, t, group, mask, False),
    worlds=WORLDS,
    needs=("modelopt", "megatron", "requests"),  # ModelOpt imports requests without declaring it
)


def _megatron(student: Tensor, tokens: Tensor, group: ProcessGroup, mask: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    _use_group(group)
    values: Tensor = vocab_parallel_cross_entropy(student[:, None], tokens[:, None])[:, 0]
    return torch.where(mask, values, 0.0)


megatron = SimpleNamespace(
    nll=lambda s, tokens, *, group, vocab_size, mask: _megatron(s, tokens, group, mask),
    worlds=WORLDS,
    needs=("megatron",),
)
