"""The conformance suite accepts right losses, rejects wrong ones, and says which is which."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgopd.__main__ import main
from megatron_sgopd.preflight.numerics import (
    adapter,
    bounds,
    checks,
    inputs,
    loss_checks,
    problem,
    rank,
)
from megatron_sgopd.preflight.numerics import ranks as processes
from megatron_sgopd.preflight.numerics.cases import ALL, Case, Rows, cases_of
from megatron_sgopd.preflight.numerics.outcome import Reading, Result, merge

ROOT = Path(__file__).resolve().parents[2]
PADDED = {
    "padded vocabulary",
    "padded vocabulary, bf16",
    "vocabulary 509",
    "vocabulary 3",
    "a rank of padding only",
}


def run(pool: Any, world: int, name: str, cases: list[Case] | None = None) -> list[Result]:
    """The cases on MODULE:NAME in the shared pool's ranks."""
    if cases is None:
        cases = cases_of(tuple(adapter.load(name).functions), world)
    answers = zip(*pool(world).run(rank.run_cases, name, cases), strict=True)
    return [
        merge(case.capability, case.name, world, answer)
        for case, answer in zip(cases, answers, strict=True)
    ]


def failed(results: list[Result]) -> dict[str, Result]:
    return {f"{r.capability}: {r.case}": r for r in results if not r.passed}


@pytest.mark.parametrize("world", [1, 2, 4])
def test_our_loss_passes_every_case(pool: Any, world: int) -> None:
    results = run(pool, world, adapter.OURS)
    assert {r.capability for r in results} == set(adapter.CAPABILITIES)
    assert not failed(results)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_a_plain_right_loss_passes_every_case(pool: Any, world: int) -> None:
    assert not failed(run(pool, world, "tests.support.wrong_losses:correct"))


def test_a_loss_may_return_its_sum_alone(pool: Any) -> None:
    results = run(pool, 2, "tests.support.wrong_losses:sum_only")
    assert len(results) > 20
    assert not failed(results)


