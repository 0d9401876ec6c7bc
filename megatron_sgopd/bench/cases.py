"""Lists what is measured: an objective in a form on a shape is a case. Imports no torch.

Shapes: T tokens, V the whole vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DTYPES = ("fp32", "bf16")
OBJECTIVES = ("reverse_kl", "gated_reverse_kl", "sampled", "forward_kl", "jsd", "candidate")
MAIN = OBJECTIVES[:3]  # on every shape; the others on the first
NEED_REFERENCE = ("gated_reverse_kl", "candidate")
LAMBDA_HIGH = 1.8  # of an open gate, as in the recipes
JSD_BETA = 0.5

Shape = tuple[int, int]  # tokens and vocabulary
SHAPES: tuple[Shape, ...] = ((512, 32_768), (2048, 32_768), (512, 151_936))
SMALL_SHAPES: tuple[Shape, ...] = ((64, 2_048),)
# A GPU's: one of eight shards of Qwen's vocabulary, and the whole of it, which the plain form can
# hold for fewer tokens.
CUDA_SHAPES: tuple[Shape, ...] = ((16_384, 18_992), (4_096, 151_936))
CUDA_FUSED_SHAPES: tuple[Shape, ...] = ((16_384, 151_936),)
HIDDEN = {"cpu": 512, "cuda": 2048}
SMALL_HIDDEN = 32
LARGE = 1 << 24  # logits; of more, what takes longest on a CPU is measured less often


@dataclass(frozen=True)
class Case:
    """One objective, one form, one shape; every variant of it is measured in the same run."""

    form: str  # "logits", "sampled" (logits, with the teacher's log-probs) or "fused"
    objective: str
    tokens: int
    vocab: int
    dtype: str
    tp: int
    hidden: int  # read by the fused form alone

    @property
    def label(self) -> str:
        """Name it, for `--only` to match against."""
        what = self.form if self.form == self.objective else f"{self.form} {self.objective}"
        return f"{what} {self.tokens}x{self.vocab} {self.dtype} tp{self.tp}"

    @property
    def has_reference(self) -> bool:
        return self.objective in NEED_REFERENCE

    @property
    def is_large(self) -> bool:
        return self.tokens * self.vocab > LARGE

    @property
    def shard_bytes(self) -> int:
        """Count one rank's logits in their own dtype: the unit of memory."""
        return self.tokens * self.vocab // self.tp * (4 if self.dtype == "fp32" else 2)


def cases(
    *,
    small: bool = False,
    device: str = "cpu",
    shapes: Sequence[Shape] = (),
    only: str = "",
) -> list[Case]:
    """List all cases of a run, in order.

    Args:
        shapes: in place of the default ones.
        only: keeps the cases whose label contains it.
    Raises:
        ValueError: `only` leaves none.
    """
    is_gpu = device == "cuda"
    chosen = tuple(shapes) or (SMALL_SHAPES if small else CUDA_SHAPES if is_gpu else SHAPES)
    fused = CUDA_FUSED_SHAPES if is_gpu and not shapes and not small else chosen
    hidden = SMALL_HIDDEN if small else HIDDEN[device]
    found = [
        Case("sampled" if objective == "sampled" else "logits", objective, *shape, dtype, 1, hidden)
        for shape in chosen
        for dtype in DTYPES
        for objective in (OBJECTIVES if shape == chosen[0] else MAIN)
    ]
    found += [
        Case("fused", "reverse_kl", *shape, dtype, 1, hidden)
        for shape in fused
        for dtype in (DTYPES[-1:] if is_gpu else DTYPES)
    ]
    if not is_gpu:  # two ranks cannot share a GPU
        found += [
            Case("sampled" if objective == "sampled" else "logits", objective, *chosen[0], d, 2, 0)
            for d in DTYPES
            for objective in MAIN
        ]
    kept = [case for case in found if only in case.label]
    if not kept:
        raise ValueError(
            f"--only {only!r} matches none of the {len(found)} cases; they are named like "
            f"{found[0].label!r}, {found[-1].label!r}"
        )
    return kept
