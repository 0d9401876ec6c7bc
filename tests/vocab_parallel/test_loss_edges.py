"""The loss where it is easily wrong: -inf, memory that is written over, slices, ties, limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.vocab_parallel import LossResult, distillation_loss, sampled_logprobs
from megatron_sgopd.vocab_parallel.reference import distillation_loss_reference
from tests.support import vocab_cases

T, V = 23, 41
OBJECTIVES: dict[str, dict[str, Any]] = {
    "sampled": {"estimator": "sampled"},
    "reverse_kl": {"estimator": "full_vocab"},
    "forward_kl": {"estimator": "full_vocab", "divergence": "forward_kl"},
    "jsd": {"estimator": "full_vocab", "divergence": "jsd", "beta": 0.3},
    "candidate": {
        "estimator": "full_vocab",
        "candidate_lambda": lambda a2, i: 1.0 + 0.8 * (a2 > 0),
    },
}


def rows(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2.0 * torch.randn(T, V, generator=generator, dtype=torch.float64)).to(dtype)


def outcome() -> sgopd.Outcome:
    a1 = torch.randn(T, generator=torch.Generator().manual_seed(9)).double()
    return sgopd.Outcome(a1, a1 > 0, torch.arange(T) % 6 == 0)


def options(**changes: Any) -> dict[str, Any]:
    return {
        "tokens": torch.arange(T),
        "mask": torch.arange(T) % 5 != 0,
        "vocab_size": V,
        "coefficients": sgopd.coefficients("sg_opd").for_batch(outcome()),
        "token_scale": torch.linspace(0.5, 1.5, T),
    } | changes


def loss_of(student: Any, teacher: Any, reference: Any, **changes: Any) -> LossResult:
    return distillation_loss(student, teacher, reference=reference, **options(**changes))


def by_autograd(student: Tensor, teacher: Tensor, reference: Tensor, **changes: Any) -> Any:
    """(value, gradient) of the plain form in float64."""
    x = student.double().clone().requires_grad_()
    given = options(**changes)
    del given["vocab_size"]
    loss = distillation_loss_reference(x, teacher.double(), reference=reference.double(), **given)
    loss.backward()
    return loss.detach(), x.grad


# -- -inf ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_columns_at_minus_infinity_in_all_models_leave_the_softmax(
    name: str, overwrite: bool
) -> None:
    models = [rows(i, torch.float32) for i in range(3)]
    kept = torch.arange(V) % 4 != 3
    tokens = kept.nonzero()[:, 0][:T] if kept.sum() >= T else torch.zeros(T, dtype=torch.long)
    positions = torch.cumsum(kept, 0) - 1
    cut = [m[:, kept] for m in models]
    for m in models:
        m[:, ~kept] = -torch.inf
    x = models[0].clone().requires_grad_()
    given = x * 1.0 if overwrite else x
    changes = OBJECTIVES[name]
    got = loss_of(given, *models[1:], tokens=tokens, overwrite_student=overwrite, **changes)
    got.loss.backward()
    value, gradient = by_autograd(*cut, tokens=positions[tokens], **changes)
    assert x.grad is not None
    assert abs(float(got.loss.detach()) - float(value)) < 1e-5 * abs(float(value))
    assert (x.grad[:, kept] - gradient).abs().max() < 1e-5 * gradient.abs().max()
    assert x.grad[:, ~kept].abs().max() == 0.0
    entropy = got.statistics.student_entropy
    assert entropy is not None and entropy.isfinite().all()


def test_the_students_own_minus_infinity_adds_nothing_to_reverse_kl() -> None:
    student, teacher, reference = (rows(i) for i in range(3))
    student[:, V - 1] = -torch.inf
    x = student.clone().requires_grad_()
    got = loss_of(x, teacher, reference, estimator="full_vocab")
    got.loss.backward()
    low = student.clone()
    low[:, V - 1] = -700.0
    value, gradient = by_autograd(low, teacher, reference, estimator="full_vocab")
    assert x.grad is not None
    assert abs(float(got.loss.detach()) - float(value)) < 1e-12
    assert (x.grad - gradient).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("name", "excluding", "message"),
    [
        ("reverse_kl", "teacher", "15 of 18 tokens have an infinite reverse KL"),
        ("candidate", "teacher", "15 of 18 tokens have an infinite gated reverse KL"),
        ("forward_kl", "student", "15 of 18 tokens have an infinite forward KL"),
    ],
)
def test_an_infinite_divergence_is_counted_and_refused(
    name: str, excluding: str, message: str
) -> None:
    # 18 tokens count, three of them by cross-entropy alone.
    models = {k: rows(i) for i, k in enumerate(("student", "teacher", "reference"))}
    models[excluding][:, V - 1] = -torch.inf
    with pytest.raises(ValueError, match=message):
        loss_of(*models.values(), **OBJECTIVES[name])


def test_a_reference_that_excludes_a_column_is_refused_only_where_it_counts() -> None:
    models = [rows(i) for i in range(3)]
    models[2][:, V - 1] = -torch.inf
    with pytest.raises(ValueError, match="infinite reverse KL"):
        loss_of(*models, estimator="full_vocab")  # some gates are open
    ones = torch.ones(T, dtype=torch.float64)
    closed = lambda stats: (ones, torch.zeros(T, dtype=torch.bool), 0.0 * ones)  # noqa: E731
    x = models[0].clone().requires_grad_()
    got = loss_of(x, *models[1:], estimator="full_vocab", coefficients=closed)
    got.loss.backward()
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("slices", [False, True])
@pytest.mark.parametrize("name", ["sampled", "reverse_kl", "forward_kl", "candidate"])
def test_a_token_of_weight_zero_adds_nothing_whatever_its_divergence(
    name: str, slices: bool
) -> None:
    models = [rows(i) for i in range(3)]
    finite = models[1].clone()
    excluding = models[0] if name == "forward_kl" else models[1]
    excluding[1, 1] = -torch.inf  # the second token's own
    weight = torch.ones(T, dtype=torch.float64)
    weight[1] = 0.0
    method = Fixed(weight) if slices else Fixed(weight).__call__
    gradients = []
    for teacher in (models[1], finite):
        x = models[0].clone().requires_grad_()
        given = x * 1.0
        got = loss_of(
            given, teacher, models[2], coefficients=method, overwrite_student=True,
            **OBJECTIVES[name],
        )  # fmt: skip
        got.loss.backward()
        assert got.loss.isfinite()
        assert x.grad is not None
        gradients.append(x.grad)
    assert gradients[0][1].abs().max() == 0.0
    assert torch.equal(*gradients)


class Fixed:
    """Coefficients of fixed weights, every gate closed, which can be asked about some tokens."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, stats: Any) -> tuple[Tensor, Tensor, Tensor]:
        none = torch.zeros_like(self.weight)
        return self.weight, none.bool(), none

    def select(self, places: Any) -> Fixed:
        return Fixed(self.weight[places])


