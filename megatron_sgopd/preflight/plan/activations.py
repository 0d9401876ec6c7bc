"""Bytes that a forward pass keeps for backward, and what the loss needs beside them.

Counted from the modules that run: Megatron's layer with our own norm and attention, unfused SwiGLU
and rotary embedding, the vocabulary-parallel loss. tests/preflight/plan/test_memory.py compares
each count with the tensors that autograd really saves. Transformer Engine's fused layer keeps no
more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sgopd.config.schema import ParallelConfig
from megatron_sgopd.preflight.plan.architecture import Architecture, ModelLayout

# What the loss takes for one chunk's logits, and for the scratch of its passes. The same
# numbers are in vocab_parallel (projection.py, blocks.py), which imports torch.
CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 640 * 2**20}
SAMPLED_SHARE = 0.325  # of SCRATCH_BYTES, where the student's rows are the only ones read
SCRATCH_BYTES = {"cpu": 4 * 2**20, "cuda": 128 * 2**20}
LEAST_TOKENS, GEMM_ROWS = 256, 128
HEAD_ROWS = 8192


@dataclass(frozen=True)
class Shape:
    """A micro-batch: R rows of L columns, or R = 1 with packed sequences."""

    rows: int
    columns: int  # of the whole micro-batch, all context parallel ranks
    sequences: tuple[int, ...]  # lengths; one where it is padded

    @property
    def is_packed(self) -> bool:
        return len(self.sequences) > 1

    def tokens(self, layout: ModelLayout) -> int:
        """Count the tokens of one context parallel rank."""
        return self.rows * -(-self.columns // layout.cp)


@dataclass(frozen=True)
class Arithmetic:
    """`fused_norms`: torch's RMSNorm on CUDA keeps its input; on CPUs fp32 intermediates too."""

    element_bytes: int
    fused_norms: bool = True


