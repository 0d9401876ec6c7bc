"""One table of many evaluations: a line for each model, a column for each benchmark.

Reads OUT/MODEL/BENCHMARK/summary.json as `sgopd evaluate` leaves them (slurm/evaluate.sh).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SUMMARY = "summary.json"


def read(out: Path) -> list[Row]:
    """The evaluations that are finished: model, benchmark and the benchmark's scores."""
    rows = []
    for path in sorted(out.glob(f"*/*/{SUMMARY}")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        for benchmark, scores in summary["benchmarks"].items():
            model = path.parent.parent.name
            rows.append({"model": model, "benchmark": benchmark, **scores})
    return rows


def table(rows: list[Row]) -> str:
    """avg@n and pass@k in per cent; `-` where an evaluation is missing."""
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    found = {(row["model"], row["benchmark"]): row for row in rows}
    lines = [["", *benchmarks]]
    for model in dict.fromkeys(row["model"] for row in rows):
        cells = [_cell(found.get((model, benchmark))) for benchmark in benchmarks]
        lines.append([model, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    low, high = (100 * bound for bound in row["ci95"])
    return (
        f"avg@{row['num_samples']} {100 * row['avg_at_k']:.1f} [{low:.1f}, {high:.1f}]"
        f" pass@{row['k']} {100 * row['pass_at_k']:.1f}"
    )