# What one wrong line breaks: the quantity that is off in these cases, and the one that is not.
FAULTS = {
    "normaliser_without_gradient": ("gradient", "value"),
    "normaliser_held_constant": ("gradient", "value"),
    "local_sum_not_reduced": ("value", None),
    "gradient_of_local_sum": ("gradient", "value"),
    "gradient_reduced_twice": ("gradient", "value"),
    "bfloat16_arithmetic": ("value", None),
}
SHOWN_IN = {"fp32", "bf16", "fp16", "KL 1e-3", "KL 0.1", "KL 10", "rows shifted by ±1000"}
SHOWN_IN |= {"one-hot teacher", "vocabulary 32,768", "padded vocabulary"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_line_is_rejected_wherever_it_shows(pool: Any, fault: str) -> None:
    cases = [c for c in cases_of(("reverse_kl", "gated_reverse_kl"), 2) if c.check == "exact"]
    found = failed(run(pool, 2, f"tests.support.wrong_losses:{fault}", cases))
    assert {f"reverse_kl: {name}" for name in SHOWN_IN} <= set(found)
    assert "gated_reverse_kl: fp32" in found
    off, right = FAULTS[fault]
    readings = {r.quantity: r for r in found["reverse_kl: fp32"].readings}
    assert readings[off].share > 1000
    assert right is None or readings[right].passed


@pytest.mark.parametrize(
    ("fault", "world", "broken"),
    [
        ("padding_counted", 1, PADDED),
        ("padding_counted", 4, PADDED),
        ("merged_normaliser", 1, {"gate, near-certain tokens"}),
        ("merged_normaliser", 2, {"gate, near-certain tokens"}),
        ("writes_into_the_teacher", 1, {"inputs left as they were"}),
        ("random", 2, {"twice the same bits", "the same bits on all ranks"}),
    ],
)
def test_a_fault_of_one_kind_fails_the_cases_of_its_kind_alone(
    pool: Any, fault: str, world: int, broken: set[str]
) -> None:
    found = {
        r.case for r in failed(run(pool, world, f"tests.support.wrong_losses:{fault}")).values()
    }
    assert found
    assert found <= broken
    if fault != "padding_counted":
        assert found == broken


# -- what is exact, and the rows -------------------------------------------------------------------


@pytest.mark.parametrize("capability", ["reverse_kl", "forward_kl", "jsd", "nll"])
def test_closed_forms_equal_autograd_of_the_definitions(capability: str) -> None:
    x = inputs.draw(Rows(vocab=29, tokens=7))
    case = Case("", capability, beta=0.3)
    exact = checks.exact_of(case, x)
    student = x.student.clone().requires_grad_()
    p, q = student.log_softmax(-1), x.teacher.log_softmax(-1)
    mixture = torch.log(0.7 * p.exp() + 0.3 * q.exp())
    values = {
        "reverse_kl": (p.exp() * (p - q)).sum(-1),
        "forward_kl": (q.exp() * (q - p)).sum(-1),
        "jsd": 0.3 * (q.exp() * (q - mixture)).sum(-1) + 0.7 * (p.exp() * (p - mixture)).sum(-1),
        "nll": -p.gather(-1, x.tokens[:, None])[:, 0],
    }[capability]
    values.sum().backward()
    assert student.grad is not None
    assert (exact.values - values).abs().max() < 1e-13
    assert (exact.gradient - student.grad).abs().max() < 1e-13
    # fp32 itself is within the bounds, and they are not far above its errors.
    assert (exact.values_bound < 2e-5).all()


def test_top_k_and_a_tail_is_the_divergence_of_the_outcomes() -> None:
    x = inputs.draw(Rows(vocab=29, tokens=7))
    kept = torch.zeros_like(x.student, dtype=torch.bool)
    kept.scatter_(-1, x.teacher.topk(5).indices, True)
    student = x.student.clone().requires_grad_()

    def outcomes(logits: torch.Tensor) -> torch.Tensor:
        p = logits.softmax(-1)
        best = p.gather(-1, x.teacher.topk(5).indices)
        return torch.cat([best, (p * ~kept).sum(-1, keepdim=True)], -1).log()

    p, q = outcomes(student), outcomes(x.teacher)
    tails = [bounds.with_tail(bounds.softmax(m), kept) for m in (x.student, x.teacher)]
    for exact, values in (
        (bounds.reverse_kl(*tails), (p.exp() * (p - q)).sum(-1)),
        (bounds.forward_kl(*tails), (q.exp() * (q - p)).sum(-1)),
    ):
        student.grad = None
        values.sum().backward(retain_graph=True)
        assert student.grad is not None
        assert (exact.values - values).abs().max() < 1e-13
        assert (exact.gradient - student.grad).abs().max() < 1e-13


LOSS_CASES = [c for c in ALL if c.loss is not None and c.rows.dtype == "float32"]


def test_closed_forms_of_the_loss_equal_the_plain_reference() -> None:
    for case in LOSS_CASES:
        p = problem.problem_of(case, inputs.draw(case.rows))
        weight, lam, additive = (c.double() for c in p.coefficients(p.statistics()))
        form = loss_checks.sampled if p.loss.estimator == "sampled" else loss_checks.full
        per_logit = (p.scale * p.inputs.mask)[:, None] / p.loss.temperature
        gradient = form(p, weight, lam, additive).gradient * per_logit
        assert (gradient - loss_checks.reference_gradient(p)).abs().max() < 1e-9, case.name


def test_no_gate_of_a_case_is_a_tie_that_rounding_decides() -> None:
    for case in ALL:
        if case.rows.near_certain or case.capability not in (
            "gated_reverse_kl",
            "distillation_loss",
        ):
            continue
        x = inputs.draw(case.rows)
        assert checks.log_ratio(x).abs().min() > 1e-4, case.full_name
        if case.loss is not None and case.loss.candidate:
            p = problem.problem_of(case, x)
            a2 = p.softmax("teacher").log_p - p.softmax("student").log_p
            assert a2[a2 != 0].abs().min() > 1e-5, case.full_name


@pytest.mark.parametrize("kl", [1e-3, 0.1, 1.0, 10.0])
def test_rows_have_the_divergence_that_they_are_drawn_for(kl: float) -> None:
    x = inputs.draw(Rows(kl=kl))
    exact = checks.exact_of(Case("", "reverse_kl"), x)
    assert exact.values == pytest.approx([kl] * 24, rel=1e-3)


def test_near_certain_rows_are_so() -> None:
    ratio = checks.log_ratio(inputs.draw(Rows(tokens=2000, vocab=64, near_certain=True)))
    assert 1e-6 < ratio.abs().median() < 1e-4


def test_nan_and_a_bound_of_zero() -> None:
    assert not Reading("value", math.nan, 1.0).passed
    assert Reading("value", 0.0, 0.0).passed
    assert not Reading("value", 1e-30, 0.0).passed
    reading = checks.worst("value", torch.tensor([1.0, math.nan]), torch.tensor([2.0, 2.0]))
    assert math.isnan(reading.error)


# -- the ranks and the command ---------------------------------------------------------------------


def test_a_rank_in_trouble_is_an_outcome_and_the_next_case_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "CASE_S", 2.0)
    monkeypatch.setattr(processes, "GRACE_S", 0.5)

    def case(vocab: int) -> Case:
        return Case("", "reverse_kl", rows=Rows(vocab=vocab, tokens=2))

    with processes.ranks(2, "tests.support.wrong_losses:trouble") as started:
        assert [a.failure for a in started.run(case(22))] == ["", ""]
        assert started.run(case(20)) == "rank 0 gave no answer in 2 s"
        assert started.run(case(16)) == "rank 1: RuntimeError: one rank alone"
        assert [a.failure for a in started.run(case(22))] == ["", ""]
        assert "rank 1 died" in str(started.run(case(18)))


