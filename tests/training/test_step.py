"""One step's loss and every gradient against the formula in float64, for every layout.

The measure of an error is max|d| / max|ref| per parameter.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.support import step_cases
from tests.support.step_cases import StepCase
from tests.support.tiny import make_hf_dir

TOLERANCE = 1e-5
VOCAB = 37


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, StepCase]:
    """tied? -> a case whose teacher has other width and depth, weights drawn here."""
    cases = {}
    for tied in (False, True):
        folder = tmp_path_factory.mktemp("models")
        paths = {
            "student": make_hf_dir(folder / "student", 11, layers=2, vocab=VOCAB, tied=tied),
            "teacher": make_hf_dir(
                folder / "teacher", 12, layers=3, hidden=96, vocab=VOCAB, tied=not tied
            ),
            "reference": make_hf_dir(folder / "reference", 13, layers=2, vocab=VOCAB, tied=tied),
        }
        cases[tied] = StepCase(**{k: str(v) for k, v in paths.items()}, vocab=VOCAB)
    return cases


def check(pool: Any, world: int, case: StepCase) -> None:
    for got in pool(world).run(step_cases.gradient_errors, case, step_cases.expected(case)):
        assert not got["missing"]
        assert got["loss"] < TOLERANCE
        worst = max(got["gradients"], key=got["gradients"].get)
        assert got["gradients"][worst] < TOLERANCE, worst
        assert got["frozen_gradients"] == 0


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 2), (2, 1)], ids=["one", "TP2", "DP2"])
@pytest.mark.parametrize("estimator", ["sampled", "full_vocab"])
def test_gradients_equal_the_formula(
    pool: Any,
    models: dict[bool, StepCase],
    estimator: str,
    world: int,
    tp: int,
    tied: bool,
    seed: int,
) -> None:
    check(pool, world, replace(models[tied], tp=tp, estimator=estimator, seed=seed))


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("aggregation", ["seq_mean_token_mean", "token_mean"])
@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 1)], ids=["DP1", "DP2"])
def test_normalisation_does_not_depend_on_the_split(
    pool: Any,
    models: dict[bool, StepCase],
    world: int,
    tp: int,
    aggregation: str,
    micro_batch_size: int,
) -> None:
    check(
        pool,
        world,
        replace(
            models[True],
            tp=tp,
            aggregation=aggregation,
            micro_batch_size=micro_batch_size,
            order=micro_batch_size,
        ),
    )


@pytest.mark.parametrize("aggregation", ["seq_mean_token_mean", "token_mean"])
def test_one_replica_with_a_single_long_sequence(
    pool: Any, models: dict[bool, StepCase], aggregation: str
) -> None:
    check(pool, 2, replace(models[False], aggregation=aggregation, long_first=True))


@pytest.mark.parametrize("method", ["sft", "opd"])
def test_other_methods(pool: Any, models: dict[bool, StepCase], method: str) -> None:
    case = replace(models[False], method=method, tp=2)
    if method == "sft":  # no engine behind its tokens
        assert step_cases.config_of(case).rollout.tis == "token"
    check(pool, 2, case)


def test_tensor_and_data_parallel_together(pool: Any, models: dict[bool, StepCase]) -> None:
    check(pool, 4, replace(models[True], tp=2, estimator="full_vocab"))


@pytest.mark.parametrize(("world", "tp"), [(1, 1), (2, 2), (2, 1)], ids=["one", "TP2", "DP2"])
def test_one_optimizer_step_equals_adamw(
    pool: Any, models: dict[bool, StepCase], world: int, tp: int
) -> None:
    case = replace(models[False], tp=tp)
    for got in pool(world).run(step_cases.step_errors, case, step_cases.expected(case)):
        assert got["norm"] > 1.0  # so that clipping acts
        assert got["grad_norm"] < 1e-5
        assert got["lr"] == pytest.approx(1e-3)
        assert got["weights"] < 1e-3  # in units of the learning rate


@pytest.mark.parametrize("estimator", ["sampled", "full_vocab"])
@pytest.mark.parametrize(
    ("world", "tp", "rows"), [(1, 1, 2), (2, 2, 2), (2, 2, 1)], ids=["one", "TP2", "TP2-alone"]
)
def test_a_teacher_that_is_the_student_leaves_the_gate_closed(
    pool: Any, models: dict[bool, StepCase], world: int, tp: int, rows: int, estimator: str
) -> None:
    """One row a micro-batch: trained weights then agree with themselves to the bit."""
    case = replace(models[False], tp=tp, estimator=estimator, micro_batch_size=rows)
    for got in pool(world).run(step_cases.self_teacher, case):
        assert got["open"] == 0.0
        assert got["gradient"] < 1e-6
        assert got["eps"] < 1e-5


@pytest.mark.parametrize(
    ("tp", "frozen", "estimator"),
    [
        (1, (), "sampled"),
        (2, (), "full_vocab"),
        (2, (("tensor_model_parallel_size", 1),), "sampled"),
    ],
    ids=["one, sampled", "TP2, full_vocab", "teacher TP1, sampled"],
)
def test_a_self_teacher_opens_no_gate_in_a_hundred_batches(
    pool: Any, models: dict[bool, StepCase], tp: int, frozen: Any, estimator: str
) -> None:
    case = replace(models[False], tp=tp, frozen=frozen, estimator=estimator)
    assert pool(tp).run(step_cases.open_gates_of_a_self_teacher, case, 100) == [0.0] * tp


@pytest.mark.parametrize(
    ("world", "layout"),
    [
        (1, {"micro_batch_size": 1}),
        (2, {}),
        (2, {"tp": 2}),
        (2, {"parallel": (("pipeline_model_parallel_size", 2),)}),
    ],
    ids=["micro-batches", "DP2", "TP2", "PP2"],
)
@pytest.mark.parametrize("estimator", ["sampled", "full_vocab"])
def test_a_method_that_needs_the_whole_batch_has_its_sums_in_every_layout(
    pool: Any, models: dict[bool, StepCase], world: int, layout: dict[str, Any], estimator: str
) -> None:
    case = replace(models[False], estimator=estimator, micro_batch_size=4)
    loss, expected = pool(1).run(step_cases.gradients_of_a_batch_method, case)[0]
    for got, gradients in pool(world).run(
        step_cases.gradients_of_a_batch_method, replace(case, **layout)
    ):
        assert got == pytest.approx(loss, rel=1e-5)
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name
