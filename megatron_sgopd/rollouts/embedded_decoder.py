"""The forward pass of the embedded engine: token ids and a cache in, logits of the last column out.

For the supported families it is written out here: on a CPU, the calls of a model's modules would
take as long as the arithmetic of a token. It computes what transformers computes, operation by
operation (in float32 to the bit, but for the logits of a first token, which transformers makes
row by row where weights are frozen). Other architectures are left to transformers.

Shapes: B sequences, T columns of this pass, S columns so far, D hidden, V vocabulary; h query and
g key heads of d channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from megatron_sgopd.model.families import EMBEDDING, HEAD, family_of, head_dim, hf_shapes

ROOM = 64  # columns by which a full cache grows


class Decoder(Protocol):
    """`parameters` are the weights by their Hugging Face names; `tied` other names of some."""

    parameters: dict[str, Tensor]
    tied: dict[str, Tensor]

    def new_cache(self) -> Any:
        """Makes a cache for one batch; its `batch_select_indices` selects rows."""
        ...

    def logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        """Logits [B, V] of the last column of `ids` [B, T].

        `mask` [B, 1, T or 1, S] is added to the attention scores; None: causal.
        """
        ...


def make_decoder(hf_config: Any, device: torch.device, dtype: torch.dtype) -> Decoder:
    """A decoder of the architecture, its weights not yet filled in."""
    try:
        family_of(hf_config)
    except ValueError:  # not one that can be trained
        return TransformersDecoder(hf_config, device, dtype)
    return FamilyDecoder(hf_config, device, dtype)


class Cache:
    """Keys and values [B, g, S, d] of every layer, each in one buffer that grows in steps."""

    def __init__(self, num_layers: int) -> None:
        self.buffers: list[Tensor | None] = [None] * num_layers  # [2, B, g, >= S, d]
        self.lengths = [0] * num_layers

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds columns [B, g, T, d]; all columns of the layer so far."""
        buffer, start = self.buffers[layer], self.lengths[layer]
        end = start + keys.shape[2]
        if buffer is None or end > buffer.shape[3]:
            batch, heads, _, channels = keys.shape
            larger = keys.new_empty(2, batch, heads, end + ROOM, channels)
            if buffer is not None:
                larger[..., :start, :] = buffer[..., :start, :]
            self.buffers[layer] = buffer = larger
        buffer[0, :, :, start:end] = keys
        buffer[1, :, :, start:end] = values
        self.lengths[layer] = end
        return buffer[0, :, :, :end], buffer[1, :, :, :end]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Its rows become these; one may come several times, or not at all."""
        self.buffers = [b if b is None else b.index_select(1, indices) for b in self.buffers]


@dataclass(frozen=True)
class Layer:
    """A layer's weights; those that are multiplied with the same input in one matrix."""

    input_norm: Tensor  # [D]
    qkv: Tensor  # [(h + 2 g) d, D]
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [2, d], of queries and of keys
    out: Tensor  # [D, h d]
    mlp_norm: Tensor  # [D]
    gate: Tensor  # [F, D]; apart from `up`, since half of a matrix is rounded otherwise by silu
    up: Tensor  # [F, D]
    down: Tensor  # [D, F]


