"""Describes what the command asks of one worker. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from megatron_sgopd.bench.cases import Case


@dataclass(frozen=True)
class Job:
    """Cases to measure under one allocator setting."""

    cases: list[Case]
    device: str
    allocator: str
    rounds: int
    budget_s: float  # of one case's rounds
    with_error: bool  # of the gradient: the same under every allocator

    @classmethod
    def from_json(cls, text: str) -> Job:
        values = json.loads(text)
        return cls(**values | {"cases": [Case(**case) for case in values["cases"]]})

    def to_json(self) -> str:
        return json.dumps(asdict(self))
