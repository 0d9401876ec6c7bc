"""The bench: its rows, its counts, and that a baseline which is not installed is named."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgopd import sgopd
from megatron_sgopd.bench import measure, plain
from megatron_sgopd.bench.cases import Case, cases
from megatron_sgopd.bench.inputs import Batch, Student, draw
from megatron_sgopd.bench.job import Job
from megatron_sgopd.bench.plots import plot
from megatron_sgopd.bench.processes import ChildFailed, isolated, on_ranks
from megatron_sgopd.bench.variants import Variant, our_variants
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.vocab_parallel.reference import (
    ReferenceStatistics,
    distillation_loss_reference,
)

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = (
    "time_ratio_to_plain",
    "extra_memory_shards",
    "collectives_forward",
    "collectives_backward",
    "gradient_rel_error",
    "tokens",
    "vocab",
    "tp",
)
WORDS = ("name", "form", "dtype", "device", "allocator", "objective")
FP32_ERROR = 1e-5  # well above what any form here reaches, far below bf16's 1e-3
PEERS = ("TRL", "ModelOpt", "Liger")  # not in the trainer's environment


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "megatron_sgopd", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, Any]]]:
    """What the small form prints, and its rows; one allocator and one dtype, for time's sake."""
    path = tmp_path_factory.mktemp("bench") / "rows.json"
    result = bench("kl", "--small", "--only=fp32", "--allocator=reuse", f"--json={path}")
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout, json.loads(path.read_text())


def test_rows_have_the_documented_keys(small: tuple[str, list[dict[str, Any]]]):
    _, rows = small
    assert len(rows) > 20
    for row in rows:
        assert all(isinstance(row[key], str) for key in WORDS), row
        assert all(isinstance(row[key], int | float) for key in NUMBERS), row
        assert isinstance(row["ours"], bool)
        if not row["ours"]:
            assert all(row[key] for key in ("package", "version", "module")), row
    assert {row["form"] for row in rows} == {"logits", "sampled", "fused"}
    assert {row["objective"] for row in rows if row["ours"]} >= {
        "reverse_kl",
        "gated_reverse_kl",
        "candidate",
        "sampled",
        "forward_kl",
        "jsd",
    }
    assert {(row["dtype"], row["device"], row["allocator"]) for row in rows} == {
        ("fp32", "cpu", "reuse")
    }
    assert {row["tp"] for row in rows} == {1, 2}


def test_figures_are_possible_ones(small: tuple[str, list[dict[str, Any]]]):
    _, rows = small
    for row in rows:
        assert 0 < row["time_ratio_to_plain"] < math.inf
        assert row["extra_memory_shards"] >= 0
        is_bf16_inside = "fused_vocab_parallel" in row.get("module", "")
        assert row["gradient_rel_error"] < (1e-2 if is_bf16_inside else FP32_ERROR), row
        if row["name"] == "plain":
            assert row["time_ratio_to_plain"] == 1.0
        assert "time_ratio_to" in row or not row["ours"]


def test_our_collectives(small: tuple[str, list[dict[str, Any]]]):
    _, rows = small
    found = {
        (row["tp"], row["collectives_forward"], row["collectives_backward"])
        for row in rows
        if row["ours"]
    }
    assert found == {(1, 0, 0), (2, 1, 0)}
    megatron = [row for row in rows if row.get("package") == "megatron-core" and row["tp"] == 2]
    assert [(r["collectives_forward"], r["collectives_backward"]) for r in megatron] == [(3, 0)]


def test_a_missing_baseline_is_named_and_left_out(small: tuple[str, list[dict[str, Any]]]):
    text, rows = small
    packages = {row["package"] for row in rows if "package" in row}
    for peer, package in zip(PEERS, ("trl", "nvidia-modelopt", "liger-kernel"), strict=True):
        is_named = f"left out: {peer}" in text
        assert is_named != (package in packages), text
    assert ("make bench-env" in text) == ("left out" in text)
    assert "logits reverse_kl 64x2048 fp32 tp1, allocator reuse" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["kl", "--only", "qlora"], "--only 'qlora' matches none"),
        (["kl", "--rounds", "0"], "'0' is no number of rounds"),
        (["kl", "--shapes", "512"], "'512' is no shape; wanted TxV"),
        (["kl", "--json", "no/such/folder/x.json"], "cannot be written"),
        (["kl", "--only", "tp2", "--device", "cuda"], "--only 'tp2' matches none"),
        (["plot", "no-such.json", "--out", "."], "no-such.json cannot be read"),
    ],
)
def test_mistakes_are_refused(arguments: list[str], words: str):
    result = bench(*arguments)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr


