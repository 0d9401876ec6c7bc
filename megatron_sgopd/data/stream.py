"""Deals prompts out: step by step, epoch by epoch, replica by replica.

`PromptStream` has no state: the prompts of a step are a function of (seed, step), so that a resumed
run goes on with the prompts it would have had.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from megatron_sgopd.types import Prompt


@dataclass(frozen=True)
class PromptStream:
    """Endless: epoch after epoch, each a permutation of its own (or the given order)."""

    prompts: Sequence[Prompt]
    seed: int
    shuffle: bool
    num_prompts: int  # per step, over all replicas

    def take(self, step: int) -> list[Prompt]:
        """The prompts of a step (from 0); the same on every rank."""
        first = step * self.num_prompts
        return [self._at(i) for i in range(first, first + self.num_prompts)]

    def _at(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self.prompts))
        if not self.shuffle:
            return self.prompts[place]
        return self.prompts[_permutation(len(self.prompts), f"{self.seed}-{epoch}")[place]]


@lru_cache(maxsize=2)  # a step touches two epochs at most
def _permutation(size: int, seed: str) -> list[int]:
    order = list(range(size))
    random.Random(f"prompts-{seed}").shuffle(order)
    return order


def share(prompts: Sequence[Prompt], dp_rank: int, dp_size: int) -> list[Prompt]:
    """A replica's contiguous share.

    Raises:
        ValueError: the prompts cannot be shared out equally.
    """
    size, rest = divmod(len(prompts), dp_size)
    if rest:
        raise ValueError(
            f"rollout.num_prompts {len(prompts)} cannot be shared by {dp_size} replicas: use a "
            f"multiple of {dp_size}"
        )
    return list(prompts[dp_rank * size : (dp_rank + 1) * size])
