"""The loss on sharded logits against gathered float64: values, gradients, collectives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_sgopd import sgopd
from megatron_sgopd.vocab_parallel import distillation_loss, sampled_logprobs
from tests.support import vocab_cases
from tests.support.vocab_cases import Case

WORLDS = (1, 2, 4)
CASES = [
    Case(),
    Case(estimator="full_vocab"),
    Case(estimator="full_vocab", temperature=0.7, as_hidden=True),
    Case(as_hidden=True, temperature=1.3),
    Case(estimator="full_vocab", method="exopd"),
    Case(estimator="full_vocab", method="opd"),
    Case(estimator="full_vocab", candidate=True),
    Case(estimator="full_vocab", candidate=True, as_hidden=True, temperature=0.9),
    Case(vocab=3),  # with 4 ranks one holds padding only
    Case(vocab=5, estimator="full_vocab", as_hidden=True),
    Case(method="opdvr"),
    Case(method="sft"),
    Case(sliced=True, overwrite=True),
    Case(estimator="full_vocab", sliced=True, overwrite=True, temperature=0.8),
    Case(estimator="full_vocab", sliced=True, student_as_hidden=True, as_hidden=True),
    Case(estimator="full_vocab", student_as_hidden=True, as_hidden=True, temperature=1.2),
    Case(sliced=True, student_as_hidden=True, as_hidden=True, temperature=1.2),
    Case(estimator="full_vocab", divergence="forward_kl"),
    Case(estimator="full_vocab", divergence="forward_kl", sliced=True, student_as_hidden=True),
    Case(estimator="full_vocab", divergence="jsd", beta=0.3, temperature=0.8),
    Case(estimator="full_vocab", divergence="jsd", beta=0.9, method="opd"),
    Case(estimator="full_vocab", divergence="jsd", sliced=True, student_as_hidden=True),
    Case(estimator="full_vocab", divergence="jsd", beta=0.0),
    Case(estimator="full_vocab", divergence="jsd", beta=1.0),
    Case(estimator="full_vocab", method="opd", top_k=5),
    Case(estimator="full_vocab", method="opd", top_k=5, temperature=0.7, student_as_hidden=True),
    Case(estimator="full_vocab", method="opd", top_k=4, divergence="forward_kl", vocab=5),
    Case(estimator="full_vocab", method="opd", top_k=50, divergence="jsd"),  # no tail is left
]


def label(case: Case) -> str:
    flags = [case.method, case.estimator, f"v{case.vocab}", case.dtype]
    flags += [case.divergence] if case.divergence != "reverse_kl" else []
    flags += [f"beta{case.beta}"] if case.divergence == "jsd" else []
    flags += [f"top{case.top_k}"] if case.top_k else []
    flags += ["sliced"] * case.sliced + ["from-hidden"] * case.student_as_hidden
    flags += ["in-place"] * case.overwrite
    flags += ["hidden"] * case.as_hidden + ["candidate"] * case.candidate
    return "-".join([*flags, f"T{case.temperature}"])


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=label)
def test_values_and_gradients_equal_gathered_float64(pool: Any, world: int, case: Case) -> None:
    for got in pool(world).run(vocab_cases.compare, case):
        assert got["value"] < 1e-11
        assert got["gradient"] < 1e-10
        assert got["logprobs"] < 1e-10
        assert got["entropy"] < 1e-10
        assert got["masked"] == got["padding"] == 0.0


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("estimator", ["sampled", "full_vocab"])
def test_fp32_and_bf16_inputs_are_computed_in_fp32(pool: Any, estimator: str, seed: int) -> None:
    fp32 = Case(vocab=501, estimator=estimator, dtype="float32", seed=seed)
    for got in pool(2).run(vocab_cases.compare, fp32):
        assert got["value"] < 1e-5
        assert got["gradient"] < 1e-5
    bf16 = Case(vocab=501, estimator=estimator, dtype="bfloat16", seed=seed)
    for got in pool(2).run(vocab_cases.compare, bf16):
        # The inputs are bf16 on both sides; the gradient alone is rounded to bf16, whose 8 bits of
        # significand make the unit roundoff 2^-8.
        assert got["value"] < 1e-5
        assert got["logprobs"] < 1e-5
        assert got["gradient"] <= 2.0**-8


@pytest.mark.parametrize("world", [2, 4])
def test_one_collective_forward_none_backward(pool: Any, world: int) -> None:
    gather = [vocab_cases.GATHER]
    for got in pool(world).run(vocab_cases.compare, Case(as_hidden=True)):
        assert got["passes"] == gather * 2  # teacher and reference, each one scoring pass
        assert (got["forward"], got["backward"]) == (gather, [])
    full = Case(estimator="full_vocab", as_hidden=True, tokens=60, chunk_tokens=7)
    for got in pool(world).run(vocab_cases.compare, full):
        assert (got["forward"], got["backward"]) == (gather, [])
    candidate = Case(estimator="full_vocab", candidate=True)
    for got in pool(world).run(vocab_cases.compare, candidate):
        assert (got["forward"], got["backward"]) == (gather * 2, [])


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("estimator", ["sampled", "full_vocab"])
def test_gradcheck(pool: Any, world: int, estimator: str) -> None:
    assert all(pool(world).run(vocab_cases.gradcheck, estimator))


# -- properties, on one rank -----------------------------------------------------------------------


def rows(seed: int, tokens: int = 11, vocab: int = 29) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2.0 * torch.randn(tokens, vocab, generator=generator, dtype=torch.float64)


def run(
    student: torch.Tensor,
    teacher: torch.Tensor,
    reference: torch.Tensor | None,
    lam: float,
    estimator: str,
    tokens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    x = student.clone().requires_grad_()
    count = len(student)
    result = distillation_loss(
        x,
        teacher,
        reference=reference,
        tokens=torch.zeros(count, dtype=torch.long) if tokens is None else tokens,
        mask=torch.ones(count),
        vocab_size=student.shape[-1],
        coefficients=lambda s: (
            torch.ones_like(s.student_logprobs),
            torch.full_like(s.student_logprobs, lam),
            torch.zeros_like(s.student_logprobs),
        ),
        lambdas=(lam,),
        estimator=estimator,
    )
    result.loss.backward()
    assert x.grad is not None
    return result.token_losses, x.grad


@pytest.mark.parametrize("lam", [0.5, 1.0, 1.25, 1.8])
def test_reverse_kl_is_never_negative(lam: float) -> None:
    losses, _ = run(rows(0), rows(1), rows(2), lam, "full_vocab")
    assert (losses > 0).all()


@pytest.mark.parametrize("estimator", ["sampled", "full_vocab"])
@pytest.mark.parametrize(("lam", "has_reference"), [(1.0, False), (1.0, True), (1.8, True)])
def test_student_equal_to_teacher_has_no_gradient(
    estimator: str, lam: float, has_reference: bool
) -> None:
    same = rows(0)  # with lambda 1.8 the reference equals the teacher as well
    losses, gradient = run(same, same, same if has_reference else None, lam, estimator)
    assert losses.abs().max() < 1e-14
    assert gradient.abs().max() < 1e-14


def test_extrapolation_moves_a_student_that_equals_its_teacher() -> None:
    _, gradient = run(rows(0), rows(0), rows(1), 1.8, "full_vocab")
    assert gradient.abs().max() > 1e-3


@pytest.mark.parametrize("lam", [0.5, 1.0, 1.25, 1.8])
def test_full_vocab_gradient_is_the_expectation_of_sampled(lam: float) -> None:
    student, teacher, reference = rows(0), rows(1), rows(2)
    _, exact = run(student, teacher, reference, lam, "full_vocab")
    expected = torch.zeros_like(exact)
    probabilities = student.softmax(-1)
    for token in range(student.shape[-1]):
        every = torch.full((len(student),), token)
        _, gradient = run(student, teacher, reference, lam, "sampled", every)
        expected += probabilities[:, token, None] * gradient
    assert (exact - expected).abs().max() < 1e-13


def gated_gradients(a1: torch.Tensor, mode: str, token: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(gradient, probability of the token [T]) of the gated loss when `token` was sampled."""
    student, teacher, reference = rows(0), rows(1), rows(2)
    count = len(student)
    outcome = sgopd.Outcome(a1, a1 > 0, torch.zeros(count).bool())
    function = sgopd.coefficients("sg_opd")
    x = student.clone().requires_grad_()
    distillation_loss(
        x,
        teacher,
        reference=reference,
        tokens=torch.full((count,), token),
        mask=torch.ones(count),
        vocab_size=student.shape[-1],
        coefficients=lambda stats: function(stats, outcome),
        estimator="sampled" if mode == "sampled" else "full_vocab",
        candidate_lambda=(lambda a2, i: sgopd.candidate_lambda(a1[i, None], a2))
        if mode == "candidate"
        else None,
    ).loss.backward()
    assert x.grad is not None
    return x.grad, student.softmax(-1)[:, token]


