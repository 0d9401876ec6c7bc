"""The planner's formulae against what Megatron, autograd and the allocator really do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.preflight.plan.activations import (
    Arithmetic,
    chunk_bytes,
    end_bytes,
    largest_shape,
)
from megatron_sgopd.preflight.plan.architecture import ModelLayout
from megatron_sgopd.preflight.plan.hardware import GPUS
from megatron_sgopd.preflight.plan.job import Cluster, Job, make_job
from megatron_sgopd.preflight.plan.known_models import KNOWN, find_architecture
from megatron_sgopd.preflight.plan.memory import RankMemory, memory_of
from tests.support import plan_cases
from tests.support.plan_cases import PlanCase
from tests.support.tiny import make_hf_dir

SIZES = {"hidden": 64, "heads": 8, "kv": 2, "head_dim": 32, "vocab": 1003}
MODELS: dict[str, dict[str, Any]] = {
    "student": {"layers": 4, "tied": True},
    "teacher": {"layers": 5, "tied": False, "hidden": 96},
    "qwen2": {"family": "qwen2", "layers": 5, "tied": False},
    "llama": {"family": "llama", "layers": 4, "tied": False},
}
TP = {"tensor_model_parallel_size": 2}
SP = {**TP, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
VPP = {**PP, "virtual_pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2}
PACKED = {"micro_batch_tokens": 192}  # two rollouts
FULL = {"recompute_granularity": "full"}
SELECTIVE = {"recompute_granularity": "selective"}
MLP = {**SELECTIVE, "recompute_modules": ["core_attn", "mlp"]}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("plan")
    return {
        name: str(make_hf_dir(folder / name, seed, **{**SIZES, **sizes}))
        for seed, (name, sizes) in enumerate(MODELS.items(), 1)
    }


def case_of(paths: dict[str, str], student: str = "student", **fields: Any) -> PlanCase:
    tuples = {k: tuple(v.items()) if isinstance(v, dict) else v for k, v in fields.items()}
    return PlanCase(paths[student], paths["teacher"], **tuples)


def job_of(case: PlanCase, ranks: int) -> tuple[Job, dict[str, Any]]:
    student = find_architecture(case.student, "student")
    teacher = find_architecture(case.teacher, "teacher")
    models = {"student": student, "teacher": teacher, "reference": student}
    return make_job(case.config(), Cluster(1, ranks), models), models


def planned(case: PlanCase, ranks: int) -> list[RankMemory]:
    job, models = job_of(case, ranks)
    return memory_of(job, models, GPUS["h100"], fused_norms=False)


# -- what is there all the time --------------------------------------------------------------------

LIVE: dict[str, dict[str, Any]] = {
    "DP": {},
    "DP, bfloat16 gradients": {"parallel": {"grad_reduce_in_fp32": False}},
    "DP, float32": {"dtype": "float32"},
    "DP, distributed": {"parallel": {"use_distributed_optimizer": True}},
    "DP, distributed, float32": {
        "parallel": {"use_distributed_optimizer": True},
        "dtype": "float32",
    },
    "TP": {"parallel": SP},
    "PP": {"parallel": PP},
    "PP, VPP": {"parallel": VPP},
    "CP, distributed": {"parallel": {**CP, "use_distributed_optimizer": True}},
    "PP, a teacher of TP 2": {"parallel": PP, "frozen": {"tensor_model_parallel_size": 2}},
    "TP, a teacher of PP 2": {"parallel": TP, "frozen": {"pipeline_model_parallel_size": 2}},
}


@pytest.mark.parametrize("name", LIVE)
def test_live_bytes_of_models_and_optimizer(name: str, pool: Any, paths: dict[str, str]) -> None:
    """Exact; a distributed optimizer's ranks share the elements out only nearly equally."""
    case = case_of(paths, **LIVE[name])
    plans = planned(case, 2)
    for rank, got in enumerate(pool(2).run(plan_cases.live_bytes, case)):
        plan = plans[rank % len(plans)]
        assert got["stage"] == plan.stage
        assert got["parameters"] == plan.parameters
        for item in ("weights", "gradients", "teacher", "reference"):
            assert plan.resident[item] == got[item], item
        slack = 2e-3 if "distributed" in name else 0.0
        assert plan.resident["optimizer"] == pytest.approx(got["optimizer"], rel=slack)


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("parallel", [TP, PP, VPP], ids=["TP", "PP", "VPP"])
def test_parameters_of_each_family(
    family: str, parallel: dict[str, Any], pool: Any, paths: dict[str, str]
) -> None:
    case = case_of(paths, family, parallel=parallel)
    plans = planned(case, 2)
    for plan, got in zip(plans, pool(2).run(plan_cases.live_bytes, case), strict=True):
        assert (got["stage"], got["parameters"]) == (plan.stage, plan.parameters)


