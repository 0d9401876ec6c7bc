"""One pair, one verdict: the box, the quick rules, then SymPy for what they cannot decide."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from megatron_sgopd.verifier.rules import structures_equal
from megatron_sgopd.verifier.text import MAX_ANSWER_CHARS, clean, compact, extract_boxed

QUICK_CHARS = 256  # longer answers are not normalised outside a worker


@dataclass(frozen=True)
class Verdict:
    """The verifier's word on one completion.

    `extracted` is the content of the last box; None when there is none or it is too long.
    `reason` is "equal" when `is_correct`, otherwise one of "different"; "no_boxed", "unclosed",
    "empty", "too_long" (about the box); "unparsable" (not mathematics); "no_reference" (the
    reference answer is empty); "timeout", "memory", "crashed" (the worker was lost; pool only);
    "error" (another verifier raised). A verifier of one's own may use other words.
    """

    is_correct: bool
    extracted: str | None
    reason: str


class NeedsSympy(Exception):
    """The quick rules cannot decide this pair."""


class Unparsable(Exception):
    """One of the two answers is not mathematics that math-verify's LaTeX grammar knows."""


def verify(completion: str, answer: str) -> Verdict:
    r"""Is the last ``\boxed{…}`` of `completion` the reference `answer` (bare or boxed)?

    The comparison runs in this process, with no limit on time or memory: for text that a model
    wrote, use `VerifierPool`, which runs the same code in workers it can kill.
    Example: verify(r"so \boxed{0.5}", r"\frac12").is_correct is True.
    """
    extracted, reason = extract_boxed(completion)
    if extracted is None:
        return Verdict(False, None, reason)
    return compare(extracted, answer)


def decide_quickly(extracted: str, answer: str) -> Verdict | None:
    """The verdict where plain rules give one in microseconds; None where SymPy is needed."""
    if len(extracted) > QUICK_CHARS or len(answer) > QUICK_CHARS:
        return None
    try:
        return _compare(extracted, answer, _no_leaf)
    except NeedsSympy:
        return None


def compare(extracted: str, answer: str) -> Verdict:
    """The verdict on the content of a box, by the rules and SymPy."""
    return _compare(extracted, answer, sympy_equal)


def _compare(extracted: str, answer: str, leaf: Any) -> Verdict:
    boxed_answer, _ = extract_boxed(answer)
    answer = answer if boxed_answer is None else boxed_answer
    if len(extracted) > MAX_ANSWER_CHARS or len(answer) > MAX_ANSWER_CHARS:
        return Verdict(False, None, "too_long")
    given, wanted = clean(extracted), clean(answer)
    if not compact(wanted):
        return Verdict(False, extracted, "no_reference")
    if not compact(given):
        return Verdict(False, extracted, "empty")
    try:
        is_correct = structures_equal(given, wanted, leaf)
    except Unparsable:
        return Verdict(False, extracted, "unparsable")
    return Verdict(is_correct, extracted, "equal" if is_correct else "different")


def _no_leaf(given: str, wanted: str) -> bool:
    raise NeedsSympy


def sympy_equal(given: str, wanted: str) -> bool:
    """Tells whether two LaTeX expressions are equal by math-verify and SymPy.

    Only math-verify's LaTeX grammar parses, which builds SymPy objects from a syntax tree; its
    plain-text path (`parse_expr`, which is Python's eval) is not used. Raises `Unparsable`.
    May take any time and memory: 9^{9^{9^{9}}} is a valid expression.
    """
    from math_verify import verify as math_verify
    from math_verify.grader import should_treat_as_complex

    # The warning that its own alarm-based time limit is off: ours is enforced from outside.
    logging.getLogger("math_verify.grader").setLevel(logging.ERROR)
    is_real = not (should_treat_as_complex(given) or should_treat_as_complex(wanted))
    wanted_expression = _parse(wanted, is_real)
    given_expression = _parse(given, is_real)
    equal = math_verify(
        wanted_expression, given_expression, allow_set_relation_comp=True, timeout_seconds=None
    )
    return bool(equal) and _same_size(given_expression, wanted_expression)


def _parse(text: str, is_real: bool) -> Any:
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig, normalize_latex

    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none"
    )
    try:
        return _grammar(is_real).parse(normalize_latex(text, normalization))
    except MemoryError:
        raise
    except Exception as error:  # the grammar raises bare Exceptions
        raise Unparsable(text[:80]) from error


def _grammar(is_real: bool) -> Any:
    """math-verify's LaTeX grammar, its numbers made without `sympy.Number`, which evals strings."""
    import sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy

    class Grammar(_Latex2Sympy):
        def parse_number(self, text: str) -> Any:
            text = text.replace(",", "")
            return sympy.Integer(int(text)) if text.isdigit() else sympy.Float(text)

    return Grammar(is_real=is_real, config=ConversionConfig(lowercase_symbols=False))


def _same_size(a: Any, b: Any) -> bool:
    """Tells whether two numbers agree relatively too: math-verify rounds to absolute decimals.

    It takes 1.5e-7 for 2.5e-7, and any two numbers below 1e-15 for equal.
    """
    from sympy import Expr, Float

    if not (isinstance(a, Expr) and isinstance(b, Expr) and a.is_number and b.is_number):
        return True
    left, right = a.evalf(30), b.evalf(30)
    if not (left.is_finite and right.is_finite):
        return True
    tolerance = 5e-6 if a.has(Float) or b.has(Float) else 1e-12
    return bool(abs(left - right) <= tolerance * max(abs(left), abs(right)))