def sgopd(*arguments: str) -> subprocess.CompletedProcess[str]:
    probe = (
        "import sys, atexit; "
        "atexit.register(lambda: print('loaded torch:', 'torch' in sys.modules)); "
        "from megatron_sgopd.__main__ import main; sys.exit(main())"
    )
    return subprocess.run(
        [sys.executable, "-c", probe, *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_the_command_tells_a_table_and_exits_1_for_a_failure(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    name = "tests.support.wrong_losses:padding_counted"
    result = sgopd("doctor", "--numerics", "--function", name, "--world", "1", "--json", str(out))
    assert result.returncode == 1, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == name
    assert any(line.split()[:3] == ["padded", "vocabulary", "FAIL"] for line in lines)
    assert any(line.split()[:3] == ["fp32", "ok", "value"] for line in lines)
    assert any(line.startswith("FAILED: 4 of ") for line in lines)
    told = json.loads(out.read_text())
    assert (told["function"], told["passed"]) == (name, False)
    assert told["versions"]["torch"] == torch.__version__
    wrong = {r["case"] for r in told["results"] if not r["passed"]}
    assert wrong == {"padded vocabulary", "padded vocabulary, bf16", "vocabulary 3"}
    one = next(r for r in told["results"] if r["case"] == "KL 10")
    assert set(one) == {"capability", "case", "tp", "passed", "failure", "readings"}
    assert 0 < one["readings"][0]["error"] < one["readings"][0]["bound"]


def test_the_command_exits_0_when_all_passed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--numerics", "--function", "tests.support.wrong_losses:sum_only", "--world", "1"]
    assert main(["doctor", *arguments]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "ok: 28 cases at TP 1"


MISTAKES = {
    "not a name": (["--function", "my_losses"], "--function is 'my_losses'; it wants MODULE:NAME"),
    "no world": (["--world", "1,3"], "--world is '1,3'; it wants numbers of 1, 2, 4, 8"),
    "no number": (["--world", "two"], "--world is 'two'"),
    "no folder": (
        ["--json", "nowhere/x.json"],
        "--json nowhere/x.json: a file in a folder that is there is wanted",
    ),
    "a recipe": (["recipes/demo/sg_opd.yaml"], "takes no recipe"),
    "both": (["--parallel"], "not both"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_without_torch(
    mistake: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, words = MISTAKES[mistake]
    monkeypatch.setattr(adapter, "load", lambda name: pytest.fail("imported"))
    assert main(["doctor", "--numerics", *arguments]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert told.startswith("sgopd: ")
    assert words in told


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "RECIPE"),
        (["--world", "2"], "--world goes with"),
        (["--json", "x"], "--json goes with"),
    ],
)
def test_doctor_without_numerics_wants_a_recipe(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", *arguments]) == 2
    assert words in capsys.readouterr().err


class NeedsMore:
    needs = ("a_module_that_is_not_there",)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:loss", "cannot import no_such_module: ModuleNotFoundError"),
        ("tests.support.wrong_losses:nothing", "tests.support.wrong_losses has no 'nothing'"),
        (
            "tests.support.wrong_losses:Correct.dtype",
            "neither a function nor an object with one of",
        ),
        (
            "tests.preflight.test_numerics:NeedsMore",
            "needs a_module_that_is_not_there, not installed here",
        ),
        ("megatron_sgopd.preflight.numerics.peers:trl", "needs trl, not installed here"),
    ],
)
def test_what_cannot_be_tried_is_one_line(
    name: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--numerics", "--function", name]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert words in told


def test_others_losses_are_named_and_their_groups_known() -> None:
    from megatron_sgopd.preflight.numerics import peers

    assert peers.trl.worlds == (1,)
    # megatron-core is a requirement
    found = adapter.load("megatron_sgopd.preflight.numerics.peers:megatron")
    assert (set(found.functions), found.worlds) == ({"nll"}, adapter.WORLDS)