def expectation(a1: torch.Tensor, mode: str) -> torch.Tensor:
    total = torch.zeros(11, 29, dtype=torch.float64)
    for token in range(29):
        gradient, probability = gated_gradients(a1, mode, token)
        total += probability[:, None] * gradient
    return total


def test_with_the_gate_candidate_is_the_expectation_of_sampled_and_row_is_not() -> None:
    # docs/method.md: with a1 independent of the token, `candidate` is the expected gated sampled
    # gradient; `row` is the gradient of a KL whose lambda the sampled token drew.
    a1 = torch.tensor([1.0, -1.0] * 5 + [1.0], dtype=torch.float64)
    sampled = expectation(a1, "sampled")
    candidate, _ = gated_gradients(a1, "candidate", 0)
    assert (candidate - sampled).abs().max() < 1e-12
    row = expectation(a1, "row")
    assert (row - sampled).norm() / sampled.norm() > 0.01


def test_row_gate_is_the_kl_of_the_lambda_the_sampled_token_drew() -> None:
    a1 = torch.ones(11, dtype=torch.float64)
    gradient, _ = gated_gradients(a1, "row", 4)
    student, teacher = rows(0).log_softmax(-1), rows(1).log_softmax(-1)
    open_ = (teacher - student)[:, 4] > 0
    assert 0 < open_.sum() < 11
    for lam, where in ((1.8, open_), (1.0, ~open_)):
        _, exact = run(rows(0), rows(1), rows(2), lam, "full_vocab")
        assert (gradient - exact)[where].abs().max() < 1e-14


