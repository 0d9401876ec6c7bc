"""What the planner says of the loss: the bytes of its chunks, its products, what is written twice.

Peaks of the real loss are in test_plan_memory.
"""

from __future__ import annotations

import pytest

from megatron_sgopd.preflight.plan import activations
from megatron_sgopd.preflight.plan.duration import forward_flops
from megatron_sgopd.preflight.plan.hardware import GPUS
from megatron_sgopd.preflight.plan.job import WHOLE_BATCH, Cluster
from megatron_sgopd.sgopd import METHODS
from megatron_sgopd.vocab_parallel import blocks, projection
from tests.preflight.plan.test_plan import LARGE, plan_of


def test_what_the_loss_takes_on_a_gpu_worked_by_hand() -> None:
    """Qwen3-8B, TP 4: two chunks of fp32 logits at hand, of 38,016 vocabulary rows."""
    plan = plan_of(*LARGE, "parallel.tensor_model_parallel_size=4", cluster=Cluster(8, 8))
    n = 640 * 2**20 // (2 * 4 * 38_016) // 128 * 128  # whole tiles of a GPU's products
    chunks = 2 * 4 * n * 38_016 + int(0.325 * 128 * 2**20)  # and scratch
    # Logits of 8192 rows in bfloat16; states, and their gradient twice in fp32; the head's rows.
    gradient = 2 * n * 8192 + (2 + 2 * 4) * n * 4096 + 4 * 8192 * 4096
    states = 2 * 2 * 18432 * 4096  # gathered over sequence shards, and their gradient
    logits = chunks + gradient + states
    assert plan.fullest.phases["train"]["logits"] == logits
    full = plan_of(
        *LARGE,
        *("parallel.tensor_model_parallel_size=4", "distill.chunk_tokens=256"),
        *("distill.estimator=full_vocab", "rollout.tis=none"),
        cluster=Cluster(8, 8),
    )
    chunks = 3 * 2 * 4 * 256 * 38_016 + 128 * 2**20  # teacher and reference too
    gradient = 2 * 256 * 8192 + (2 + 2 * 4) * 256 * 4096 + 4 * 8192 * 4096
    states += 2 * 18432 * (5120 + 4096)
    assert full.fullest.phases["train"]["logits"] == chunks + gradient + states


@pytest.mark.parametrize("whole_batch", [False, True])
@pytest.mark.parametrize("estimator", ["sampled", "full_vocab"])
def test_products_with_heads_worked_by_hand(
    estimator: str, whole_batch: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The student's forward and twice backward; a frozen model's in scoring or in the loss.

    Completion tokens alone meet a head, and once more forward where a method sees a micro-batch at
    once. What does not change with the utilisation is no product.
    """
    if whole_batch:
        monkeypatch.setattr("megatron_sgopd.preflight.plan.job.WHOLE_BATCH", frozenset({"sg_opd"}))
    overrides = (
        *(f"distill.estimator={estimator}", "rollout.tis=none"),
        "parallel.recompute_granularity=none",
    )
    lengths = {"mean_prompt_tokens": 500.0, "mean_completion_tokens": 4000.0}
    slow, fast = (
        plan_of(*overrides, gpu="b200", train_mfu=x, score_mfu=x, **lengths) for x in (0.2, 0.4)
    )
    student, teacher = (2 * 1024 * 4000 * 151_936 * width for width in (2048, 2560))
    full = estimator == "full_vocab"
    forward = student + (teacher + student if full else 0)  # the reference is the student's size
    heads = {
        "teacher": 0 if full else teacher,
        "reference": 0 if full else student,
        "train": 2 * student + forward * (2 if whole_batch else 1),
    }
    for phase, expected in heads.items():
        model = slow.models["student" if phase == "train" else phase]
        layers = forward_flops(model, 1024 * 4500, 4500) * (3 if phase == "train" else 1)
        seconds = slow.duration.phases[phase] - fast.duration.phases[phase]
        flops = seconds * 8 * GPUS["b200"].flops_per_s / (1 / 0.2 - 1 / 0.4)
        assert flops == pytest.approx(layers + expected, rel=1e-6)


# -- one question, two places ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["CHUNK_BYTES", "LEAST_TOKENS", "HEAD_ROWS", "SCRATCH_BYTES"])
def test_the_sizes_of_chunks_are_those_of_the_loss(name: str) -> None:
    """Written twice, since what answers before a GPU is asked for does not import torch."""
    owner = blocks if name == "SCRATCH_BYTES" else projection
    assert getattr(activations, name) == getattr(owner, name)


def test_which_methods_see_a_whole_micro_batch() -> None:
    assert {name for name, method in METHODS.items() if not method.token_local} == WHOLE_BATCH
