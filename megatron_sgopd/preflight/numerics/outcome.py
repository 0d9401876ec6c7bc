"""Holds what a case measures: errors beside their bounds, by rank. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Reading:
    """One measured error beside its bound."""

    quantity: str  # "value", "gradient", or what else a check counts
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound  # False for NaN

    @property
    def share(self) -> float:
        """Returns the error's share of the bound; NaN counts as infinite."""
        if math.isnan(self.error):
            return math.inf
        if self.error <= 0:
            return 0.0
        return self.error / self.bound if self.bound > 0 else math.inf


@dataclass(frozen=True)
class RankOutcome:
    """A case's result on one rank: readings, or the last line of an error and its traceback."""

    readings: tuple[Reading, ...] = ()
    failure: str = ""
    details: str = ""


@dataclass(frozen=True)
class Result:
    """A case's result at one world size: of every quantity the rank with the largest share."""

    capability: str
    case: str
    tp: int
    readings: tuple[Reading, ...]
    failure: str  # of the first rank that has one, or what kept the ranks from answering

    @property
    def passed(self) -> bool:
        return not self.failure and all(r.passed for r in self.readings)


def merge(capability: str, case: str, tp: int, answer: Sequence[RankOutcome] | str) -> Result:
    """The ranks' outcomes as one."""
    if isinstance(answer, str):
        return Result(capability, case, tp, (), answer)
    failure = next((f"rank {i}: {a.failure}" for i, a in enumerate(answer) if a.failure), "")
    return Result(capability, case, tp, worst([r for a in answer for r in a.readings]), failure)


def worst(readings: Sequence[Reading]) -> tuple[Reading, ...]:
    """Returns of every quantity the reading with the largest share of its bound, in their order."""
    out: dict[str, Reading] = {}
    for reading in readings:
        kept = out.get(reading.quantity)
        if kept is None or reading.share > kept.share:
            out[reading.quantity] = reading
    return tuple(out.values())
