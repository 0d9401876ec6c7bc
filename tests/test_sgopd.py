"""The gate, the methods' coefficients and the phases, against values written out by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_sgopd import sgopd


@dataclass(frozen=True)
class Stats:
    student_logprobs: Tensor
    teacher_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None


def one_token(
    method: str,
    *,
    s: float = -2.0,
    t: float = -1.0,
    r: float = -1.5,
    a1: float = 1.0,
    correct: bool = True,
    imitated: bool = False,
    engine: float = -2.0,
    **options: object,
) -> tuple[float, float, float]:
    stats = Stats(*(torch.tensor([x], dtype=torch.float64) for x in (s, t, r)))
    outcome = sgopd.Outcome(
        torch.tensor([a1], dtype=torch.float64),
        torch.tensor([correct]),
        torch.tensor([imitated]),
        torch.tensor([engine], dtype=torch.float64),
    )
    weight, lam, additive = sgopd.coefficients(method, **options)(stats, outcome)
    return weight.item(), lam.item(), additive.item()


@pytest.mark.parametrize(
    ("a1", "a2", "open_"),
    [
        (1.0, 0.5, True),  # correct, teacher wants more: consensus
        (1.0, -0.5, False),  # correct, teacher wants less: conflict
        (-1.0, 0.5, False),  # wrong, teacher wants more: conflict
        (-1.0, -0.5, True),  # wrong, teacher wants less: consensus
        (0.0, 0.5, False),  # uniform group: a tie
        (0.0, -0.5, False),
        (1.0, 0.0, False),  # S = T: a tie
        (-1.0, 0.0, False),
        (0.0, 0.0, False),
        (1e-30, 1e-30, True),  # the product underflows, the signs do not
        (-1e-30, -1e-30, True),
    ],
)
def test_gate_truth_table(a1: float, a2: float, open_: bool) -> None:
    gate = sgopd.sign_consistency_gate(torch.tensor([a1]), torch.tensor([a2]))
    assert gate.tolist() == [open_]


@pytest.mark.parametrize(
    ("a2", "eps", "open_"),
    [(0.1, 0.1, False), (0.1001, 0.1, True), (-0.1, 0.1, False), (0.1, 0.0, True), (0, 0, False)],
)
def test_tie_width_closes_the_gate_up_to_and_including_eps(
    a2: float, eps: float, open_: bool
) -> None:
    a2_T = torch.tensor([a2], dtype=torch.float64)
    a1_T = torch.sign(a2_T)
    assert sgopd.sign_consistency_gate(a1_T, a2_T, eps).tolist() == [open_]


@pytest.mark.parametrize(
    ("correct", "signal", "expected"),
    [
        ([True, False, False, False], "group_norm", [3**0.5, -(3**-0.5), -(3**-0.5), -(3**-0.5)]),
        ([True, True], "group_norm", [0.0, 0.0]),
        ([False, False, False], "group_norm", [0.0, 0.0, 0.0]),
        ([True, False], "mean_only", [0.5, -0.5]),
        ([True, True, True], "mean_only", [0.0, 0.0, 0.0]),
        ([True, False], "sign", [1.0, -1.0]),
        ([True, True], "sign", [1.0, 1.0]),
        ([True], "group_norm", [1.0]),  # configured G = 1: no group, 2c - 1
        ([False], "mean_only", [-1.0]),
    ],
)
def test_verifier_advantages(correct: list[bool], signal: str, expected: list[float]) -> None:
    got = sgopd.verifier_advantages(correct, signal)
    assert got == pytest.approx(expected, abs=1e-5)


def test_uniform_group_is_an_exact_tie() -> None:
    # 1/3 style rounding in the mean must not leave a tiny a1 of either sign.
    for n in range(2, 40):
        assert sgopd.verifier_advantages([True] * n, "mean_only") == [0.0] * n
        assert sgopd.verifier_advantages([True] * n, "group_norm") == [0.0] * n


def test_unknown_verifier_signal_names_the_allowed() -> None:
    with pytest.raises(ValueError, match=r"'typo'.*group_norm, mean_only, sign"):
        sgopd.verifier_advantages([True, False], "typo")


# -- methods: (weight, lambda, additive) -----------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "case", "expected"),
    [
        ("sft", {}, (0.0, 1.0, 1.0)),
        ("opd", {}, (1.0, 1.0, 0.0)),
        ("exopd", {}, (1.0, 1.25, 0.0)),
        ("exopd", {"lambda_uniform": 1.8}, (1.0, 1.8, 0.0)),
        ("grpo", {"a1": -0.7}, (0.0, 1.0, -0.7)),
        ("sg_opd", {}, (1.0, 1.8, 0.0)),
        ("sg_opd", {"a1": -1.0}, (1.0, 1.0, 0.0)),
        ("sg_opd", {"a1": 0.0}, (1.0, 1.0, 0.0)),
        ("sg_opd", {"a1": -1.0, "t": -3.0}, (1.0, 1.8, 0.0)),
        ("sg_opd", {"lambda_high": 1.3}, (1.0, 1.3, 0.0)),
        ("sg_opd", {"a1": -1.0, "lambda_low": 0.5, "conflict": "interpolate"}, (1.0, 0.5, 0.0)),
        ("sg_opd", {"a1": -1.0, "conflict": "shrink", "beta": 0.3}, (0.3, 1.0, 0.0)),
        ("sg_opd", {"a1": 1.0, "conflict": "shrink", "beta": 0.3}, (1.0, 1.8, 0.0)),
        ("sg_opd", {"a1": -2.0, "conflict": "verifier_mix", "beta": 0.5}, (1.0, 1.0, -1.0)),
        ("sg_opd", {"a1": 2.0, "conflict": "verifier_mix", "beta": 0.5}, (1.0, 1.8, 0.0)),
        ("sg_opd", {"eps": 1.5}, (1.0, 1.0, 0.0)),  # |a2| = 1 is inside the tie
        ("sg_opd", {"teacher_signal": "t_minus_r", "r": -0.5, "t": -1.0}, (1.0, 1.0, 0.0)),
        # The extrapolation would turn the update round (docs/method.md): a2 +0.1, A -0.62.
        ("sg_opd", {"t": -1.9, "r": -1.0}, (1.0, 1.8, 0.0)),
        ("sg_opd", {"t": -1.9, "r": -1.0, "forbid_sign_flip": True}, (1.0, 1.0, 0.0)),
        ("opdvr", {}, (1.0, 1.0, 0.0)),
        ("opdvr", {"correct": False}, (0.0, 1.0, 0.0)),
        ("opdvr", {"correct": False, "t": -3.0}, (1.0, 1.0, 0.0)),
        ("opdvr", {"correct": True, "a1": 0.0}, (1.0, 1.0, 0.0)),  # reads c, not the group
        ("grpd", {"a1": 0.0}, (0.0, 1.0, 0.0)),
        ("grpd", {"a1": 0.5}, (1.0, 1.0, 0.0)),
        ("grpd", {"a1": -0.5}, (0.0, 1.0, 0.0)),
        # importance weights min(exp(S - engine), cap)
        ("opd", {"tis_cap": 5.0, "engine": -2.5}, (math.exp(0.5), 1.0, 0.0)),
        ("opd", {"tis_cap": 5.0, "engine": -9.0}, (5.0, 1.0, 0.0)),
        ("grpo", {"tis_cap": 5.0, "engine": -2.0 - math.log(2), "a1": 0.5}, (0.0, 1.0, 1.0)),
        # |A| = 1 + 0.8 * 0.5 = 1.4 clipped to 0.7
        ("sg_opd", {"adv_clip": 0.7}, (0.5, 1.8, 0.0)),
        ("sg_opd", {"adv_clip": 2.0}, (1.0, 1.8, 0.0)),
        # imitated tokens take cross-entropy: no gate, TIS or advantage
        ("sg_opd", {"imitated": True}, (0.0, 1.8, 1.0)),
        ("opd", {"imitated": True, "tis_cap": 5.0, "engine": -9.0}, (0.0, 1.0, 1.0)),
        ("opd", {"imitated": True, "ce_weight": 0.25}, (0.0, 1.0, 0.25)),
        ("opd", {"imitated": True, "ce_weighting": "dft"}, (0.0, 1.0, math.exp(-2.0))),
        ("sg_opd", {"imitated": True, "on_teacher_rollouts": True}, (0.0, 1.8, 1.0)),
        ("sg_opd", {"imitated": True, "on_teacher_rollouts": True, "t": -3.0}, (0.0, 1.0, 0.0)),
    ],
)
def test_coefficients(
    method: str, case: dict[str, object], expected: tuple[float, float, float]
) -> None:
    got = one_token(method, **case)  # type: ignore[arg-type]
    assert got == pytest.approx(expected, abs=1e-12)


def test_both_lambdas_one_is_opd_exactly() -> None:
    generator = torch.Generator().manual_seed(3)
    stats = Stats(*torch.randn(3, 50, generator=generator))
    outcome = sgopd.Outcome(
        torch.randn(50, generator=generator), torch.ones(50).bool(), torch.zeros(50).bool()
    )
    plain = sgopd.coefficients("opd")(stats, outcome)
    gated = sgopd.coefficients("sg_opd", lambda_high=1.0)(stats, outcome)
    assert all(torch.equal(a, b) for a, b in zip(plain, gated, strict=True))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (("sgopd", {}), "method is 'sgopd'.*sg_opd"),
        (("sg_opd", {"lambda_hihg": 1.0}), "unknown option 'lambda_hihg'.*lambda_high"),
        (("sg_opd", {"conflict": "hard"}), "conflict is 'hard'; allowed are plain, interpolate"),
        (("opd", {"ce_weighting": "x"}), "ce_weighting is 'x'; allowed are none, dft"),
    ],
)
def test_bad_options_are_errors_at_construction(
    call: tuple[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sgopd.coefficients(call[0], **call[1])


def test_missing_models_are_named() -> None:
    stats = Stats(torch.zeros(1))
    outcome = sgopd.Outcome(torch.ones(1), torch.ones(1).bool(), torch.zeros(1).bool())
    with pytest.raises(ValueError, match="no teacher was given"):
        sgopd.coefficients("sg_opd")(stats, outcome)
    with pytest.raises(ValueError, match="need the engine's log-probs"):
        sgopd.coefficients("opd", tis_cap=5.0)(stats, outcome)
    with_teacher = Stats(torch.zeros(1), torch.ones(1))
    with pytest.raises(ValueError, match="need a reference"):
        sgopd.coefficients("sg_opd", teacher_signal="t_minus_r")(with_teacher, outcome)


def test_candidate_lambda_gates_every_entry_by_its_own_sign() -> None:
    a1 = torch.tensor([[1.0], [-1.0], [0.0]])
    a2 = torch.tensor([[0.5, -0.5, 0.0]]).expand(3, 3)
    lam = sgopd.candidate_lambda(a1, a2, lambda_high=1.8, lambda_low=1.0)
    expected = torch.tensor([[1.8, 1.0, 1.0], [1.0, 1.8, 1.0], [1.0, 1.0, 1.0]])
    assert torch.equal(lam, expected)


# -- phases ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.5),
        (9, 0.5),  # u1 = 10
        (10, 0.5),  # the cosine starts at its top
        (25, 0.25),  # half way
        (39, 0.25 * (1 + math.cos(math.pi * 29 / 30))),
        (40, 0.0),  # u2 = 40
        (99, 0.0),
    ],
)
def test_teacher_fraction(step: int, expected: float) -> None:
    got = sgopd.teacher_fraction(step, num_steps=100, rho0=0.5, hold_frac=0.1, end_frac=0.4)
    assert got == pytest.approx(expected, abs=1e-12)


def test_teacher_fraction_without_fading_is_a_step() -> None:
    values = [
        sgopd.teacher_fraction(s, num_steps=10, rho0=0.3, hold_frac=0.5, end_frac=0.5)
        for s in range(10)
    ]
    assert values == [0.3] * 5 + [0.0] * 5


@pytest.mark.parametrize(
    ("fraction", "unit", "count"),
    [
        (0.5, "rollout", 20),
        (0.3, "rollout", 12),
        (0.99, "rollout", 39),
        (0.0, "rollout", 0),
        (0.5, "prompt", 20),
        (0.35, "prompt", 12),
        (0.05, "prompt", 0),
        (1.0, "prompt", 40),
    ],
)
def test_number_of_teacher_slots(fraction: float, unit: str, count: int) -> None:
    slots = sgopd.teacher_slots(fraction, num_prompts=10, n=4, unit=unit, seed=1, step=3)
    assert len(slots) == len(set(slots)) == count
    assert all(0 <= s < 40 for s in slots)
    assert slots == sorted(slots)


def test_slots_are_drawn_anew_each_step_and_seed_and_repeat() -> None:
    def draw(seed: int, step: int) -> list[int]:
        return sgopd.teacher_slots(0.5, num_prompts=10, n=4, seed=seed, step=step)

    assert draw(1, 3) == draw(1, 3)
    assert draw(1, 3) != draw(1, 4)
    assert draw(1, 3) != draw(2, 3)


def test_prompt_unit_takes_whole_prompts() -> None:
    slots = sgopd.teacher_slots(0.5, num_prompts=6, n=3, unit="prompt", seed=0, step=0)
    assert all(len([s for s in slots if s // 3 == p]) == 3 for p in {s // 3 for s in slots})