def largest_shape(parallel: ParallelConfig, longest: int) -> Shape:
    """The largest micro-batch there can be."""
    budget = parallel.micro_batch_tokens
    if budget is None:
        return Shape(parallel.micro_batch_size, longest, (longest,))
    whole = max(1, budget // longest)
    rest = (budget - whole * longest,) if budget > whole * longest else ()
    return Shape(1, budget, (*[longest] * whole, *rest))


def layer_bytes(
    model: Architecture,
    layout: ModelLayout,
    shape: Shape,
    kind: Arithmetic,
    recomputed: Sequence[str] = (),
) -> int:
    """Kept of one layer; `recomputed` are the modules of selective recomputation."""
    b, tokens = kind.element_bytes, shape.tokens(layout)
    shard = tokens // layout.sequence_shards * model.hidden  # elements of the residual stream
    ffn = tokens * model.ffn // layout.tp
    norms = 2 * _norm_bytes(shard, tokens // layout.sequence_shards, kind)
    inputs = 2 * shard * b  # of the two column-parallel products
    if "layernorm" in recomputed:
        inputs = 0
    kept = norms + inputs + attention_bytes(model, layout, shape, kind, "core_attn" in recomputed)
    # gate and up, silu(gate), up + 0, their product
    return kept + (0 if "mlp" in recomputed else 5 * ffn * b)


def _norm_bytes(elements: int, rows: int, kind: Arithmetic) -> int:
    return elements * (kind.element_bytes if kind.fused_norms else 8) + 4 * rows


def attention_bytes(
    model: Architecture, layout: ModelLayout, shape: Shape, kind: Arithmetic, recomputed: bool
) -> int:
    """Queries, keys, values, rotary tables, the kernel's output and statistics."""
    b, tokens, cp = kind.element_bytes, shape.tokens(layout), layout.cp
    heads, groups = model.heads // layout.tp, model.kv_heads // layout.tp
    q, k = tokens * heads * model.head_dim, tokens * groups * model.head_dim
    in_fp32 = 0 if kind.fused_norms or b == 4 else 4  # the cast that CPUs keep
    kept = 0
    if model.family.qk_norm:
        kept += _norm_bytes(q, tokens * heads, kind) + 4 * tokens * groups
        kept += 0 if kind.fused_norms else k * (4 + in_fp32)
        # Queries of one group are a view of the product, those of several a copy.
        kept -= q * b if groups == 1 and not in_fp32 else 0
    # What the product of queries, keys and values gave lives on in its views: the values, and the
    # keys where their norm keeps its input.
    if cp == 1 or recomputed or (model.family.qk_norm and not in_fp32):
        kept += (q + 2 * k) * b
    positions = -(-shape.columns // cp)
    kept += 4 * positions * model.head_dim * b  # cos and sin, for queries and for keys
    kept += 2 * q * b  # queries, output
    if cp == 1 or recomputed:
        kept += k * b
    if recomputed:
        return kept
    kept += 4 * tokens * heads  # the softmax's statistics
    if cp > 1:
        kept += 2 * cp * k * b + sum(_mask_elements(length, cp) for length in shape.sequences) * b
    if shape.is_packed or cp > 1:
        kept += q * b  # the pieces' outputs beside the whole
    return kept


def _mask_elements(length: int, cp: int) -> int:
    """Counts those of the rank with the largest masks: n queries, 2 and 2 CP - 1 chunks of keys."""
    n = -(-length // (2 * cp))
    return n * n * (2 * cp + 1)


@dataclass(frozen=True)
class Kept:
    """The bytes kept of one micro-batch in one model chunk."""

    saved: int
    recomputed: int  # what a repeated forward pass of some layers keeps, for a while


def chunk_bytes(
    model: Architecture,
    layout: ModelLayout,
    shape: Shape,
    kind: Arithmetic,
    parallel: ParallelConfig,
    layers: int,
) -> Kept:
    """Counts what `layers` layers keep under the recipe's recomputation."""
    if parallel.recompute_granularity != "full":
        selective = parallel.recompute_granularity == "selective"
        modules = (parallel.recompute_modules or ["core_attn"]) if selective else []
        return Kept(layers * layer_bytes(model, layout, shape, kind, modules), 0)
    whole = layer_bytes(model, layout, shape, kind)
    b = kind.element_bytes
    checkpoint = shape.tokens(layout) // layout.sequence_shards * model.hidden * b
    tables = 4 * -(-shape.columns // layout.cp) * model.head_dim  # fp32 angles, for all layers
    n = min(parallel.recompute_num_layers, layers)
    if parallel.recompute_method == "uniform":
        return Kept(-(-layers // n) * checkpoint + tables, n * whole)
    return Kept(n * checkpoint + (layers - n) * whole + tables, whole)


def end_bytes(model: Architecture, layout: ModelLayout, shape: Shape, kind: Arithmetic) -> int:
    """Kept of the final norm, and its output, which the loss projects."""
    rows = shape.tokens(layout) // layout.sequence_shards
    return _norm_bytes(rows * model.hidden, rows, kind) + rows * model.hidden * kind.element_bytes


def working_bytes(model: Architecture, layout: ModelLayout, shape: Shape, b: int) -> int:
    """Passing gradients of one layer: of the residual stream and of the feed-forward part."""
    tokens, shards = shape.tokens(layout), layout.sequence_shards
    whole = tokens * model.hidden * (2 if shards > 1 else 1)  # gathered over TP
    return (2 * tokens // shards * model.hidden + whole + 4 * tokens * model.ffn // layout.tp) * b


def forward_bytes(model: Architecture, layout: ModelLayout, shape: Shape, kind: Arithmetic) -> int:
    """The widest moment of a forward pass that keeps nothing: in attention or in feed-forward."""
    b, tokens, shards = kind.element_bytes, shape.tokens(layout), layout.sequence_shards
    stream = 2 * tokens // shards * model.hidden + (tokens * model.hidden if shards > 1 else 0)
    experts = max(1, model.experts_per_token)
    wide = 4 * tokens * model.ffn * experts // layout.tp * b
    q = tokens * model.heads * model.head_dim // layout.tp
    mixed = q + 2 * tokens * model.kv_heads * model.head_dim // layout.tp
    rotary, norm = 5 * q * b, 0 if kind.fused_norms else q * (b + 12)
    return stream * b + max(wide, mixed * b + max(rotary, norm))


@dataclass(frozen=True)
class LossChunks:
    """The logits of one chunk of tokens, which are all that exist at once.

    `models`: those whose rows are read (1 to 3). `sets`: chunks at hand at once; with tensor
    parallelism the next one is projected while the last one's statistics travel.
    """

    rows: int  # of the vocabulary on this rank
    models: int
    sets: int
    chunk_tokens: int | None = None  # the recipe's override
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        """Count the tokens of a chunk, if there are as many."""
        each = 4 * self.rows * self.models * self.sets
        size = max(LEAST_TOKENS, CHUNK_BYTES[self.device] // each)
        return self.chunk_tokens or (
            size if self.device == "cpu" else size // GEMM_ROWS * GEMM_ROWS
        )

    def scoring_bytes(self, tokens: int, hidden: int, b: int) -> int:
        """While log-probs of `tokens` are made; `b`: bytes of an element of the model."""
        scratch = self._scratch_bytes(tokens, 1)  # no products: an entropy is not wanted
        return self._logits_bytes(tokens) + max(self._projecting(tokens, hidden, b, 1), scratch)

    def training_bytes(self, tokens: int, hidden: int, b: int) -> int:
        """While the loss and its gradient are made, the gradient of all hidden states aside."""
        buffers = 1 + self.models  # one for products
        ending = self._scratch_bytes(tokens, buffers) + self._gradient_bytes(tokens, hidden, b)
        projecting = self._projecting(tokens, hidden, b, buffers)
        return self._logits_bytes(tokens) + max(projecting, ending)

    def _logits_bytes(self, tokens: int) -> int:
        n = min(tokens, self.tokens)
        sets = min(self.sets, -(-tokens // n))
        return 4 * n * self.rows * self.models * sets

    def _scratch_bytes(self, tokens: int, buffers: int) -> int:
        """Compute the bytes of the passes' buffers, which are made with the first chunk."""
        n = min(tokens, self.tokens)
        budget = SCRATCH_BYTES[self.device] * (SAMPLED_SHARE if self.models == 1 else 1.0)
        return min(int(budget), 4 * n * self.rows * buffers)

    def _projecting(self, tokens: int, hidden: int, b: int, buffers: int) -> int:
        """A chunk's states and, of the chunks after the first, the scratch.

        GPUs give the products in fp32. CPUs give them in the model's type, for some rows of the
        head at a time; they are added in fp32.
        """
        n, rows = min(tokens, self.tokens), min(self.rows, HEAD_ROWS)
        converted = 0 if b == 4 or self.device == "cuda" else n * rows * (b + 4)
        later = self._scratch_bytes(tokens, buffers) if tokens > n else 0
        return n * hidden * b + converted + later

    def _gradient_bytes(self, tokens: int, hidden: int, b: int) -> int:
        """A chunk's gradient on its way to its states and to some rows of the head.

        The products are in fp32; CPUs make the head's in the model's type first.
        """
        n, rows = min(tokens, self.tokens), min(self.rows, HEAD_ROWS)
        if b == 4:  # nothing to convert, and the head's product is added in place
            return 2 * n * hidden * b
        sums = 4 * (1 if rows == self.rows else 2)  # a slice's product beside the sum of them
        product = 4 if self.device == "cuda" else 4 + b
        return n * rows * b + n * hidden * (b + sums) + rows * hidden * product
