"""The model families that are supported: what their Hugging Face configs must say, their tensors.

A family is a function of few switches: norms of queries and keys, biases of the projections to
them. What else its config can ask for must have the one value that Megatron's model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_sgopd.config.layout import split_layers

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QKV = tuple(f"self_attn.{x}_proj.weight" for x in "qkv")
QKV_BIAS = tuple(f"self_attn.{x}_proj.bias" for x in "qkv")
GATE_UP = ("mlp.gate_proj.weight", "mlp.up_proj.weight")

ALWAYS = {
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "use_sliding_window": False,
    "is_causal": True,
    "quantization_config": None,
    "auto_map": None,  # code of its own, which may compute anything
}
ROPE_KEYS = {
    "default": {"rope_type", "rope_theta"},
    "llama3": {
        "rope_type",
        "rope_theta",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    },
}


@dataclass(frozen=True)
class Family:
    name: str
    architecture: str
    qk_norm: bool = False
    qkv_bias: bool = False
    required: Mapping[str, Any] = field(default_factory=dict)  # option -> the supported value


FAMILIES = {  # by config.json's model_type
    "qwen3": Family(
        "Qwen3 dense", "Qwen3ForCausalLM", qk_norm=True, required={"attention_bias": False}
    ),
    "qwen2": Family("Qwen2.5", "Qwen2ForCausalLM", qkv_bias=True),
    "llama": Family(
        "Llama 3",
        "LlamaForCausalLM",
        required={"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1},
    ),
}


def family_of(hf_config: Any) -> Family:
    """The family of a transformers config.

    Raises:
        ValueError: an architecture or option that this model would compute otherwise, by name.
    """
    if hf_config.model_type not in FAMILIES:
        raise ValueError(
            f"config.json has model_type {hf_config.model_type!r}; supported are "
            f"{', '.join(f'{key!r} ({f.name})' for key, f in FAMILIES.items())}"
        )
    family = FAMILIES[hf_config.model_type]
    if others := sorted(set(hf_config.architectures or []) - {family.architecture}):
        raise ValueError(
            f"config.json has architectures {others[0]!r}; supported for {family.name} is "
            f"{family.architecture!r}"
        )
    for name, wanted in {**ALWAYS, **family.required}.items():
        if (got := getattr(hf_config, name, wanted)) != wanted:
            raise ValueError(
                f"config.json has {name} {got!r}; supported for {family.name} is {wanted!r}"
            )
    if others := sorted(set(getattr(hf_config, "layer_types", None) or []) - {"full_attention"}):
        raise ValueError(
            f"config.json has layer_types {others[0]!r}; supported is 'full_attention' alone"
        )
    _check_rope(hf_config.rope_parameters)
    return family


def _check_rope(rope: Mapping[str, Any]) -> None:
    kind = rope.get("rope_type", "default")
    if kind not in ROPE_KEYS:
        raise ValueError(
            f"config.json has rope_type {kind!r}; supported are 'default' and 'llama3'"
        )
    if unknown := sorted(set(rope) - ROPE_KEYS[kind]):
        raise ValueError(
            f"config.json has {unknown[0]} {rope[unknown[0]]!r} in rope_parameters of type "
            f"{kind!r}, which is not supported"
        )
    if rope["rope_theta"] != int(rope["rope_theta"]):
        raise ValueError(
            f"config.json has rope_theta {rope['rope_theta']}; Megatron takes integers"
        )


def head_dim(hf_config: Any) -> int:
    """Channels of a head; Qwen2.5's config does not name them."""
    return int(
        getattr(hf_config, "head_dim", None)
        or hf_config.hidden_size // hf_config.num_attention_heads
    )


def hf_shapes(hf_config: Any) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this config must hold (a tied head is not one of them)."""
    c, d, family = hf_config, head_dim(hf_config), family_of(hf_config)
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (c.vocab_size, c.hidden_size)}
    for i in range(c.num_hidden_layers):
        p = f"model.layers.{i}."
        shapes[p + "input_layernorm.weight"] = (c.hidden_size,)
        shapes[p + QKV[0]] = (c.num_attention_heads * d, c.hidden_size)
        shapes[p + QKV[1]] = shapes[p + QKV[2]] = (c.num_key_value_heads * d, c.hidden_size)
        if family.qkv_bias:
            shapes[p + QKV_BIAS[0]] = (c.num_attention_heads * d,)
            shapes[p + QKV_BIAS[1]] = shapes[p + QKV_BIAS[2]] = (c.num_key_value_heads * d,)
        if family.qk_norm:
            shapes[p + "self_attn.q_norm.weight"] = shapes[p + "self_attn.k_norm.weight"] = (d,)
        shapes[p + "self_attn.o_proj.weight"] = (c.hidden_size, c.num_attention_heads * d)
        shapes[p + "post_attention_layernorm.weight"] = (c.hidden_size,)
        shapes[p + GATE_UP[0]] = shapes[p + GATE_UP[1]] = (c.intermediate_size, c.hidden_size)
        shapes[p + "mlp.down_proj.weight"] = (c.hidden_size, c.intermediate_size)
    shapes["model.norm.weight"] = (c.hidden_size,)
    if not c.tie_word_embeddings:
        shapes[HEAD] = (c.vocab_size, c.hidden_size)
    return shapes


def tied_pair(hf_config: Any) -> tuple[str, str] | None:
    """(head, embedding) where they are one weight."""
    return (HEAD, EMBEDDING) if hf_config.tie_word_embeddings else None


def check_layout(hf_config: Any, tensor_parallel: int, stages: int) -> None:
    """Checks that the model can be cut so.

    Raises:
        ValueError: naming the size that cannot be shared out.
    """
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        if (size := getattr(hf_config, name)) % tensor_parallel:
            raise ValueError(
                f"config.json has {name} {size}, which tensor_model_parallel_size "
                f"{tensor_parallel} does not divide: lower the latter"
            )
    split_layers(hf_config.num_hidden_layers, stages)
