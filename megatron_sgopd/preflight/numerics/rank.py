"""One case on one rank: the ranks of `ranks`, or of a test's pool, call it."""

from __future__ import annotations

import traceback
from functools import lru_cache

from megatron_sgopd.preflight.numerics.adapter import Adapter, load
from megatron_sgopd.preflight.numerics.cases import Case
from megatron_sgopd.preflight.numerics.checks import CHECKS, Setting
from megatron_sgopd.preflight.numerics.loss_checks import check_loss
from megatron_sgopd.preflight.numerics.outcome import RankOutcome


@lru_cache(maxsize=8)
def _adapter(name: str) -> Adapter:
    return load(name)


def run_case(name: str, case: Case) -> RankOutcome:
    """The case on the function at MODULE:NAME; what it raises is an outcome, not an exception."""
    check = check_loss if case.check == "loss" else CHECKS[case.check]
    try:
        setting = Setting.from_function(_adapter(name).functions[case.capability], case)
        return RankOutcome(tuple(check(setting)))
    except Exception as error:  # a foreign function may raise anything
        message = str(error).strip().splitlines()
        text = f"{type(error).__name__}: {message[0] if message else ''}"
        return RankOutcome(failure=text, details=traceback.format_exc())


def run_cases(name: str, cases: list[Case]) -> list[RankOutcome]:
    """All of them, one after the other."""
    return [run_case(name, case) for case in cases]
