"""Tiny random Hugging Face models, made by transformers at test time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,  # short: the scaling shows in tiny sequences
}


def tiny_config(
    *,
    family: str = "qwen3",
    layers: int = 2,
    hidden: int = 64,
    heads: int = 4,
    kv: int = 2,
    head_dim: int = 32,
    vocab: int = 37,
    tied: bool = False,
    positions: int = 256,
    **options: Any,
) -> Any:
    if family == "llama":
        options = {"rope_parameters": LLAMA3_ROPE, **options}
    if family != "qwen2":  # Qwen2.5's heads share the hidden size out
        options = {"head_dim": head_dim, **options}
    return {"qwen3": Qwen3Config, "qwen2": Qwen2Config, "llama": LlamaConfig}[family](
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 2 + 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        max_position_embeddings=positions,
        tie_word_embeddings=tied,
        **options,
    )


def make_hf_dir(path: Path, seed: int, *, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A Hugging Face directory whose weights make a real test: large, with uneven norms."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(**sizes))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + 0.2 * torch.randn_like(p) if "norm" in name else 0.08 * torch.randn_like(p))
    model.to(dtype).save_pretrained(path)
    return path
