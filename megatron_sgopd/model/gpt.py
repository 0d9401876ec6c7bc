"""Hugging Face config -> Megatron GPTModel, for student, teacher and reference alike.

Families: those of `families` (RMSNorm, SwiGLU, RoPE, GQA; tied or untied embeddings).

Shapes: R x L tokens of this rank's part of a micro-batch (R = 1 where it is packed), D hidden, V
vocabulary rows held by this rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_sgopd.config.layout import padded_vocab_size, recompute_problem, split_layers
from megatron_sgopd.config.schema import ParallelConfig
from megatron_sgopd.distributed.groups import Groups
from megatron_sgopd.model.families import check_layout, family_of, head_dim
from megatron_sgopd.model.layer_spec import block_spec


class DistillationGPTModel(GPTModel):
    """Megatron's GPT that can hand over its final hidden states instead of logits."""

    first_layer = 0  # this chunk's first layer among all of the model's
    _hands_over_hidden_states = False

    @contextmanager
    def returning_hidden_states(self) -> Iterator[None]:
        """Makes forward on the last stage return the states before the output layer.

        [L, R, D], after the final norm; sequence shards [L / TP, R, D] under sequence parallelism.
        """
        self._hands_over_hidden_states = True
        try:
            yield
        finally:
            self._hands_over_hidden_states = False

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._hands_over_hidden_states and self.post_process:
            return hidden_states
        return super()._postprocess(hidden_states, *args, **kwargs)

    def lm_head_weight(self) -> Tensor:
        """This rank's rows of the LM head, [V, D]; the embedding's where they are tied."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


@dataclass(frozen=True)
class ShardedModel:
    """Holds this rank's part of a model under a layout: one chunk, or several interleaved ones."""

    chunks: tuple[DistillationGPTModel, ...]
    groups: Groups
    hf_config: Any
    shared_vocab_size: int  # rows that enter a softmax: those that all models of a run have

    @property
    def last_chunk(self) -> DistillationGPTModel:
        """Returns the last pipeline stage's chunk, with final norm and LM head."""
        return self.chunks[-1]

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.chunks[0].config.params_dtype
        return dtype

    @property
    def true_vocab_size(self) -> int:
        """Rows of the Hugging Face model, which are exported; Megatron pads beyond them."""
        return int(self.hf_config.vocab_size)

    def named_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Megatron's names with the layers' numbers counted over the whole model.

        Under pipeline parallelism a tied embedding comes on the first stage as itself and on the
        last stage as `output_layer.weight`.
        """
        for chunk in self.chunks:
            for name, parameter in chunk.named_parameters():
                yield global_name(name, chunk.first_layer), parameter

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        for _, parameter in self.named_parameters():
            yield parameter


def build_model(
    hf_config: Any,
    groups: Groups,
    *,
    dtype: torch.dtype,
    transformer_impl: str = "local",
    trainable: bool,
    shared_vocab_size: int | None = None,
    on_meta_device: bool = False,
) -> ShardedModel:
    """This rank's part of the model of a Hugging Face config, its weights not yet loaded.

    Vocabulary rows from `shared_vocab_size` on (None: the model has no others) enter no softmax.
    `on_meta_device`: its matrices have shapes and take no memory, for what converts checkpoints.

    Raises:
        ValueError: an architecture, option or size that does not fit, by name.
    """
    family = family_of(hf_config)
    stages = groups.pp_size * (groups.config.virtual_pipeline_model_parallel_size or 1)
    check_layout(hf_config, groups.tp_size, stages)
    per_stage = split_layers(hf_config.num_hidden_layers, stages)
    if trainable and (problem := recompute_problem(groups.config, hf_config.num_hidden_layers)):
        raise ValueError(problem)
    chunks = []
    for virtual in range(stages // groups.pp_size):
        stage = virtual * groups.pp_size + groups.pp_rank
        config = transformer_config(hf_config, groups, dtype, trainable=trainable)
        multiple = groups.config.make_vocab_size_divisible_by
        with torch.device("meta") if on_meta_device else nullcontext():
            chunk = DistillationGPTModel(
                config,
                block_spec(per_stage[stage], transformer_impl, qk_norm=family.qk_norm),
                vocab_size=padded_vocab_size(hf_config.vocab_size, multiple, groups.tp_size),
                max_sequence_length=hf_config.max_position_embeddings,
                pre_process=stage == 0,
                post_process=stage == stages - 1,
                parallel_output=True,
                share_embeddings_and_output_weights=bool(hf_config.tie_word_embeddings),
                position_embedding_type="rope",
                rotary_base=int(hf_config.rope_parameters["rope_theta"]),
                pg_collection=groups.collection,
                vp_stage=virtual,
            )
        chunk.first_layer = sum(per_stage[:stage])
        if not trainable:
            chunk.requires_grad_(False)
            chunk.eval()
        if not on_meta_device:
            chunk = chunk.to(groups.device)
        if hf_config.rope_parameters.get("rope_type", "default") == "llama3":
            # Megatron's own scaling knows Llama 3.1's numbers only.
            frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config, groups.device)
            chunk.rotary_pos_emb.inv_freq = frequencies
        chunks.append(chunk)
    return ShardedModel(
        tuple(chunks), groups, hf_config, shared_vocab_size or int(hf_config.vocab_size)
    )


def transformer_config(
    hf_config: Any, groups: Groups, dtype: torch.dtype, *, trainable: bool
) -> TransformerConfig:
    """Megatron's description of the same transformer, under this layout."""
    on_cpu, layout = groups.device.type == "cpu", groups.config
    family = family_of(hf_config)
    interleaved = layout.virtual_pipeline_model_parallel_size is not None
    return TransformerConfig(
        num_layers=hf_config.num_hidden_layers,
        hidden_size=hf_config.hidden_size,
        num_attention_heads=hf_config.num_attention_heads,
        num_query_groups=hf_config.num_key_value_heads,
        kv_channels=head_dim(hf_config),
        ffn_hidden_size=hf_config.intermediate_size,
        layernorm_epsilon=hf_config.rms_norm_eps,
        normalization="RMSNorm",
        qk_layernorm=family.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=groups.pp_size,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_model_parallel_size,
        pipeline_model_parallel_layout=_layer_layout(hf_config.num_hidden_layers, groups),
        context_parallel_size=groups.cp_size,
        sequence_parallel=layout.sequence_parallel and groups.tp_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # Ragged micro-batches: stages tell each other shapes. Megatron asks for the dispatcher
        # then, of dense models too.
        variable_seq_lengths=groups.pp_size > 1,
        moe_token_dispatcher_type="alltoall",
        overlap_p2p_comm=interleaved
        if layout.overlap_p2p_comm is None
        else layout.overlap_p2p_comm,
        batch_p2p_comm=not interleaved if layout.batch_p2p_comm is None else layout.batch_p2p_comm,
        **(_recompute(layout) if trainable else {}),
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


def _recompute(layout: ParallelConfig) -> dict[str, Any]:
    if layout.recompute_granularity == "none":
        return {}
    if layout.recompute_granularity == "selective":
        return {
            "recompute_granularity": "selective",
            "recompute_modules": list(layout.recompute_modules or ["core_attn"]),
        }
    return {
        "recompute_granularity": "full",
        "recompute_method": layout.recompute_method,
        "recompute_num_layers": layout.recompute_num_layers,
    }


class _LayerLayout(PipelineParallelLayerLayout):
    """A layout that knows its stage: Megatron's asks for the student's, whatever the model."""

    def __init__(self, layout: list[list[str]], groups: Groups) -> None:
        super().__init__(layout, groups.pp_size)
        self._pp_rank = groups.pp_rank

    def get_num_layers_to_build(self, *args: Any, **kwargs: Any) -> int:
        return int(super().get_num_layers_to_build(*args, **kwargs | {"pp_rank": self._pp_rank}))

    def get_layer_offset(self, *args: Any, **kwargs: Any) -> int:
        return int(super().get_layer_offset(*args, **kwargs | {"pp_rank": self._pp_rank}))


def _layer_layout(num_layers: int, groups: Groups) -> _LayerLayout | None:
    """Lists which layers lie on which stage, where they cannot be shared out equally."""
    stages = groups.pp_size * (groups.config.virtual_pipeline_model_parallel_size or 1)
    if num_layers % stages == 0:
        return None
    rows = [["decoder"] * count for count in split_layers(num_layers, stages)]
    return _LayerLayout([["embedding", *rows[0]], *rows[1:-1], [*rows[-1], "loss"]], groups)


def global_name(name: str, first_layer: int) -> str:
    match = re.fullmatch(r"(decoder\.layers\.)(\d+)(\..+)", name)
    return name if match is None else f"{match[1]}{int(match[2]) + first_layer}{match[3]}"