# -- what a forward pass keeps ---------------------------------------------------------------------

SAVED = {
    "padded": {"micro_batch_size": 2},
    "packed": PACKED,
    "packed, float32": PACKED,
    "selective": {**PACKED, **SELECTIVE},
    "selective, mlp": MLP,
    "full": FULL,
    "full, 2 layers at a time": {**FULL, "recompute_num_layers": 2},
    "full, block": {**FULL, "recompute_method": "block", "recompute_num_layers": 1},
}


@pytest.mark.parametrize("layout", [{}, TP, SP, CP], ids=["DP", "TP", "SP", "CP"])
@pytest.mark.parametrize("name", SAVED)
def test_saved_bytes_of_a_forward_pass(
    name: str, layout: dict[str, Any], pool: Any, paths: dict[str, str]
) -> None:
    """Within what token ids and the embedding's mask take."""
    dtype = "float32" if name == "packed, float32" else "bfloat16"
    case = case_of(paths, parallel={**layout, **SAVED[name]}, dtype=dtype)
    expected, tokens = saved_of(case)
    largest = max(pool(2).run(plan_cases.saved_bytes, case))
    assert 0 <= largest - expected <= 17 * tokens


@pytest.mark.parametrize("family", ["qwen2", "llama"])
@pytest.mark.parametrize("layout", [{}, CP], ids=["DP", "CP"])
def test_saved_bytes_of_each_family(
    family: str, layout: dict[str, Any], pool: Any, paths: dict[str, str]
) -> None:
    case = case_of(paths, family, parallel={**layout, **PACKED})
    expected, tokens = saved_of(case)
    largest = max(pool(2).run(plan_cases.saved_bytes, case))
    assert 0 <= largest - expected <= 17 * tokens


def saved_of(case: PlanCase) -> tuple[int, int]:
    """(planned bytes of one micro-batch, its tokens on a rank)."""
    job, models = job_of(case, 2)
    model, layout, parallel = models["student"], job.layout_of("student"), job.config.parallel
    kind = Arithmetic(4 if case.dtype == "float32" else 2, fused_norms=False)
    shape = largest_shape(parallel, job.longest)
    kept = chunk_bytes(model, layout, shape, kind, parallel, model.num_layers)
    return kept.saved + end_bytes(model, layout, shape, kind), shape.tokens(layout)


@pytest.mark.parametrize(("each", "refused"), [(2, False), (3, True)])
def test_checkpoints_that_do_not_divide_a_stage_are_refused_by_trainer_and_planner(
    each: int, refused: bool, pool: Any, paths: dict[str, str]
) -> None:
    """Megatron would fail in the first forward pass, with an index out of range."""
    case = case_of(paths, parallel={**FULL, "recompute_num_layers": each})
    words = "recompute_num_layers is 3, which does not divide the 4 layers"
    for message in pool(2).run(plan_cases.build_refusal, case):
        assert (words in (message or "")) == refused
    if refused:
        with pytest.raises(ConfigError, match=words):
            planned(case, 2)


# -- peaks -----------------------------------------------------------------------------------------

PEAKS: dict[str, tuple[dict[str, Any], float]] = {  # fields, tolerance
    "padded": ({"parallel": {"micro_batch_size": 2}}, 0.04),
    "packed, float32": ({"parallel": PACKED, "dtype": "float32"}, 0.04),
    "full": ({"parallel": {**PACKED, **FULL}}, 0.12),
    "full_vocab": ({"parallel": {**PACKED, **MLP}, "estimator": "full_vocab"}, 0.04),
    "chunks by bytes": ({"parallel": {"micro_batch_size": 2}, "chunk_tokens": None}, 0.04),
    "full_vocab, chunks by bytes": (
        {"parallel": {"micro_batch_size": 2}, "estimator": "full_vocab", "chunk_tokens": None},
        0.04,
    ),
    "PP": ({"parallel": {**PP, **PACKED}}, 0.06),
    "PP, VPP": ({"parallel": VPP}, 0.06),
    "PP, full": ({"parallel": {**PP, **FULL}}, 0.12),
}


@pytest.mark.parametrize("name", PEAKS)
def test_peaks_of_scoring_and_training(name: str, pool: Any, paths: dict[str, str]) -> None:
    """By the allocator's events. Tensor parallel collectives are left out: gloo's threads hold
    buffers for a time that no formula knows."""
    fields, tolerance = PEAKS[name]
    case = case_of(paths, **fields)
    plans = planned(case, 2)
    for rank, got in enumerate(pool(2).run(plan_cases.peaks, case)):
        plan = plans[rank % len(plans)]
        train = sum(plan.phases["train"][k] for k in ("activations", "working"))
        train += plan.phases["train"].get("logits", 0)
        assert train == pytest.approx(got["train"], rel=tolerance)
        score = sum(plan.phases["score_teacher"].values())
        assert score == pytest.approx(got["score"], rel=0.15)


# -- by shape alone --------------------------------------------------------------------------------

BIG = {  # (model, ranks, layout of the job's replicas)
    "1.7B of 8 GPUs": ("Qwen/Qwen3-1.7B", 8, {**SP}),
    "its teacher, 4B": ("Qwen/Qwen3-4B", 8, {**SP}),
    "8B of 64 GPUs": ("Qwen/Qwen3-8B", 64, {"tensor_model_parallel_size": 4, **PP}),
    "its teacher, 32B, TP 8": ("Qwen/Qwen3-32B", 64, {"tensor_model_parallel_size": 8}),
    "32B of 512 GPUs": (
        "Qwen/Qwen3-32B",
        512,
        {"tensor_model_parallel_size": 8, "pipeline_model_parallel_size": 4},
    ),
    "32B, stages of unequal depth": (
        "Qwen/Qwen3-32B",
        512,
        {
            "tensor_model_parallel_size": 4,
            "pipeline_model_parallel_size": 8,
            "virtual_pipeline_model_parallel_size": 3,
        },
    ),
}


def meta_cases() -> list[tuple[str, int, dict[str, Any]]]:
    """(name, stage, case of tests.support.plan_meta) of the first, a middle and the last stage."""
    cases = []
    for name, (model, world, parallel) in BIG.items():
        tp = parallel["tensor_model_parallel_size"]
        pp = parallel.get("pipeline_model_parallel_size", 1)
        for stage in sorted({0, pp // 2, pp - 1}):
            rank = stage * (world // pp) + tp - 1  # Megatron's order: TP, DP, PP
            sizes = config_of(model)
            cases.append(
                (name, stage, {"model": sizes, "world": world, "rank": rank, "parallel": parallel})
            )
    return cases


def config_of(model: str) -> dict[str, Any]:
    known = KNOWN[model]
    return {
        "num_hidden_layers": known.num_layers,
        "hidden_size": known.hidden,
        "num_attention_heads": known.heads,
        "num_key_value_heads": known.kv_heads,
        "head_dim": known.head_dim,
        "intermediate_size": known.ffn,
        "vocab_size": known.vocab,
        "tie_word_embeddings": known.tied,
    }


@pytest.fixture(scope="module")
def on_meta() -> dict[tuple[str, int], int]:
    """One process: its fake process group must not be the pool's or this process's."""
    cases = meta_cases()
    done = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-m",
            "tests.support.plan_meta",
            json.dumps([c[2] for c in cases]),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "SGOPD_DEVICE": "cpu"},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    sizes = json.loads(done.stdout.splitlines()[-1])
    return {(name, stage): size for (name, stage, _), size in zip(cases, sizes, strict=True)}


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stage, _ in meta_cases()])
def test_parameter_bytes_of_large_models(
    name: str, stage: int, on_meta: dict[tuple[str, int], int]
) -> None:
    model, _, parallel = BIG[name]
    layout = ModelLayout(
        parallel["tensor_model_parallel_size"],
        parallel.get("pipeline_model_parallel_size", 1),
        parallel.get("virtual_pipeline_model_parallel_size", 1),
    )
    assert 2 * layout.stage_parameters(KNOWN[model], stage) == on_meta[name, stage]


def test_the_mixture_of_experts_is_its_published_size_however_it_is_cut() -> None:
    """235B, of which 22B work on a token; a cut loses nothing and doubles small parts alone."""
    model = KNOWN["Qwen/Qwen3-235B-A22B"]
    active = model.num_layers * model.active_layer_parameters()
    assert active + 2 * model.vocab * model.hidden == pytest.approx(22e9, rel=0.02)
    layout = ModelLayout(tp=4, pp=8, vocab_divisible_by=1)
    whole = 4 * sum(layout.stage_parameters(model, stage) for stage in range(8))
    shared = 3 * model.num_layers * (model.num_experts + 2) * model.hidden  # router and norms
    small = 3 * (model.num_layers * 2 * model.head_dim + model.hidden)
    assert whole == model.num_parameters() + shared + small
    assert replace(model, num_experts=0).num_parameters() < 20e9
