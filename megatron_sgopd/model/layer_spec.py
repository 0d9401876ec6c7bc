"""The transformer layer's parts: our own norm and attention, or Transformer Engine's.

Ours need neither TE nor apex and run on CPU and GPU alike: an RMSNorm that admits sequence
parallelism, and torch's scaled-dot-product attention (`attention`) as Megatron's core attention.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sgopd.model.attention import SDPAttention


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        )
        # finalize_model_grads sums these over TP under sequence parallelism.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def block_spec(
    num_layers: int, transformer_impl: str, *, qk_norm: bool
) -> TransformerBlockSubmodules | ModuleSpec:
    """Makes GPTModel's `transformer_layer_spec`; `qk_norm` as Qwen3 has it.

    Raises:
        ValueError: `transformer_engine` is asked for and cannot be imported.
    """
    if transformer_impl == "transformer_engine":
        if importlib.util.find_spec("transformer_engine") is None:
            raise ValueError(
                "model.transformer_impl is 'transformer_engine', which is not installed here: "
                "install the [gpu] extra on a GPU machine, or set it to 'local'"
            )
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=qk_norm)
    layer = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    attention.core_attention = SDPAttention
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=RMSNorm)