OPD = {"estimator": "full_vocab", "lambdas": (1.0,)}


def opd() -> Any:
    return sgopd.coefficients("opd").for_batch(outcome())


def test_what_a_reference_excludes_does_not_count_where_lambda_is_one_per_token() -> None:
    models = [rows(i) for i in range(3)]
    plain = loss_of(*models[:2], None, coefficients=opd(), **OPD)
    models[2][:, V - 1] = -torch.inf
    x = models[0].clone().requires_grad_()
    ones = torch.ones(T, dtype=torch.float64)
    got = loss_of(x, *models[1:], coefficients=opd(), **OPD | {"lambdas": (ones,)})
    got.loss.backward()
    assert abs(float(got.loss.detach() - plain.loss)) < 1e-12
    assert x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("also_excluded", [False, True])
def test_the_candidate_gate_counts_a_reference_that_excludes_a_column_only_where_it_is_open(
    also_excluded: bool,
) -> None:
    models = [rows(i) for i in range(3)]
    if also_excluded:  # by all three: as before
        for m in models:
            m[:, 7] = -torch.inf
    models[2][:, V - 1] = -torch.inf
    kept = torch.arange(V) != 7 if also_excluded else torch.ones(V, dtype=torch.bool)
    tokens = torch.zeros(T, dtype=torch.long)
    full = {"estimator": "full_vocab", "tokens": tokens}
    closed = loss_of(*models, candidate_lambda=lambda a2, i: torch.ones_like(a2), **full)
    plain = loss_of(
        *(m[:, kept] for m in models[:2]), None, vocab_size=int(kept.sum()),
        coefficients=sgopd.coefficients("sg_opd", lambda_high=1.0).for_batch(outcome()),
        lambdas=(1.0,), **full,
    )  # fmt: skip
    assert abs(float(closed.loss - plain.loss)) < 1e-12
    with pytest.raises(ValueError, match="infinite gated reverse KL"):
        loss_of(*models, candidate_lambda=lambda a2, i: torch.full_like(a2, 1.8), **full)


