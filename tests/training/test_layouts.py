"""Every layout gives the numbers of one rank: the formula in float64, parameter by parameter.

The measure of an error is max|d| / max|ref| per parameter. `make test LONG=1` takes every
combination of estimator, aggregation, heads and seed; the short form lets the seeds choose.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest

from tests.support import matrix, step_cases
from tests.support.matrix import ROWS, Row
from tests.support.step_cases import StepCase

TOLERANCE = 1e-5
LONG = os.environ.get("LONG", "0") not in ("", "0")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, StepCase]:
    return matrix.make_models(tmp_path_factory.mktemp("models"))


def gradient_errors(pool: Any, world: int, case: StepCase) -> list[dict[str, Any]]:
    return list(pool(world).run(step_cases.gradient_errors, case, step_cases.expected(case)))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.world}: {row.name}")
def test_loss_gradients_and_step_equal_one_rank(
    pool: Any, models: dict[bool, StepCase], row: Row
) -> None:
    number = ROWS.index(row)
    for tied, problem in matrix.problems(number, long=LONG):
        case = row.case(models, tied, **problem)
        for got in gradient_errors(pool, row.world, case):
            assert not got["missing"]
            assert got["loss"] < TOLERANCE, problem
            worst = max(got["gradients"], key=got["gradients"].get)
            assert got["gradients"][worst] < TOLERANCE, (worst, tied, problem)
            assert got["frozen_gradients"] == 0
        if not LONG and problem["seed"] != matrix.SEEDS[number % len(matrix.SEEDS)]:
            continue
        for got in pool(row.world).run(step_cases.step_errors, case, step_cases.expected(case)):
            assert got["norm"] > 1.0, "so that clipping acts"
            assert got["grad_norm"] < TOLERANCE
            assert got["lr"] == pytest.approx(1e-3)
            assert got["weights"] < 1e-3  # in units of the learning rate
            assert got["copies_differ"] == 0.0, "a tied embedding is one weight on two stages"


def named(name: str) -> Row:
    return next(row for row in ROWS if row.name == name)


def test_the_flash_kernel_is_less_exact(pool: Any, models: dict[bool, StepCase]) -> None:
    """Why the matrix is measured with the plain kernel; what a CPU run really computes with."""
    case = named("one rank").case(models, True, seed=2)
    plain, flash = (
        max(got["gradients"].values())
        for f in (False, True)
        for got in gradient_errors(pool, 1, replace(case, flash=f))
    )
    assert plain < TOLERANCE
    assert flash < 5 * TOLERANCE


@pytest.mark.parametrize(
    "name", ["TP2 + SP", "PP2 x VPP2", "CP2, packed", "TP2, teacher TP1", "PP2, teacher TP2"]
)
@pytest.mark.parametrize("estimator", matrix.ESTIMATORS)
def test_a_teacher_that_is_the_student_leaves_the_gate_closed(
    pool: Any, models: dict[bool, StepCase], name: str, estimator: str
) -> None:
    case = named(name).case(models, False, estimator=estimator)
    for got in pool(2).run(step_cases.self_teacher, case):
        assert got["open"] == 0.0
        assert got["gradient"] < 1e-6
        assert got["eps"] < 1e-5


@pytest.mark.parametrize("method", ["sft", "opd"])
@pytest.mark.parametrize("name", ["PP2 x VPP2", "CP2, packed", "TP2 + SP, packed"])
def test_other_methods(pool: Any, models: dict[bool, StepCase], name: str, method: str) -> None:
    case = named(name).case(models, True, method=method)
    for got in gradient_errors(pool, 2, case):
        assert max(got["gradients"].values()) < TOLERANCE


def test_gradients_add_up_in_fp32_if_asked(pool: Any, models: dict[bool, StepCase]) -> None:
    for in_fp32 in (True, False):
        row = matrix.row("bf16", 1, grad_reduce_in_fp32=in_fp32)
        case = replace(row.case(models, True), dtype="bfloat16", micro_batch_size=1)
        (error,) = pool(1).run(step_cases.repeated_gradients, case, 64)
        assert (error < 1e-6) if in_fp32 else (error > 1e-3)


def test_fewer_rollouts_than_interleaved_stages_ask_for(
    pool: Any, models: dict[bool, StepCase]
) -> None:
    """Nine micro-batches on two stages: a tenth, of padding, keeps Megatron's schedule going."""
    for packed in (None, 70):
        row = matrix.row("odd", 2, pp=2, vpp=2, packed=packed)
        case = replace(row.case(models, False), micro_batch_size=3)
        for got in gradient_errors(pool, 2, case):
            assert max(got["gradients"].values()) < TOLERANCE