class FamilyDecoder:
    """A decoder of `families`: Qwen3, Qwen2.5, Llama 3."""

    def __init__(self, hf_config: Any, device: torch.device, dtype: torch.dtype) -> None:
        self._eps = hf_config.rms_norm_eps
        self._heads, self._kv_heads = hf_config.num_attention_heads, hf_config.num_key_value_heads
        # Which of its two norms a head has, queries before keys.
        kinds = [0] * self._heads + [1] * self._kv_heads
        self._head_kinds = torch.tensor(kinds, device=device)
        self._inverse_frequencies = _inverse_frequencies(hf_config, device)
        self.parameters: dict[str, Tensor] = {}
        shapes = hf_shapes(hf_config)

        def weight(*names: str) -> Tensor:
            """One matrix; its rows are the parameters of these names, one below the other."""
            rows = [shapes[name][0] for name in names]
            whole = torch.empty(sum(rows), *shapes[names[0]][1:], device=device, dtype=dtype)
            self.parameters |= zip(names, whole.split(rows), strict=True)
            return whole

        def layer(prefix: str) -> Layer:
            attention = f"{prefix}self_attn."
            qk_norm = None
            if f"{attention}q_norm.weight" in shapes:
                qk_norm = weight(f"{attention}q_norm.weight", f"{attention}k_norm.weight")
            biases = [f"{attention}{x}_proj.bias" for x in "qkv"]
            return Layer(
                input_norm=weight(f"{prefix}input_layernorm.weight"),
                qkv=weight(*(f"{attention}{x}_proj.weight" for x in "qkv")),
                qkv_bias=weight(*biases) if biases[0] in shapes else None,
                qk_norm=None if qk_norm is None else qk_norm.view(2, -1),
                out=weight(f"{attention}o_proj.weight"),
                mlp_norm=weight(f"{prefix}post_attention_layernorm.weight"),
                gate=weight(f"{prefix}mlp.gate_proj.weight"),
                up=weight(f"{prefix}mlp.up_proj.weight"),
                down=weight(f"{prefix}mlp.down_proj.weight"),
            )

        self._embedding = weight(EMBEDDING)
        count = hf_config.num_hidden_layers
        self._layers = [layer(f"model.layers.{i}.") for i in range(count)]
        self._norm = weight("model.norm.weight")
        self._head = weight(HEAD) if HEAD in shapes else self._embedding
        self.tied = {} if HEAD in shapes else {HEAD: self._embedding}

    def new_cache(self) -> Cache:
        return Cache(len(self._layers))

    def logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Cache) -> Tensor:
        x = F.embedding(ids, self._embedding)
        angles = positions[..., None].float() * self._inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        cos = torch.cat((cos, cos), -1)[:, :, None].to(x.dtype)  # [B, T, 1, d]
        signed_sin = torch.cat((-sin, sin), -1)[:, :, None].to(x.dtype)
        for i, layer in enumerate(self._layers):
            queries, keys, values = self._projected(layer, x, cos, signed_sin)
            keys, values = cache.append(i, keys, values)
            attended = F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and ids.shape[1] > 1,
                enable_gqa=self._heads != self._kv_heads,
            )
            x = x + F.linear(attended.transpose(1, 2).flatten(2), layer.out)
            normed = self._normed(x, layer.mlp_norm)
            gated = F.silu(F.linear(normed, layer.gate), inplace=True)
            x = x + F.linear(gated.mul_(F.linear(normed, layer.up)), layer.down)
        return F.linear(self._normed(x[:, -1], self._norm), self._head)

    def _projected(
        self, layer: Layer, x: Tensor, cos: Tensor, signed_sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, h, T, d], keys and values [B, g, T, d]; the first two rotated."""
        heads, num_turned = self._heads, self._heads + self._kv_heads
        qkv = F.linear(self._normed(x, layer.input_norm), layer.qkv, layer.qkv_bias)
        qkv = qkv.view(*x.shape[:2], num_turned + self._kv_heads, -1)
        turned = qkv[:, :, :num_turned]
        if layer.qk_norm is not None:
            weights = layer.qk_norm.index_select(0, self._head_kinds)
            turned = self._normed(turned, None) * weights
        # cos x + sin (-x2, x1): the halves change places, the sign is with the sine.
        swapped = turned.roll(turned.shape[-1] // 2, -1)
        turned = (turned * cos).add_(swapped.mul_(signed_sin))
        turned = turned.transpose(1, 2)
        return turned[:, :heads], turned[:, heads:], qkv[:, :, num_turned:].transpose(1, 2)

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, self._eps)


def _inverse_frequencies(hf_config: Any, device: torch.device) -> Tensor:
    """Computes the rotary embedding's, [d / 2] in float32: rounded, far positions are wrong."""
    rope = hf_config.rope_parameters
    if rope.get("rope_type", "default") == "llama3":
        frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](hf_config, device)
        return frequencies
    channels = head_dim(hf_config)
    exponents = torch.arange(0, channels, 2, dtype=torch.float32) / channels
    return (1.0 / rope["rope_theta"] ** exponents).to(device)


class TransformersDecoder:
    """Whatever else transformers can build."""

    def __init__(self, hf_config: Any, device: torch.device, dtype: torch.dtype) -> None:
        # The type goes in here, not through .to(dtype): that would round the rotary frequencies
        # too, and far positions would be wrong.
        self._model: Any = (
            AutoModelForCausalLM.from_config(hf_config, attn_implementation="sdpa", dtype=dtype)
            .to(device=device)
            .eval()
            .requires_grad_(False)
        )
        self.parameters: dict[str, Tensor] = dict(self._model.named_parameters())
        self.tied: dict[str, Tensor] = {
            name: parameter
            for name, parameter in self._model.named_parameters(remove_duplicate=False)
            if name not in self.parameters
        }

    def new_cache(self) -> DynamicCache:
        return DynamicCache(config=self._model.config)

    def logits(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits
