"""`sgopd plan`: published sizes, hand-worked figures, advice that holds, mistakes in one line.

What the formulae say of memory is compared with real allocations in test_plan_memory.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.config.checks import needs_reference, needs_teacher
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.load import load_config
from megatron_sgopd.preflight.plan.activations import Shape, largest_shape
from megatron_sgopd.preflight.plan.architecture import ModelLayout, architecture_from_config
from megatron_sgopd.preflight.plan.duration import forward_flops
from megatron_sgopd.preflight.plan.engines import cache_bytes_per_token
from megatron_sgopd.preflight.plan.hardware import GIB, GPUS
from megatron_sgopd.preflight.plan.job import Cluster
from megatron_sgopd.preflight.plan.known_models import KNOWN, known_name
from megatron_sgopd.preflight.plan.memory import in_flight
from megatron_sgopd.preflight.plan.planner import Plan, make_plan
from megatron_sgopd.preflight.plan.remedies import with_values
from megatron_sgopd.preflight.plan.report import as_json, lines, settings

ROOT = Path(__file__).resolve().parents[3]
RECIPE = str(ROOT / "recipes/qwen3_1p7b_from_4b.yaml")
EIGHT = Cluster(1, 8)
OWN = ("rollout.vllm.colocated=false", "parallel.data_parallel_size=null")
LARGE = (
    "model.student.hf_path=Qwen/Qwen3-8B",
    "model.teacher.hf_path=Qwen/Qwen3-32B",
    "parallel.data_parallel_size=null",
)
MIXTURE = (
    "model.student.hf_path=Qwen/Qwen3-32B",
    "model.teacher.hf_path=Qwen/Qwen3-235B-A22B",
    "parallel.data_parallel_size=null",
    "parallel.tensor_model_parallel_size=8",
    "parallel.pipeline_model_parallel_size=4",
    "model.teacher.tensor_model_parallel_size=4",
    "model.teacher.pipeline_model_parallel_size=8",
)


def plan_of(*overrides: str, cluster: Cluster = EIGHT, gpu: str = "h100", **given: float) -> Plan:
    return make_plan(load_config(RECIPE, overrides), cluster, GPUS[gpu], given)


# -- models ----------------------------------------------------------------------------------------

PUBLISHED = {  # billions of parameters, from the model cards
    "Qwen/Qwen3-0.6B": 0.596,
    "Qwen/Qwen3-1.7B": 1.72,
    "Qwen/Qwen3-4B": 4.02,
    "Qwen/Qwen3-8B": 8.19,
    "Qwen/Qwen3-14B": 14.77,
    "Qwen/Qwen3-32B": 32.76,
    "Qwen/Qwen2.5-0.5B": 0.494,
    "Qwen/Qwen2.5-1.5B": 1.544,
    "Qwen/Qwen2.5-3B": 3.09,
    "Qwen/Qwen2.5-7B": 7.62,
    "Qwen/Qwen2.5-14B": 14.77,
    "Qwen/Qwen2.5-32B": 32.76,
    "Qwen/Qwen2.5-72B": 72.7,
    "meta-llama/Llama-3.1-8B": 8.03,
    "meta-llama/Llama-3.1-70B": 70.55,
    "meta-llama/Llama-3.2-1B": 1.236,
    "meta-llama/Llama-3.2-3B": 3.213,
    "Qwen/Qwen3-30B-A3B": 30.53,
    "Qwen/Qwen3-235B-A22B": 235.09,
}


def test_every_model_of_the_table_has_its_published_size() -> None:
    assert PUBLISHED.keys() == KNOWN.keys()
    for name, billions in PUBLISHED.items():
        assert KNOWN[name].num_parameters() == pytest.approx(billions * 1e9, rel=2e-3), name


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("Qwen/Qwen3-8B-Base", "Qwen/Qwen3-8B"),
        ("Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen3-4B"),
        ("meta-llama/Llama-3.1-70B-Instruct", "meta-llama/Llama-3.1-70B"),
        ("Keven16/Qwen3-4B-Non-Thinking-RL-Math", "Qwen/Qwen3-4B"),
        ("somebody/Qwen3-8B", None),
        ("Qwen/Qwen3-8B-AWQ", None),
    ],
)
def test_names_of_siblings(path: str, name: str | None) -> None:
    assert known_name(path) == name


def test_a_directory_needs_config_json_alone(tmp_path: Path) -> None:
    sizes = {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "vocab_size": 100,
        "intermediate_size": 128,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    plan = plan_of(f"model.student.hf_path={tmp_path}", "model.teacher.offload=true")
    model = plan.models["student"]
    assert (model.kv_heads, model.head_dim, model.tied) == (4, 16, False)
    assert model.num_parameters() == 2 * (4 * 64 * 64 + 3 * 64 * 128 + 2 * 64) + 2 * 6400 + 64


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "gemma2"}, "model_type 'gemma2'; known here are 'qwen3'"),
        ({"model_type": "qwen3", "num_hidden_layers": 2}, "no number hidden_size"),
    ],
)
def test_a_config_that_is_not_understood(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)):
        architecture_from_config(values, "config.json")


# -- figures worked by hand ------------------------------------------------------------------------


def test_bytes_of_a_rank_worked_by_hand() -> None:
    """Qwen3-8B, TP 4, DP 16: 2 + 4 + 12 / 16 bytes a parameter."""
    plan = plan_of(*LARGE, "parallel.tensor_model_parallel_size=4", cluster=Cluster(8, 8))
    layer = 4096 * (6144 + 4096 + 3 * 12288) // 4 + 2 * 4096 + 2 * 128
    count = 36 * layer + 2 * 152_064 // 4 * 4096 + 4096  # rows padded to a multiple of 512
    rank = plan.fullest
    assert rank.parameters == count
    assert rank.resident["weights"] == pytest.approx(2 * count, rel=1e-4)
    assert rank.resident["gradients"] == pytest.approx(4 * count, rel=1e-4)
    assert rank.resident["optimizer"] == pytest.approx(12 * count / 16, rel=1e-4)
    assert rank.resident["reference"] == 2 * count


def test_cache_of_a_token_worked_by_hand() -> None:
    model = KNOWN["Qwen/Qwen3-8B"]  # keys and values, 36 layers, 8 heads of 128, two bytes
    assert cache_bytes_per_token(model, 1, 2) == 2 * 36 * 8 * 128 * 2
    assert cache_bytes_per_token(model, 16, 2) == 2 * 36 * 1 * 128 * 2, "heads are repeated"


def test_micro_batches_in_flight_worked_by_hand() -> None:
    layout = ModelLayout(1, 4)
    assert [len(list(in_flight(layout, stage, 8))) for stage in range(4)] == [4, 3, 2, 1]
    assert len(list(in_flight(layout, 0, 2))) == 2, "no more than there are"
    interleaved = ModelLayout(1, 2, vpp=2)
    assert list(in_flight(interleaved, 0, 8)) == [0, 0, 1, 1, 0]
    assert list(in_flight(interleaved, 1, 8)) == [0, 0, 1]


def test_layers_that_cannot_be_shared_out_go_to_the_middle() -> None:
    ten = replace(KNOWN["Qwen/Qwen3-8B"], num_layers=10)
    assert ModelLayout(1, 4).chunk_layers(ten) == [[2], [3], [3], [2]]
    assert ModelLayout(1, 2, vpp=2).chunk_layers(ten) == [[2, 3], [3, 2]]


def test_the_largest_micro_batch() -> None:
    parallel = load_config(RECIPE).parallel
    assert largest_shape(parallel, 8000) == Shape(1, 18432, (8000, 8000, 2432))
    assert largest_shape(parallel, 18432) == Shape(1, 18432, (18432,))


def test_flops_are_twice_the_parameters_and_attention() -> None:
    model = KNOWN["Qwen/Qwen3-8B"]
    weights = 36 * (4096 * (6144 + 4096 + 3 * 12288))
    plain = forward_flops(model, 10.0, 0.0)
    assert plain == pytest.approx(2 * 10 * weights, rel=1e-3)
    longer = forward_flops(model, 10.0, 1000.0)
    assert longer - plain == pytest.approx(2 * 10 * 36 * 4096 * 1000)  # causal: half of 4 L a d n


def test_places_of_a_replica_hold_the_stages_of_a_teachers_own_layout() -> None:
    """Copies, then stages, then tensor parallel neighbours: TP 2 x PP 2 on the ranks of TP 4."""
    own = (
        "model.teacher.tensor_model_parallel_size=2",
        "model.teacher.pipeline_model_parallel_size=2",
    )
    free = "parallel.data_parallel_size=null"
    plan = plan_of(*own, free, "parallel.tensor_model_parallel_size=4")
    layer = 2560 * (6144 + 4096 + 3 * 9728) // 2 + 2 * 2560 + 2 * 128
    first = 18 * layer + 152_064 // 2 * 2560  # 151,936 rows, padded to a multiple of 256
    stages = [2 * first, 2 * first, 2 * (first + 2560), 2 * (first + 2560)]
    assert [rank.resident["teacher"] for rank in plan.ranks] == stages
    assert [rank.stage for rank in plan.ranks] == [0, 0, 0, 0]
    shared = plan_of(free, "parallel.pipeline_model_parallel_size=2")
    assert [rank.resident["teacher"] for rank in shared.ranks] == stages
    assert [rank.stage for rank in shared.ranks] == [0, 0, 1, 1]


def test_a_frozen_model_has_the_students_vocabulary_rows_and_its_engine_its_own() -> None:
    """Qwen2.5 pads 151,936 or 152,064 rows: 128 rows of 3584, embedding and head, are left out."""
    names = ("model.student.hf_path=Qwen/Qwen2.5-1.5B", "model.teacher.hf_path=Qwen/Qwen2.5-7B")
    plan = plan_of(*names, "parallel.make_vocab_size_divisible_by=1")
    whole = 2 * KNOWN["Qwen/Qwen2.5-7B"].num_parameters()
    norms = 2 * (28 * 2 + 1) * 3584  # on both ranks
    assert 2 * plan.fullest.resident["teacher"] == whole + norms - 2 * 2 * 128 * 3584
    assert plan.engines[1].weights_bytes == whole // 2


# -- time ------------------------------------------------------------------------------------------


def test_more_gpus_share_the_work() -> None:
    one, two = (
        plan_of("parallel.data_parallel_size=null", cluster=Cluster(n, 8)).duration for n in (1, 2)
    )
    for phase in ("teacher", "reference"):
        assert one.phases[phase] == pytest.approx(2 * two.phases[phase])
    assert one.phases["train"] > 1.5 * two.phases["train"]


def test_a_step_behind_overlaps_generation_with_the_rest() -> None:
    own = (*OWN, "rollout.vllm.devices=null")
    cluster = Cluster(2, 8)
    strict = plan_of(*own, cluster=cluster).duration
    behind = plan_of(*own, "rollout.max_policy_lag=1", cluster=cluster).duration
    assert strict.step_seconds == pytest.approx(sum(strict.phases.values()))
    made = behind.phases["generate"] + behind.phases["label"]
    used = sum(behind.phases[p] for p in ("teacher", "reference", "train"))
    assert behind.step_seconds == pytest.approx(max(made, used) + behind.phases["push_weights"])


def test_recomputation_costs_a_forward_pass_of_the_layers() -> None:
    none, full = (
        plan_of(f"parallel.recompute_granularity={g}", gpu="h200").duration.phases["train"]
        for g in ("none", "full")
    )
    assert 1.2 < full / none < 4 / 3


def test_assumptions_are_options() -> None:
    usual, fast = plan_of().duration, plan_of(train_mfu=0.7, score_mfu=0.8).duration
    assert usual.phases["teacher"] == pytest.approx(2 * fast.phases["teacher"])
    longer = plan_of(mean_completion_tokens=8192.0).duration
    assert longer.tokens == pytest.approx(1024 * (204.8 + 8192))


# -- does it fit, and what to change ---------------------------------------------------------------

SAVING = {
    "parallel.use_distributed_optimizer": (False, True),
    "parallel.recompute_granularity": ("none", "full"),
    "parallel.micro_batch_tokens": (36864, 18432),
    "optimizer.offload": (False, True),
    "model.teacher.offload": (False, True),
    "model.reference.offload": (False, True),
    "parallel.hidden_states_budget_mb": (None, 0.0),
    "parallel.grad_reduce_in_fp32": (True, False),
}


@pytest.mark.parametrize("key", SAVING)
def test_what_saves_memory_saves_it_in_the_training_phase(key: str) -> None:
    base = load_config(
        RECIPE,
        ["distill.estimator=full_vocab", "rollout.tis=none", "parallel.overlap_grad_reduce=false"],
    )
    dear, cheap = (
        make_plan(with_values(base, [{key: value}]), EIGHT, GPUS["b200"], {}).fullest.total("train")
        for value in SAVING[key]
    )
    assert cheap < dear - 0.1 * GIB


TIGHT: dict[str, tuple[tuple[str, ...], Cluster, str]] = {
    "a small GPU": ((), EIGHT, "a100-40"),
    "everything kept": (
        ("parallel.recompute_granularity=none", "parallel.micro_batch_tokens=73728"),
        EIGHT,
        "h100",
    ),
    "full_vocab, large": (
        (*LARGE, "distill.estimator=full_vocab", "rollout.tis=none"),
        Cluster(8, 8),
        "h100",
    ),
    "embedded": (("rollout.engine=embedded",), EIGHT, "h100"),
    "a mixture": (MIXTURE, Cluster(64, 8), "h100"),
    "what hardly helps at first": (
        (*LARGE, "rollout.engine=embedded", "distill.phases.enabled=false"),
        Cluster(8, 8),
        "a100-40",
    ),
}


@pytest.mark.parametrize("name", TIGHT)
def test_the_advice_holds(name: str) -> None:
    """Taken as it is written, the plan says what was promised; each change is needed."""
    overrides, cluster, gpu = TIGHT[name]
    plan = plan_of(*overrides, cluster=cluster, gpu=gpu)
    assert not plan.fits
    assert plan.changes
    words = [word for change in plan.changes for word in settings(change.changes).split()]
    followed = plan_of(*overrides, *words, cluster=cluster, gpu=gpu)
    assert followed.fits
    assert followed.missing_bytes == plan.changes[-1].missing_bytes
    for i in range(len(plan.changes)):
        others = [c for j, c in enumerate(plan.changes) if j != i]
        rest = [word for change in others for word in settings(change.changes).split()]
        try:
            assert not plan_of(*overrides, *rest, cluster=cluster, gpu=gpu).fits
        except ConfigError:
            continue  # a change that another one needs


def test_no_advice_helps_where_nothing_can() -> None:
    plan = plan_of(*LARGE, "model.student.hf_path=Qwen/Qwen2.5-72B", gpu="l40s")
    assert not plan.fits
    assert "use more GPUs" in "\n".join(lines(plan))


def test_a_mixture_is_answered_and_marked() -> None:
    plan = plan_of(*MIXTURE, cluster=Cluster(64, 8))
    assert any("mixture of experts" in note for note in as_json(plan)["notes"])
    student, teacher = (plan.models[role].is_supported for role in ("student", "teacher"))
    assert (student, teacher) == (True, False)


# -- one question, two places ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["distill.gate.lambda_high=1.0"],
        ["distill.gate.lambda_high=1.0", "distill.gate.teacher_signal=t_minus_r"],
        ["distill.method=exopd"],
        ["distill.method=exopd", "distill.lambda_uniform=1.0"],
        ["distill.method=opd"],
        ["distill.method=grpd"],
        ["distill.method=grpo", "distill.phases.enabled=false"],
    ],
)
def test_which_models_a_method_reads(overrides: list[str]) -> None:
    from megatron_sgopd.training.objective import Objective

    config = load_config(RECIPE, overrides)
    objective = Objective.from_config(config.distill, config.rollout, 0.0)
    assert needs_teacher(config.distill) == objective.needs_teacher
    assert needs_reference(config.distill) == objective.needs_reference


def test_no_figure_is_lost_on_the_way_to_the_table() -> None:
    """The rows of each stage add up to its peak."""
    text = list(lines(plan_of()))
    start = text.index(next(line for line in text if line.startswith("memory")))
    rows = [line.split() for line in text[start + 1 :]]
    end = next(i for i, row in enumerate(rows) if row[0] == "peak")
    total = sum(float(row[1]) for row in rows[:end])
    assert math.isclose(total, float(rows[end][1]), abs_tol=0.01 * end)


def test_what_this_machine_lacks_does_not_stop_a_plan() -> None:
    plan = plan_of(
        "model.transformer_impl=transformer_engine",
        "parallel.recompute_granularity=selective",
        "parallel.recompute_modules=[core_attn,layernorm]",
        gpu="b200",
    )
    plain = plan_of("parallel.recompute_granularity=none", gpu="b200")
    activations = [p.fullest.phases["train"]["activations"] for p in (plan, plain)]
    normed = 2 * 28 * 18432 // 2 * 2048 * 2  # two norms' outputs a layer, sequence shards
    assert activations[1] - activations[0] > normed
