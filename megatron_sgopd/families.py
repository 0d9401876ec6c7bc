"""The model families that are supported, and what their Hugging Face configs must say.

A family is a function of few switches: norms of queries and keys, biases of the projections to
them. What else its config can ask for must have the one value that Megatron's model computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

ALWAYS = {"hidden_act": "silu", "attention_dropout": 0.0, "use_sliding_window": False}
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
    qk_norm: bool = False
    qkv_bias: bool = False
    required: Mapping[str, Any] = field(default_factory=dict)  # option -> the supported value


FAMILIES = {  # by config.json's model_type
    "qwen3": Family("Qwen3 dense", qk_norm=True, required={"attention_bias": False}),
    "qwen2": Family("Qwen2.5", qkv_bias=True),
    "llama": Family(
        "Llama 3",
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