def test_constant_shift_of_teacher_or_reference_changes_nothing() -> None:
    losses, gradient = run(rows(0), rows(1), rows(2), 1.8, "full_vocab")
    shifted, moved = run(rows(0), rows(1) + 50.0, rows(2) - 70.0, 1.8, "full_vocab")
    assert (losses - shifted).abs().max() < 1e-12
    assert (gradient - moved).abs().max() < 1e-13


def test_sign_of_the_log_ratio_survives_fp32() -> None:
    # Near-certain tokens: logit 28, -log p about 1e-4, so that T - S is of the order 1e-6.
    count, vocab = 4000, 50
    generator = torch.Generator().manual_seed(0)
    student = 14.9 + torch.randn(count, vocab, generator=generator, dtype=torch.float64)
    teacher = student + 0.2 * torch.randn(count, vocab, generator=generator, dtype=torch.float64)
    student[:, 0] = teacher[:, 0] = 28.0
    student, teacher = student.float(), teacher.float()
    kw: dict[str, Any] = {
        "tokens": torch.zeros(count, dtype=torch.long),
        "mask": torch.ones(count),
        "vocab_size": vocab,
    }
    got = sampled_logprobs(teacher, **kw) - sampled_logprobs(student, **kw)
    exact = sampled_logprobs(teacher.double(), **kw) - sampled_logprobs(student.double(), **kw)
    merged = (28.0 - teacher.logsumexp(-1)) - (28.0 - student.logsumexp(-1))

    def share_wrong(difference: torch.Tensor) -> float:
        return float((torch.sign(difference) != torch.sign(exact)).float().mean())

    assert share_wrong(got) < 0.03
    assert share_wrong(merged) > 3 * share_wrong(got)  # max + log sum in one number


def test_masked_tokens_cost_nothing_and_an_empty_mask_is_a_zero_loss() -> None:
    x = rows(0).requires_grad_()
    result = distillation_loss(
        x,
        rows(1),
        tokens=torch.zeros(11, dtype=torch.long),
        mask=torch.zeros(11),
        vocab_size=29,
        coefficients=lambda s: sgopd.coefficients("opd")(
            s, sgopd.Outcome(torch.zeros(11), torch.zeros(11).bool(), torch.zeros(11).bool())
        ),
        lambdas=(1.0,),
        estimator="full_vocab",
    )
    result.loss.backward()
    assert x.grad is not None
    assert result.loss.item() == 0.0
    assert x.grad.abs().sum() == 0.0


