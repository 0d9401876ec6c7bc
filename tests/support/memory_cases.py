"""Peak memory of one rank's step under each way of saving it.

`python -m tests.support.memory_cases FOLDER` prints it as JSON; LONG=1 takes the sizes of the
log's table, which has bfloat16 too. Resident memory of the process over what it was before the
models were built, its high-water mark reset before the step: the CPU's answer to a GPU's allocator
statistics.
"""

from __future__ import annotations

import gc
import json
import os
import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_sgopd.metrics import Clock
from megatron_sgopd.training.packing import num_tokens
from megatron_sgopd.training.step import train_step
from megatron_sgopd.types import Completion, Prompt, Rollout
from tests.support.step_cases import StepCase, assemble_parts, groups_of
from tests.support.tiny import make_hf_dir

LONG = os.environ.get("LONG", "0") not in ("", "0")
VOCAB = 4096
LAYERS, ROLLOUTS, LONGEST = (6, 16, 384) if LONG else (4, 8, 192)
SIZES = {"layers": LAYERS, "hidden": 256, "heads": 4, "kv": 2, "head_dim": 64, "vocab": VOCAB}

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "full recompute": {"parallel": {"recompute_granularity": "full"}},
    "selective recompute (core_attn, mlp)": {
        "parallel": {
            "recompute_granularity": "selective",
            "recompute_modules": ["core_attn", "mlp"],
        }
    },
    "packed": {"parallel": {"micro_batch_tokens": 4 * LONGEST}},
    "optimizer.offload": {"offload_optimizer": True},
    "teacher and reference offload": {"frozen": {"offload": True}},
    "full_vocab": {"estimator": "full_vocab"},
    "full_vocab, hidden_states_budget_mb 0": {
        "estimator": "full_vocab",
        "parallel": {"hidden_states_budget_mb": 0.0},
    },
}
IN_BFLOAT16: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, grad_reduce_in_fp32 false": {
        "dtype": "bfloat16",
        "parallel": {"grad_reduce_in_fp32": False},
    },
}


def status_mb(field: str) -> float:
    """VmRSS or VmHWM of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise ValueError(field)


def draw_rollouts() -> list[Rollout]:
    rng = random.Random(0)
    rollouts = []
    for i in range(ROLLOUTS):
        length = LONGEST if i % 4 == 0 else rng.randint(LONGEST // 4, LONGEST)
        prompt = tuple(rng.randrange(VOCAB) for _ in range(8))
        answer = tuple(rng.randrange(VOCAB) for _ in range(length - 8))
        completion = Completion(answer, (-8.0,) * len(answer), "stop", 0, i)
        rollouts.append(Rollout(Prompt("p", prompt, "1"), completion, "student", i % 2 == 0, 1.0))
    return rollouts


def measure(case: StepCase) -> dict[str, float]:
    rollouts = draw_rollouts()
    gc.collect()
    before = status_mb("VmRSS")
    with groups_of(case) as groups:
        parts = assemble_parts(case, groups)
        arguments = (
            parts.student,
            parts.teacher,
            parts.reference,
            rollouts,
            parts.objective,
            parts.config.distill,
            Clock(),
        )
        train_step(*arguments)  # the optimizer makes its state in the first step
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        metrics = train_step(*arguments)
        peak = status_mb("VmHWM") - before
        at_rest = status_mb("VmRSS") - before
    return {
        "peak_mb": peak,
        "at_rest_mb": at_rest,
        "loss": metrics["train/loss"],
        "grad_norm": metrics["train/grad_norm"],
        "padding_share": metrics["packing/padding_share"],
    }


def case_of(base: StepCase, variant: dict[str, Any]) -> StepCase:
    tuples = {k: tuple(v.items()) if isinstance(v, dict) else v for k, v in variant.items()}
    return replace(base, **tuples)


def main(folder: Path) -> None:
    paths = {
        role: str(make_hf_dir(folder / role, seed, tied=role == "student", **SIZES))
        for seed, role in enumerate(("student", "teacher", "reference"))
    }
    base = StepCase(**paths, vocab=VOCAB, micro_batch_size=4)
    store = dist.FileStore(str(folder / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    measure(base)  # imports, thread pools and allocator arenas
    variants = VARIANTS | IN_BFLOAT16 if LONG else VARIANTS
    results = {name: measure(case_of(base, variant)) for name, variant in variants.items()}
    tokens = sum(num_tokens(r) for r in draw_rollouts())
    print(json.dumps({"tokens": tokens, "variants": results}))


def environment() -> dict[str, str]:
    """Memory that is freed goes back to the system, so that resident memory means something."""
    return {
        **os.environ,
        "RANK": "0",
        "WORLD_SIZE": "1",
        "SGOPD_DEVICE": "cpu",
        "OMP_NUM_THREADS": "2",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_ARENA_MAX": "1",
    }


if __name__ == "__main__":
    torch.set_num_threads(2)
    main(Path(sys.argv[1]))