@pytest.mark.parametrize("lam", [0.5, 1.8])
def test_jsd_of_an_extrapolated_target_leaves_out_what_teacher_and_reference_exclude(
    lam: float,
) -> None:
    models = [rows(i) for i in range(3)]
    low = [m.clone() for m in models]
    for m, value in ((models, -torch.inf), (low, -700.0)):
        m[1][:, 3] = m[2][:, 3] = value
    weight = torch.ones(T, dtype=torch.float64)
    same = lambda stats: (weight, lam * weight, 0.0 * weight)  # noqa: E731
    changes = OBJECTIVES["jsd"] | {"lambdas": (lam,), "coefficients": same}
    x = models[0].clone().requires_grad_()
    got = loss_of(x, *models[1:], **changes)
    got.loss.backward()
    value, gradient = by_autograd(*low, **changes)
    assert x.grad is not None
    assert abs(float(got.loss.detach() - value)) < 1e-10
    assert (x.grad - gradient).abs().max() < 1e-10


@pytest.mark.parametrize("excluding", ["student", "reference"])
def test_minus_infinity_in_given_logits_beside_hidden_states(excluding: str) -> None:
    """What is projected is scratch, but the pass over given logits may have to be taken again."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, 5, generator=generator, dtype=torch.float64)
    head = torch.randn(V, 5, generator=generator, dtype=torch.float64)
    given = rows(0)
    given[:, V - 1] = -torch.inf
    mine, theirs = hidden.clone().requires_grad_(), given.clone().requires_grad_()
    if excluding == "student":
        got = loss_of(theirs, (hidden, head), None, coefficients=opd(), **OPD)
        leaf, low = theirs, given.clone()
        low[:, V - 1] = -700.0
        whole = loss_of(low, hidden @ head.T, None, coefficients=opd(), **OPD)
    else:
        ones = torch.ones(T, dtype=torch.float64)
        closed = lambda stats: (ones, 0.0 * ones > 0, 0.0 * ones)  # noqa: E731
        got = loss_of((mine, head), rows(1), given, coefficients=closed, estimator="full_vocab")
        leaf = mine
        whole = loss_of(hidden @ head.T, rows(1), None, coefficients=closed, **OPD)
    got.loss.backward()
    assert abs(float(got.loss.detach() - whole.loss)) < 1e-10
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_log_probs_of_given_logits_leave_padding_out() -> None:
    x = rows(0)
    x[:, 30:] = 50.0
    tokens, mask = torch.arange(T), torch.ones(T)
    got = sampled_logprobs(x, tokens=tokens, mask=mask, vocab_size=30)
    right = x[:, :30].log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    assert (got - right).abs().max() < 1e-12


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("peak", [0.0, 10.0, 20.0, 40.0, 200.0, 1000.0])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
def test_top_k_of_a_confident_student(divergence: str, peak: float, temperature: float) -> None:
    """Its tail is nearly empty, and the forward KL's slope Q / P huge there."""
    k, beta = 4, 0.3
    student, teacher = rows(0, torch.float32), rows(1, torch.float32)
    student[:, 2] += peak
    x = student.double().requires_grad_()
    best = teacher.topk(k, -1).indices
    outcomes = []
    for z in (x, teacher.double()):
        logs = (z / temperature).log_softmax(-1)
        tail = logs.scatter(-1, best, -torch.inf).logsumexp(-1, keepdim=True)
        outcomes.append(torch.cat([logs.gather(-1, best), tail], -1))
    p, q = outcomes
    m = torch.logaddexp(p + torch.tensor(1 - beta).log(), q + torch.tensor(beta).log())
    value = {
        "forward_kl": (q.exp() * (q - p)).sum(),
        "reverse_kl": (p.exp() * (p - q)).sum(),
        "jsd": (beta * q.exp() * (q - m) + (1 - beta) * p.exp() * (p - m)).sum(),
    }[divergence]
    value.backward()
    y = student.clone().requires_grad_()
    got = loss_of(
        y, teacher, None, coefficients=opd_everywhere(), mask=torch.ones(T), token_scale=None,
        divergence=divergence, beta=beta, top_k=k, temperature=temperature, **OPD,
    )  # fmt: skip
    got.loss.backward()
    assert x.grad is not None and y.grad is not None
    assert (y.grad - x.grad).abs().max() < 1e-6 * max(float(x.grad.abs().max()), 1e-3)
    assert abs(float(got.loss.detach()) - float(value.detach())) < 1e-5 * (
        1 + float(value.detach())
    )


