"""Counts a model's tensors and its parameters on a rank, for the planner's formulae.

The trainer's models are those of `families`; a mixture of experts is counted by formula alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.layout import padded_vocab_size, split_layers
from megatron_sgopd.model.families import FAMILIES, Family

MIXTURES = {"qwen3_moe": Family("Qwen3 mixture of experts", "Qwen3MoeForCausalLM", qk_norm=True)}
SIZES = {  # of `Architecture` -> of config.json
    "num_layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "vocab": "vocab_size",
    "ffn": "intermediate_size",
}


@dataclass(frozen=True)
class Architecture:
    """Sizes in elements. `source` says where they are from."""

    model_type: str
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # of one expert, in a mixture
    vocab: int
    tied: bool
    num_experts: int = 0
    experts_per_token: int = 0
    source: str = "config.json"

    @property
    def family(self) -> Family:
        return (FAMILIES | MIXTURES)[self.model_type]

    @property
    def is_supported(self) -> bool:
        """Tells whether the trainer can build it."""
        return self.model_type in FAMILIES

    def layer_tensors(self, tp: int) -> list[int]:
        """Elements of each parameter of one layer on one of `tp` tensor parallel ranks."""
        h, d = self.hidden, self.head_dim
        qkv = (self.heads + 2 * self.kv_heads) * d // tp
        sizes = [h, qkv * h, self.heads * d // tp * h, h]  # norm, QKV, projection, norm
        sizes += [qkv] if self.family.qkv_bias else []
        sizes += [d, d] if self.family.qk_norm else []
        each = [2 * self.ffn // tp * h, self.ffn // tp * h]  # gate and up, down
        if self.num_experts:
            return [*sizes, self.num_experts * h, *each * self.num_experts]
        return sizes + each

    def active_layer_parameters(self) -> int:
        """Counts the parameters of a layer that one token is multiplied with."""
        experts = self.experts_per_token if self.num_experts else 1
        idle = (max(1, self.num_experts) - experts) * 3 * self.ffn * self.hidden
        return sum(self.layer_tensors(1)) - idle

    def num_parameters(self) -> int:
        """Counts the whole model's parameters, without padding."""
        ends = (1 if self.tied else 2) * self.vocab * self.hidden + self.hidden
        return self.num_layers * sum(self.layer_tensors(1)) + ends


@dataclass(frozen=True)
class ModelLayout:
    """Describes how a model is cut: TP x PP (x VPP chunks a stage) x CP."""

    tp: int
    pp: int
    vpp: int = 1
    cp: int = 1
    sequence_parallel: bool = False
    vocab_divisible_by: int = 128

    @property
    def sequence_shards(self) -> int:
        return self.tp if self.sequence_parallel else 1

    def vocab_rows(self, model: Architecture) -> int:
        """Rows of the vocabulary on one rank, padding included."""
        return padded_vocab_size(model.vocab, self.vocab_divisible_by, self.tp) // self.tp

    def chunk_layers(self, model: Architecture) -> list[list[int]]:
        """[stage][chunk]: numbers of layers."""
        counts = split_layers(model.num_layers, self.pp * self.vpp)
        return [counts[stage :: self.pp] for stage in range(self.pp)]

    def stage_tensors(self, model: Architecture, stage: int) -> list[list[int]]:
        """[chunk]: elements of each parameter on a rank of the stage."""
        head = self.vocab_rows(model) * model.hidden
        last = self.pp - 1
        chunks = [model.layer_tensors(self.tp) * n for n in self.chunk_layers(model)[stage]]
        if stage == 0:
            chunks[0] = [head, *chunks[0]]
        if stage == last:
            chunks[-1] = [*chunks[-1], model.hidden]
            # A tied head is the embedding itself where one chunk has both.
            if not model.tied or self.pp * self.vpp > 1:
                chunks[-1].append(head)
        return chunks

    def stage_parameters(self, model: Architecture, stage: int) -> int:
        return sum(map(sum, self.stage_tensors(model, stage)))


def check_fits(model: Architecture, layout: ModelLayout, role: str) -> None:
    """Refuses what `build_model` would refuse.

    Raises:
        ConfigError: heads or widths that TP does not divide, fewer layers than stages.
    """
    key = "parallel" if role == "student" else f"parallel, or of model.{role},"
    for name, size in (
        ("num_attention_heads", model.heads),
        ("num_key_value_heads", model.kv_heads),
        ("intermediate_size", model.ffn),
    ):
        if size % layout.tp:
            raise ConfigError(
                f"tensor_model_parallel_size of {key} is {layout.tp}, which does not divide the "
                f"{role}'s {name} {size}: use a divisor of it"
            )
    if model.num_layers < (stages := layout.pp * layout.vpp):
        raise ConfigError(
            f"{stages} pipeline stages (pipeline_model_parallel_size of {key} x "
            f"virtual_pipeline_model_parallel_size) are more than the {role}'s "
            f"{model.num_layers} layers: use fewer"
        )


def architecture_from_config(values: dict[str, Any], source: str) -> Architecture:
    """Reads the sizes from the values of a config.json.

    Raises:
        ConfigError: a family that is not known, or a size that is missing.
    """
    kind = values.get("model_type")
    if kind not in FAMILIES and kind not in MIXTURES:
        known = ", ".join(repr(name) for name in (*FAMILIES, *MIXTURES))
        raise ConfigError(f"{source} has model_type {kind!r}; known here are {known}")
    mixture = kind in MIXTURES
    names = SIZES | ({"ffn": "moe_intermediate_size"} if mixture else {})
    if absent := [other for other in names.values() if not isinstance(values.get(other), int)]:
        raise ConfigError(f"{source} has no number {absent[0]}: give a complete config.json")
    sizes = {ours: int(values[other]) for ours, other in names.items()}
    return Architecture(
        model_type=str(kind),
        **sizes,
        kv_heads=int(values.get("num_key_value_heads") or sizes["heads"]),
        head_dim=int(values.get("head_dim") or sizes["hidden"] // sizes["heads"]),
        tied=bool(values.get("tie_word_embeddings", False)),
        num_experts=int(values["num_experts"]) if mixture else 0,
        experts_per_token=int(values["num_experts_per_tok"]) if mixture else 0,
        source=source,
    )
