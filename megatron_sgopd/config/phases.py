"""Phased teacher sampling: how much of a step's batch asks the teacher, and which slots do.

Part of the batch is verifier-endorsed teacher rollouts at cold start, and they fade out (arXiv
2606.09304; docs/method.md, "Phased teacher sampling").
"""

from __future__ import annotations

import math
import random


def teacher_fraction(
    step: int, *, num_steps: int, rho0: float = 0.5, hold_frac: float = 0.1, end_frac: float = 0.4
) -> float:
    """Share of the rollout slots that ask the teacher at training step `step` (from 0).

    rho0 up to u1 = hold_frac * num_steps, then a cosine to 0 at u2 = end_frac * num_steps.
    """
    u1, u2 = hold_frac * num_steps, end_frac * num_steps
    if step >= u2:
        return 0.0
    if step < u1:
        return rho0
    return rho0 * 0.5 * (1.0 + math.cos(math.pi * (step - u1) / (u2 - u1)))


def teacher_slots(
    fraction: float, *, num_prompts: int, n: int, unit: str = "rollout", seed: int, step: int
) -> list[int]:
    """The slots of the global batch (prompt * n + sample) that ask the teacher, sorted.

    floor(fraction * B) of the B = num_prompts * n slots; with unit `prompt` all slots of
    floor(fraction * num_prompts) prompts. A pure function of seed and step, so that every replica
    draws the same without talking.
    """
    rng = random.Random(f"teacher-slots-{seed}-{step}")
    # Guard the floor against 0.3 * 10 = 2.999…
    if unit == "rollout":
        count = math.floor(fraction * num_prompts * n + 1e-9)
        return sorted(rng.sample(range(num_prompts * n), count))
    if unit != "prompt":
        raise ValueError(f"phases.unit is {unit!r}; allowed are 'rollout' and 'prompt'")
    chosen = rng.sample(range(num_prompts), math.floor(fraction * num_prompts + 1e-9))
    return sorted(p * n + i for p in chosen for i in range(n))