def test_student_as_hidden_and_head_gets_both_gradients() -> None:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(11, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(29, 6, generator=generator, dtype=torch.float64).requires_grad_()
    logits = (hidden @ head.T).detach().requires_grad_()
    for student in ((hidden, head), logits):
        distillation_loss(
            student,
            rows(1),
            tokens=torch.arange(11),
            mask=torch.ones(11),
            vocab_size=29,
            coefficients=lambda s: (
                torch.ones_like(s.student_logprobs),
                torch.ones_like(s.student_logprobs),
                torch.zeros_like(s.student_logprobs),
            ),
            lambdas=(1.0,),
            estimator="full_vocab",
        ).loss.backward()
    assert logits.grad is not None and hidden.grad is not None and head.grad is not None
    assert torch.allclose(hidden.grad, logits.grad @ head, atol=1e-13)
    assert torch.allclose(head.grad, logits.grad.T @ hidden, atol=1e-13)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "full"}, "estimator is 'full'; allowed are 'sampled' and 'full_vocab'"),
        ({"lambdas": (1.0, 1.5, 1.8)}, "one or two lambdas are allowed, got 3"),
        ({"lambdas": (1.0, 1.8), "reference": None}, "need a reference and none was given"),
        ({"teacher": torch.zeros(11)}, r"full_vocab needs the teacher's rows.*got log-probs"),
        ({"teacher": torch.zeros(11, 30)}, "teacher holds 30 vocabulary rows.*student 29"),
        ({"vocab_size": 31}, "29 rows, fewer than vocab_size 31"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"temperature": float("nan")}, "temperature is nan; a finite one above 0"),
        ({"lambdas": (1.0, 1.7)}, "gave lambda 1.8.*none of `lambdas`"),
        ({"lambdas": 1.8}, "lambdas is 1.8; a sequence of one or two"),
        ({"lambdas": ("high",)}, "a lambda is 'high'; a number is wanted"),
        ({"teacher": rows(1, tokens=13)}, r"teacher is \[13, 29\]; wanted is .* 11 tokens"),
        ({"teacher": (torch.zeros(11, 4), torch.zeros(29, 5))}, r"\[11, 4\] and \[29, 5\]; wanted"),
        ({"tokens": torch.zeros(1, 11).long()}, r"tokens is \[1, 11\]; \[T\] is wanted"),
        ({"tokens": torch.full((11,), -100)}, "a token to train on is -100; ids from 0 to 28"),
        ({"tokens": torch.full((11,), 29)}, "a token to train on is 29; ids from 0 to 28"),
        ({"mask": torch.ones(9)}, r"mask is \[9\]; \[T\] is wanted, with 11 tokens"),
        ({"token_scale": torch.ones(1)}, r"token_scale is \[1\]; \[T\] is wanted"),
        ({"lambdas": (1.0, torch.full((3,), 1.8))}, r"lambdas\[1\] is \[3\]; \[T\] is wanted"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"chunk_tokens": -5}, "chunk_tokens is -5"),
        ({"top_k": True, "lambdas": (1.0,)}, "top_k is True; at least one token"),
        ({"divergence": "jsd", "beta": 1e-8}, "beta is 1e-08, which fp32 hardly tells"),
        (
            {"estimator": "sampled", "candidate_lambda": lambda a2, i: a2},
            "candidate_lambda was given with estimator 'sampled'",
        ),
        (
            {"coefficients": lambda s: (torch.ones(1), torch.ones(11), 0.0)},
            r"\(weight, lambda, additive\) are \[1\], \[11\] and 0.0; tensors \[11\] are wanted",
        ),
    ],
)
def test_errors_name_both_sides(change: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {
        "teacher": rows(1),
        "reference": rows(2),
        "tokens": torch.zeros(11, dtype=torch.long),
        "mask": torch.ones(11),
        "vocab_size": 29,
        "coefficients": lambda s: (
            torch.ones_like(s.student_logprobs),
            torch.full_like(s.student_logprobs, 1.8),
            torch.zeros_like(s.student_logprobs),
        ),
        "lambdas": (1.0, 1.8),
        "estimator": "full_vocab",
    } | change
    with pytest.raises(ValueError, match=message):
        distillation_loss(rows(0), options.pop("teacher"), **options)
