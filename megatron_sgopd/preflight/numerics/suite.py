"""Runs the cases on a function and tells what came of them: a table, and JSON. Imports no torch."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from megatron_sgopd.preflight.numerics.adapter import Adapter
from megatron_sgopd.preflight.numerics.cases import ALL, cases_of
from megatron_sgopd.preflight.numerics.outcome import Reading, Result, merge, worst
from megatron_sgopd.preflight.numerics.ranks import ranks

NAME_WIDTH = 48


def run_suite(adapter: Adapter, worlds: Sequence[int]) -> list[Result]:
    """Every case at every world size, one world's ranks after the other's."""
    results = []
    for world in worlds:
        cases = cases_of(tuple(adapter.functions), world)
        print(f"TP {world}: {len(cases)} cases", file=sys.stderr, flush=True)
        with ranks(world, adapter.name) as started:
            for case in cases:
                answer = started.run(case)
                results.append(merge(case.capability, case.name, world, answer))
    return results


def table(results: Sequence[Result]) -> list[str]:
    """One line a case: what it gave at each world size, and the largest errors of all of them.

    Error and bound are those of the element that takes the largest share of its own bound.
    """
    worlds = sorted({r.tp for r in results})
    head = "".join(f"TP {w}".rjust(6) for w in worlds)
    lines = [f"{'case':<{NAME_WIDTH}}{head}  quantity error / bound"]
    capability = ""
    order = [(case.capability, case.name) for case in ALL]  # some are not tried at TP 1
    for key in sorted({(r.capability, r.case) for r in results}, key=order.index):
        own = {r.tp: r for r in results if (r.capability, r.case) == key}
        if key[0] != capability:
            capability = key[0]
            lines.append(capability)
        marks = "".join(_mark(own.get(w)).rjust(6) for w in worlds)
        readings = worst([x for r in own.values() for x in r.readings])
        name = f"  {key[1]}".ljust(NAME_WIDTH)
        lines.append(f"{name}{marks}  {'   '.join(map(_reading, readings))}".rstrip())
        failures = dict.fromkeys(r.failure for r in own.values() if r.failure)
        lines += [f"{'':<{NAME_WIDTH}}  {failure}" for failure in failures]
    return lines


def verdict(results: Sequence[Result]) -> str:
    """The last line: how many cases failed, each counted once whatever the world sizes."""
    failed = {(r.capability, r.case) for r in results if not r.passed}
    count = len({(r.capability, r.case) for r in results})
    worlds = ", ".join(str(w) for w in sorted({r.tp for r in results}))
    if failed:
        return f"FAILED: {len(failed)} of {count} cases, at TP {worlds}"
    return f"ok: {count} cases at TP {worlds}"


def as_json(adapter: Adapter, results: Sequence[Result]) -> dict[str, Any]:
    """Returns what `--json` writes; an error that is NaN or infinite is null there."""
    return {
        "function": adapter.name,
        "versions": _versions(adapter),
        "passed": all(r.passed for r in results),
        "results": [
            {
                "capability": r.capability,
                "case": r.case,
                "tp": r.tp,
                "passed": r.passed,
                "failure": r.failure,
                "readings": [
                    {
                        "quantity": x.quantity,
                        "error": x.error if math.isfinite(x.error) else None,
                        "bound": x.bound,
                    }
                    for x in r.readings
                ],
            }
            for r in results
        ],
    }


def _versions(adapter: Adapter) -> dict[str, str]:
    """Returns the versions of torch and of the packages that the function's module needs."""
    found = metadata.packages_distributions()
    packages = [p for module in ("torch", *adapter.needs) for p in found.get(module, [])]
    return {package: metadata.version(package) for package in dict.fromkeys(packages)}


def _mark(result: Result | None) -> str:
    if result is None:
        return "-"
    return "ok" if result.passed else "FAIL"


def _reading(reading: Reading) -> str:
    return f"{reading.quantity} {reading.error:.2g} / {reading.bound:.2g}"
