"""Hugging Face directories without weights, of the kinds that are mixed up: base and instruct."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEXT_END, TURN, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(
    "assistant\n{%", "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{%"
)
MERGES = [("a", "b"), ("ab", "c")]


def tokenizer(
    merges: list[tuple[str, str]] = MERGES, added: tuple[str, ...] = (), lower: bool = False
) -> Tokenizer:
    """Bytes, a few merges, then the three tokens of ChatML and `added`."""
    alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(alphabet)}, merges=merges))
    if lower:
        made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([TEXT_END, TURN, TURN_END, *added])
    return made


def write_dir(
    path: Path,
    *,
    eos: str = TURN_END,
    also_ends: tuple[str, ...] = (TEXT_END,),
    template: str | None = CHATML,
    made: Tokenizer | None = None,
    begins_with: str | None = None,
    **config: Any,
) -> Path:
    """As an instruct model says it; `begins_with` is put before every text (BOS)."""
    made = made or tokenizer()
    path.mkdir(parents=True)
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": eos}
    if begins_with is not None:
        settings["bos_token"] = begins_with
        pair = (begins_with, made.token_to_id(begins_with))
        made.post_processor = processors.TemplateProcessing(f"{begins_with} $A", None, [pair])
    if template is not None:
        settings["chat_template"] = template
    made.save(str(path / "tokenizer.json"))
    ids = [made.token_to_id(token) for token in (eos, *also_ends)]
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    files = {
        "tokenizer_config.json": settings,
        "generation_config.json": {"eos_token_id": ids},
        "config.json": {
            "model_type": "qwen3",
            "vocab_size": 272,
            "max_position_embeddings": 512,
            "dtype": "float32",
            "num_key_value_heads": 2,
            **sizes,
            **config,
        },
    }
    for name, content in files.items():
        (path / name).write_text(json.dumps(content))
    return path
