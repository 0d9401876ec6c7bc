"""Model directories for training from scratch: config.json, generation_config.json, tokenizer.

Written as plain files, so that preparing the demonstration imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from megatron_sgopd.demo.world import INSTRUCTION

PAD, EOS, BOS, UNK = "<pad>", "<eos>", "<bos>", "<unk>"
VOCABULARY = (PAD, EOS, BOS, UNK, *"0123456789", *"+-*=;", "\\boxed{", "}", INSTRUCTION)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class ModelSize:
    """Qwen3's own field names. head_dim is 32 because vLLM on CPU has no kernel for less."""

    hidden_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32


TEACHER = ModelSize(num_hidden_layers=4)
STUDENT = ModelSize(num_hidden_layers=2)


def write_model_dir(directory: Path, size: ModelSize) -> None:
    """Everything a Hugging Face directory has but the weights."""
    directory.mkdir(parents=True, exist_ok=True)
    ids = {token: i for i, token in enumerate(VOCABULARY)}
    tokens = {"bos_token_id": ids[BOS], "eos_token_id": ids[EOS], "pad_token_id": ids[PAD]}
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": len(VOCABULARY),
        "hidden_size": size.hidden_size,
        "intermediate_size": 3 * size.hidden_size,
        "num_hidden_layers": size.num_hidden_layers,
        "num_attention_heads": size.num_attention_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "head_dim": size.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,  # a vLLM probe is 288 tokens long
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.05,  # 0.02 learns the chains several times slower at this width
        "tie_word_embeddings": True,
        "use_cache": True,
        "dtype": "float32",
        **tokens,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", {"do_sample": True, **tokens})
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "unk_token": UNK,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    build_tokenizer().save(str(directory / "tokenizer.json"))


def build_tokenizer() -> Tokenizer:
    """A closed vocabulary: digits, operators, `\\boxed{`, `}` and the instruction, a token each."""
    tokenizer = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(VOCABULARY)}, unk_token=UNK)
    )
    pattern = Regex(r"\\boxed\{|" + INSTRUCTION + r"|.")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([PAD, EOS, BOS, UNK])
    return tokenizer


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
