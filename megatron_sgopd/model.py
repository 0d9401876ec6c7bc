"""Hugging Face config -> Megatron GPTModel, for student, teacher and reference alike.

Family: Qwen3 (GQA, q/k-norm, RMSNorm, SwiGLU, RoPE, tied or untied embeddings).

Shapes: R x L tokens of a micro-batch, D hidden, V vocabulary rows held by this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sgopd.layer_spec import block_spec
from megatron_sgopd.parallel import Groups

# What each option of a Qwen3 config must be for this model to be the same function.
REQUIRED = {
    "model_type": "qwen3",
    "hidden_act": "silu",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_sliding_window": False,
}


class DistillationGPTModel(GPTModel):
    """Megatron's GPT that can hand over its final hidden states instead of logits.

    `true_vocab_size` is the Hugging Face model's; the padded rows beyond it never count.
    """

    hf_config: Any
    true_vocab_size: int
    _hands_over_hidden_states = False

    @contextmanager
    def handing_over_hidden_states(self) -> Iterator[None]:
        """Inside, forward returns the states before the output layer: [L, R, D], after the norm."""
        self._hands_over_hidden_states = True
        try:
            yield
        finally:
            self._hands_over_hidden_states = False

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._hands_over_hidden_states:
            return hidden_states
        return super()._postprocess(hidden_states, *args, **kwargs)

    def lm_head_weight(self) -> Tensor:
        """This rank's rows of the LM head, [V, D]; the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_model(
    hf_config: Any,
    groups: Groups,
    *,
    dtype: torch.dtype,
    transformer_impl: str = "local",
    make_vocab_size_divisible_by: int = 128,
    trainable: bool,
) -> DistillationGPTModel:
    """The model of a Hugging Face config on this rank, its weights not yet loaded.

    Raises:
        ValueError: an architecture, option or size that does not fit, by name.
    """
    _check_supported(hf_config)
    _check_divisible(hf_config, groups.tp_size)
    config = transformer_config(hf_config, groups, dtype)
    multiple = make_vocab_size_divisible_by * groups.tp_size
    model = DistillationGPTModel(
        config,
        block_spec(hf_config.num_hidden_layers, transformer_impl),
        vocab_size=-(-hf_config.vocab_size // multiple) * multiple,
        max_sequence_length=hf_config.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
        position_embedding_type="rope",
        rotary_base=int(hf_config.rope_parameters["rope_theta"]),
    )
    model.hf_config, model.true_vocab_size = hf_config, hf_config.vocab_size
    if not trainable:
        model.requires_grad_(False)
        model.eval()
    return model.to(groups.device)


def transformer_config(hf_config: Any, groups: Groups, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's description of the same transformer, under this layout."""
    on_cpu = groups.device.type == "cpu"
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=hf_config.head_dim,
        ffn_hidden_size=hf_config.intermediate_size,
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=True,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.tp_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        use_cpu_initialization=on_cpu,
        # Every weight is overwritten by hf_weights, but Megatron marks a parameter as tensor
        # parallel only while it initialises it, and its gradient norm reads those marks.
        perform_initialization=True,
        # The loss carries the normalisation; see train_step.
        calculate_per_token_loss=True,
        # Fused kernels need CUDA extensions; the local spec runs without them everywhere.
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
    )


def _check_supported(hf_config: Any) -> None:
    for name, wanted in REQUIRED.items():
        if (got := getattr(hf_config, name, wanted)) != wanted:
            raise ValueError(
                f"config.json has {name} {got!r}; supported is {wanted!r} (the Qwen3 dense family)"
            )
    rope = hf_config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"config.json has rope_type {rope['rope_type']!r}; supported is 'default' (no scaling)"
        )
    if rope["rope_theta"] != int(rope["rope_theta"]):
        raise ValueError(
            f"config.json has rope_theta {rope['rope_theta']}; Megatron takes integers"
        )


def _check_divisible(hf_config: Any, tp_size: int) -> None:
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (size := getattr(hf_config, name)) % tp_size:
            raise ValueError(
                f"config.json has {name} {size}, which parallel.tensor_model_parallel_size "
                f"{tp_size} does not divide: lower the latter"
            )