def opd_everywhere() -> Any:
    none = torch.zeros(T, dtype=torch.bool)
    return sgopd.coefficients("opd").for_batch(sgopd.Outcome(torch.ones(T), ~none, none))


def test_top_k_of_a_token_of_weight_zero_whose_divergence_is_infinite() -> None:
    x = rows(0).requires_grad_()
    teacher = rows(1)
    teacher[1, 3:] = -torch.inf
    weight = torch.ones(T, dtype=torch.float64)
    weight[1] = 0.0
    got = loss_of(x, teacher, None, coefficients=Fixed(weight), top_k=3, **OPD)
    got.loss.backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert x.grad[1].abs().max() == 0.0


@pytest.mark.parametrize("shift", [0.0, 100.0, 1000.0])
def test_a_half_precision_teacher_far_from_the_student(shift: float) -> None:
    """The student's logits are the first guess of the teacher's product, good or bad."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(T, 16, generator=generator).bfloat16()
    head = torch.randn(V, 16, generator=generator).bfloat16()
    exact = hidden.double() @ head.double().T
    got = loss_of(
        (exact + 1.0 + shift).float(), (hidden, head), None, coefficients=opd_everywhere(),
        lambdas=(1.0,), mask=torch.ones(T),
    )  # fmt: skip
    right = exact.log_softmax(-1).gather(1, torch.arange(T)[:, None])[:, 0]
    teacher = got.statistics.teacher_logprobs
    assert teacher is not None
    assert (teacher - right).abs().max() < 0.02


def test_jsd_is_finite_where_one_model_excludes_a_column() -> None:
    student, teacher = rows(0), rows(1)
    teacher[:, 3] = -torch.inf
    student[:, 4] = -torch.inf
    x = student.clone().requires_grad_()
    got = distillation_loss(
        x,
        teacher,
        **options(
            estimator="full_vocab",
            divergence="jsd",
            lambdas=(1.0,),
            coefficients=sgopd.coefficients("opd").for_batch(outcome()),
        ),
    )
    got.loss.backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert got.loss.isfinite()


# -- memory ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_written_over_the_logits_where_allowed(
    name: str, dtype: torch.dtype
) -> None:
    models = [rows(i, dtype) for i in range(3)]
    leaf, other = (models[0].clone().requires_grad_() for _ in range(2))
    logits = leaf * 1.0
    loss_of(logits, *models[1:], overwrite_student=True, **OBJECTIVES[name]).loss.backward()
    separate = other * 1.0
    loss_of(separate, *models[1:], **OBJECTIVES[name]).loss.backward()
    assert torch.equal(leaf.grad, other.grad)
    assert torch.equal(logits, leaf.grad)  # the memory of the logits holds it
    assert torch.equal(separate, models[0])  # by default they stay as they are


def test_nothing_is_written_without_gradients() -> None:
    models = [rows(i) for i in range(3)]
    for student in (models[0].clone(), models[0].clone().requires_grad_()):
        with torch.set_grad_enabled(not student.requires_grad):
            got = loss_of(student, *models[1:], overwrite_student=True, estimator="full_vocab")
        assert torch.equal(student.detach(), models[0])
        assert not got.loss.requires_grad


def test_a_second_backward_in_place_is_an_error_and_a_factor_is_not() -> None:
    models = [rows(i) for i in range(3)]
    gradients = []
    for factor in (1.0, 3.0):
        leaf = models[0].clone().requires_grad_()
        loss = factor * loss_of(leaf * 1.0, *models[1:], overwrite_student=True).loss
        loss.backward(retain_graph=True)
        gradients.append(leaf.grad)
        with pytest.raises(RuntimeError, match="backward was run through this loss already"):
            loss.backward()
    assert torch.allclose(3.0 * gradients[0], gradients[1], rtol=1e-14)


def test_overwritten_logits_that_autograd_still_needs_are_an_error() -> None:
    leaf = rows(0).requires_grad_()
    logits = leaf.exp()  # saves its result
    loss = loss_of(logits, rows(1), rows(2), overwrite_student=True).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- main_grad -------------------------------------------------------------------------------------


def head_and_hidden() -> tuple[Tensor, torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(T, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.nn.Parameter(torch.randn(V, 6, generator=generator, dtype=torch.float64))
    return hidden, head


def test_a_heads_main_grad_takes_its_gradient() -> None:
    hidden, head = head_and_hidden()
    loss_of((hidden, head), rows(1), rows(2)).loss.backward()
    ordinary, of_hidden = head.grad, hidden.grad
    hidden, head = head_and_hidden()
    head.main_grad = torch.ones(V, 6, dtype=torch.float64)
    with torch.no_grad():
        loss_of((hidden, head), rows(1), rows(2))
    assert torch.equal(head.main_grad, torch.ones_like(head.main_grad))  # forward only
    loss_of((hidden, head), rows(1), rows(2)).loss.backward()
    assert torch.allclose(head.main_grad - 1.0, ordinary, atol=1e-15)
    assert torch.equal(hidden.grad, of_hidden)
    assert head.grad_added_to_main_grad
    assert head.grad is not None and head.grad.untyped_storage().nbytes() == 8  # one zero


def test_a_factor_after_main_grad_was_written_is_an_error() -> None:
    hidden, head = head_and_hidden()
    head.main_grad = torch.zeros(V, 6, dtype=torch.float64)
    loss = 0.5 * loss_of((hidden, head), rows(1), rows(2)).loss
    with pytest.raises(RuntimeError, match=r"multiplied by 0\.5.*put the factor into token_scale"):
        loss.backward()


# -- coefficients ----------------------------------------------------------------------------------


@pytest.mark.parametrize("from_hidden", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_asking_in_slices_changes_no_number(name: str, from_hidden: bool) -> None:
    models: list[Any] = [rows(i, torch.float32) for i in range(3)]
    results = []
    function = sgopd.coefficients("sg_opd").for_batch(outcome())
    for coefficients in (function, lambda stats: function(stats)):
        leaf = models[0].clone().requires_grad_()
        student = (torch.eye(T), leaf.T) if from_hidden else leaf * 1.0
        got = loss_of(
            student,
            *models[1:],
            coefficients=coefficients,
            chunk_tokens=7,
            overwrite_student=True,
            **OBJECTIVES[name],
        )
        got.loss.backward()
        results.append((got.loss.detach(), leaf.grad, got.token_losses, got.lam, got.weight))
    mask = options()["mask"]
    for a, b in zip(*results, strict=True):
        a, b = (x[mask] if x.shape == mask.shape else x for x in (a, b))
        assert (a - b).abs().max() <= 2e-6 * b.abs().max()


def test_a_bool_chooses_between_lambdas_that_vary_by_token() -> None:
    student, teacher, reference = (rows(i) for i in range(3))
    low, high = torch.linspace(0.8, 1.0, T).double(), torch.linspace(1.2, 1.9, T).double()
    ones, opened = torch.ones(T, dtype=torch.float64), torch.arange(T) % 2 == 0

    def choose(stats: Any) -> tuple[Tensor, Tensor, Tensor]:
        return ones, opened, 0.0 * ones

    for changes in OBJECTIVES.values():
        if "candidate_lambda" in changes:
            continue
        x = student.clone().requires_grad_()
        got = loss_of(x, teacher, reference, coefficients=choose, lambdas=(low, high), **changes)
        got.loss.backward()
        value, gradient = by_autograd(
            student, teacher, reference, coefficients=choose, lambdas=(low, high), **changes
        )
        assert x.grad is not None
        assert abs(float(got.loss.detach()) - float(value)) < 1e-10
        assert (x.grad - gradient).abs().max() < 1e-10
        mask = options()["mask"]
        assert torch.equal(got.lam[mask], torch.where(opened, high, low)[mask])


# -- divergences -----------------------------------------------------------------------------------


def divergence(student: Tensor, teacher: Tensor, **changes: Any) -> Tensor:
    """D of every token, [T]."""
    return distillation_loss(
        student,
        teacher,
        tokens=torch.arange(T),
        mask=torch.ones(T),
        vocab_size=V,
        coefficients=sgopd.coefficients("opd").for_batch(
            sgopd.Outcome(torch.zeros(T), torch.zeros(T).bool(), torch.zeros(T).bool())
        ),
        lambdas=(1.0,),
        estimator="full_vocab",
        **changes,
    ).token_losses


def test_jsd_over_beta_goes_to_forward_kl_and_over_its_rest_to_reverse() -> None:
    student, teacher = rows(0), rows(1)
    small = 1e-3
    forward = divergence(student, teacher, divergence="forward_kl")
    near_0 = divergence(student, teacher, divergence="jsd", beta=small) / small
    assert ((near_0 - forward).abs() < 0.2 * forward).all()
    reverse = divergence(student, teacher)
    near_1 = divergence(student, teacher, divergence="jsd", beta=1.0 - small) / small
    assert ((near_1 - reverse).abs() < 0.2 * reverse).all()
    assert torch.equal(divergence(student, teacher, divergence="jsd", beta=0.0), forward)
    assert torch.equal(divergence(student, teacher, divergence="jsd", beta=1.0), reverse)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_top_k_with_a_tail_is_never_negative_and_below_the_whole(name: str) -> None:
    for distance in (0.0, 1e-4, 1e-2, 1.0):
        teacher = rows(1, torch.float32)
        student = teacher + distance * rows(0, torch.float32)
        whole = divergence(student, teacher, divergence=name)
        for k in (1, 3, 10, V):
            part = divergence(student, teacher, divergence=name, top_k=k)
            assert (part >= 0).all()
            assert (part <= whole + 1e-6 * (1 + whole)).all()  # merging outcomes loses divergence
        assert (part - whole).abs().max() <= 1e-6 * (1 + float(whole.max()))  # k = V


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ties_at_rank_k_are_broken_by_id_on_every_rank(pool: Any, world: int) -> None:
    results = pool(world).run(vocab_cases.tied_top_k)
    assert all(torch.equal(r, results[0]) for r in results)
    assert torch.equal(results[0], pool(1).run(vocab_cases.tied_top_k)[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"divergence": "kl"}, "divergence is 'kl'; allowed are 'reverse_kl'"),
        ({"divergence": "jsd", "beta": 1.2}, "beta is 1.2; it lies between 0"),
        ({"top_k": 0}, "top_k is 0; at least one"),
        ({"top_k": 4}, "top_k serves lambda 1 alone, got lambdas"),
        ({"top_k": 4, "lambdas": (1.0,)}, "top_k compares with the teacher alone"),
        ({"estimator": "sampled", "divergence": "jsd"}, "divergence is 'jsd' with estimator"),
        ({"estimator": "sampled", "top_k": 4}, "top_k is 4 with estimator 'sampled'"),
        ({"backend": "cuda"}, "backend is 'cuda'; allowed are 'auto'"),
        (
            {"divergence": "jsd", "candidate_lambda": lambda a2, i: a2},
            "the per-candidate gate is a reverse KL; divergence is 'jsd'",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        loss_of(*(rows(i) for i in range(3)), **{"estimator": "full_vocab", **changes})


def test_gradients_in_fp32_are_within_a_millionth_of_float64() -> None:
    # The bounds of the target table; naive sums of products give 2e-5.
    generator = torch.Generator().manual_seed(0)
    models = [3.0 * torch.randn(16, 32768, generator=generator) for _ in range(2)]
    tokens = torch.arange(16) * 100
    for changes, bound in (({"estimator": "full_vocab"}, 1e-6), ({"estimator": "sampled"}, 2e-6)):
        given = {
            "tokens": tokens,
            "mask": torch.ones(16),
            "coefficients": sgopd.coefficients("opd").for_batch(
                sgopd.Outcome(torch.zeros(16), torch.zeros(16).bool(), torch.zeros(16).bool())
            ),
            "lambdas": (1.0,),
            **changes,
        }
        x = models[0].clone().requires_grad_()
        distillation_loss(x, models[1], vocab_size=32768, **given).loss.backward()
        exact = models[0].double().requires_grad_()
        distillation_loss_reference(exact, models[1].double(), **given).backward()
        assert x.grad is not None and exact.grad is not None
        assert (x.grad - exact.grad).norm() < bound * exact.grad.norm()