def test_default_cases_are_the_documented_ones():
    found = cases()
    assert {(c.tokens, c.vocab) for c in found} == {(512, 32768), (2048, 32768), (512, 151936)}
    for shape in ((512, 32768), (2048, 32768), (512, 151936)):
        for dtype in ("fp32", "bf16"):
            here = {
                (c.form, c.objective)
                for c in found
                if ((c.tokens, c.vocab), c.dtype, c.tp) == (shape, dtype, 1)
            }
            assert here >= {
                ("logits", "reverse_kl"),
                ("logits", "gated_reverse_kl"),
                ("sampled", "sampled"),
                ("fused", "reverse_kl"),
            }
    assert {(c.tokens, c.vocab) for c in found if c.tp == 2} == {(512, 32768)}
    assert len({c.label for c in found}) == len(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_missing_is_refused():
    result = bench("kl", "--device=cuda", "--small", "--only=jsd")
    assert result.returncode == 2
    assert result.stderr.startswith("sgopd bench: --device cuda") and "no GPU" in result.stderr


def test_a_job_survives_its_pipe():
    job = Job(cases(small=True), "cpu", "reuse", 3, math.inf, True)
    assert Job.from_json(job.to_json()) == job


# -- what is measured is the objective that it says ------------------------------------------------


def small_case(objective: str, form: str = "logits") -> Case:
    return Case(form, objective, 12, 96, "fp32", 1, 16)


@pytest.mark.parametrize("objective", ["reverse_kl", "gated_reverse_kl", "candidate", "sampled"])
def test_plain_objectives_are_the_references(objective: str):
    case = small_case(objective, "sampled" if objective == "sampled" else "logits")
    batch = draw(case, "cpu")
    method = sgopd.coefficients("sg_opd" if objective == "gated_reverse_kl" else "opd")

    def coefficients(stats: ReferenceStatistics) -> tuple[torch.Tensor, ...]:
        return method(stats, batch.outcome)

    def wide(rows: Any) -> Any:
        return None if rows is None else rows.double()

    student = wide(batch.student).requires_grad_()
    teacher = wide(batch.teacher)
    if objective == "sampled":  # logits whose log-probs of the sampled tokens are the given ones
        p = batch.teacher_logprobs.double().exp()
        rest = ((1 - p) / (case.vocab - 1)).log()
        teacher = rest[:, None].expand(-1, case.vocab).clone()
        teacher.scatter_(-1, batch.tokens[:, None], batch.teacher_logprobs.double()[:, None])
    options: dict[str, Any] = {"estimator": "sampled" if objective == "sampled" else "full_vocab"}
    if objective == "candidate":
        a1 = batch.advantages.double()
        options["candidate_lambda"] = lambda a2, i: sgopd.candidate_lambda(a1[i, None], a2)
    distillation_loss_reference(
        student,
        teacher,
        reference=wide(batch.reference),
        tokens=batch.tokens,
        mask=batch.mask,
        coefficients=coefficients,
        **options,
    ).backward()
    (exact,) = measure.exact_gradients(case, batch)
    torch.testing.assert_close(exact, student.grad, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("beta", [1e-4, 1 - 1e-4])
def test_the_jsd_tends_to_a_kl_at_either_end(beta: float):
    batch = draw(small_case("jsd"), "cpu")
    wide = replace(batch, student=batch.student.double(), teacher=batch.teacher.double())
    expected = (plain.forward_kl if beta < 0.5 else plain.reverse_kl)(wide.student, wide)
    found = plain.jsd(wide.student, wide, beta) / min(beta, 1 - beta)
    assert float(found) == pytest.approx(float(expected), rel=1e-2)


def test_the_fused_gradients_are_those_of_autograd():
    case = small_case("reverse_kl", "fused")
    batch = draw(case, "cpu")
    hidden, head = (x.double().requires_grad_() for x in batch.student)
    teacher = batch.teacher[0].double() @ batch.teacher[1].double().T
    plain.reverse_kl(hidden @ head.T, replace(batch, teacher=teacher)).backward()
    found = measure.exact_gradients(case, batch)
    torch.testing.assert_close(found, [hidden.grad, head.grad])


def test_errors_of_variants():
    """A gradient that is wrong by one part in a hundred is found to be."""
    case = small_case("reverse_kl")
    batch = draw(case, "cpu")

    def wrong(student: Any, batch: Batch) -> torch.Tensor:
        return 1.01 * plain.loss(case, student, batch)

    def mean(student: Any, batch: Batch) -> torch.Tensor:
        return plain.loss(case, student, batch) / len(batch.tokens)

    exact = measure.exact_gradients(case, batch)

    def error(variant: Variant) -> float:
        found = isolated(lambda: measure.once(variant, batch, exact))
        assert (found["collectives_forward"], found["collectives_backward"]) == (0, 0)
        return found["gradient_rel_error"]

    assert error(Variant("wrong", wrong)) == pytest.approx(0.01, rel=1e-2)
    assert error(Variant("mean", mean, is_mean=True)) < FP32_ERROR
    assert all(error(variant) < FP32_ERROR for variant in our_variants(case))


def test_memory_of_a_known_allocation():
    case = Case("logits", "reverse_kl", 64, 2048, "fp32", 1, 0)
    batch = draw(case, "cpu")
    mebibytes = 24

    def allocates(student: Any, batch: Batch) -> torch.Tensor:
        block = torch.ones(mebibytes << 18)  # fp32
        return student[0, 0] * block[-1]

    found = isolated(lambda: measure.once(Variant("allocates", allocates), batch, None))
    extra = found["extra_bytes"] - case.shard_bytes  # the gradient is one shard
    assert extra / (1 << 20) == pytest.approx(mebibytes, abs=1.5)


def test_a_variant_may_write_over_its_input():
    rows = torch.zeros(2, 3)
    student = Student(rows)
    handed = student.rows()
    assert isinstance(handed, torch.Tensor) and not handed.is_leaf

    class Overwrites(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            x += 5.0
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return torch.full((2, 3), 7.0)

    Overwrites.apply(handed).backward()
    assert rows.eq(5).all() and student.gradients()[0].eq(7).all()
    student.restore(torch.ones(2, 3))
    assert rows.eq(1).all()


def test_ratios_are_medians_of_rounds():
    assert measure.time_ratio([1.0, 9.0, 4.0], [2.0, 3.0, 4.0]) == 1.0


def test_a_childs_failure_reaches_the_parent():
    with pytest.raises(ChildFailed, match="ZeroDivisionError"):
        isolated(lambda: 1 // 0)
    assert on_ranks(2, lambda: torch.distributed.get_rank()) == [0, 1]


# -- figures ---------------------------------------------------------------------------------------


def drawn_row(name: str, tokens: int, tp: int, milliseconds: float) -> dict[str, Any]:
    return {
        "name": name,
        "ours": name == "ours",
        "form": "logits",
        "objective": "reverse_kl",
        "dtype": "fp32",
        "tokens": tokens,
        "vocab": 2048,
        "tp": tp,
        "device": "cpu",
        "allocator": "default",
        "time_ms": milliseconds,
        "extra_memory_shards": 0.5,
    }


def test_plots_draw_what_varies(tmp_path: Path):
    rows = [
        drawn_row(name, tokens, tp, 1.0 + tokens)
        for name in ("plain", "ours")
        for tokens, tp in ((64, 1), (128, 1), (256, 1), (64, 2))
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    paths = plot(file, tmp_path)
    assert [path.name for path in paths] == ["bench_tokens.svg", "bench_tp.svg"]
    text = paths[0].read_text()
    assert all(word in text for word in ("plain", "ours", "256", "vocabulary 2,048"))
    assert all(path.stat().st_size < 40_000 for path in paths)
    file.write_text(json.dumps(rows[:1]))
    with pytest.raises(ConfigError, match="measure more shapes with --shapes"):
        plot(file, tmp_path)
