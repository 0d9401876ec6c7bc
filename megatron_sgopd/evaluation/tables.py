"""Tables of evaluations as text: one model's scores, two compared, many models side by side."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
SUMMARY = "summary.json"


def aligned(rows: Sequence[Sequence[str]], *, rule: bool = True, numbers: bool = True) -> str:
    """Sets rows as columns; `numbers`: all but the first column to the right.

    The first row is the head; `rule` draws a line below it.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.rjust(w) if i and numbers else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    if rule:
        lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join(lines)


def percent(fraction: float | None) -> str:
    """Writes a fraction in per cent with one decimal; "-" for None."""
    return "-" if fraction is None else f"{100 * fraction:.1f}"


def interval(bounds: Sequence[float]) -> str:
    """Writes the two ends of an interval of fractions in per cent."""
    return f"[{percent(bounds[0])}, {percent(bounds[1])}]"


def scores_table(summary: Mapping[str, Any]) -> str:
    """Sets one model's scores: a line for each benchmark and for their mean, in per cent."""
    n, k = summary["num_samples"], summary["k"]
    head = ["", "problems", f"avg@{n}", "95 %", f"pass@{k}", "95 %", "greedy", "tokens", "cut off"]
    sets = summary["benchmarks"]
    lines = [_scores_line(name, entry) for name, entry in sets.items()]
    lines += [_scores_line("mean", summary)] if len(sets) > 1 else []
    return aligned([head, *lines])


def _scores_line(name: str, entry: Mapping[str, Any]) -> list[str]:
    return [
        name,
        str(entry["num_problems"]),
        percent(entry["avg_at_k"]),
        interval(entry["ci95"]),
        percent(entry["pass_at_k"]),
        interval(entry["pass_ci95"]),
        percent(entry["greedy"]),
        f"{entry['mean_length']:.0f}",
        f"{percent(entry['truncated'])} %",
    ]


def comparison_table(comparison: Mapping[str, Any]) -> str:
    """Sets two models' scores: a line for each benchmark and measure, differences in points."""
    names = {"avg_at_k": f"avg@{comparison['num_samples']}", "pass_at_k": f"pass@{comparison['k']}"}
    rows = [["", "", "first", "second", "difference", "95 %", ""]]
    sets = comparison["benchmarks"]
    for name, entry in {**sets, **({"mean": comparison} if len(sets) > 1 else {})}.items():
        for metric in ("avg_at_k", "pass_at_k", "greedy"):
            if metric not in entry:
                continue
            d = entry[metric]
            rows.append(
                [
                    name,
                    names.get(metric, metric),
                    percent(d["first"]),
                    percent(d["second"]),
                    f"{100 * d['difference']:+.1f}",
                    interval(d["ci95"]),
                    "separated from zero" if d["separated"] else "",
                ]
            )
    return aligned(rows)


def read_summaries(out: Path) -> list[Row]:
    """Reads OUT/MODEL/BENCHMARK/summary.json, as slurm/evaluate.sh leaves them where finished.

    Each row has `model`, `benchmark` and the benchmark's scores.
    """
    rows = []
    for path in sorted(out.glob(f"*/*/{SUMMARY}")):
        summary = json.loads(path.read_text(encoding="utf-8"))
        for benchmark, scores in summary["benchmarks"].items():
            model = path.parent.parent.name
            rows.append({"model": model, "benchmark": benchmark, **scores})
    return rows


def models_table(rows: Sequence[Row]) -> str:
    """Sets many models' scores: a line for each model, a column for each benchmark.

    avg@n and pass@k in per cent; "-" where an evaluation is missing.
    """
    benchmarks = list(dict.fromkeys(row["benchmark"] for row in rows))
    scores = {(row["model"], row["benchmark"]): row for row in rows}
    models = dict.fromkeys(row["model"] for row in rows)
    lines = [[m, *(_model_cell(scores.get((m, b))) for b in benchmarks)] for m in models]
    return aligned([["", *benchmarks], *lines], rule=False, numbers=False)


def _model_cell(row: Row | None) -> str:
    if row is None:
        return "-"
    accuracy, several = percent(row["avg_at_k"]), percent(row["pass_at_k"])
    return f"avg@{row['num_samples']} {accuracy} {interval(row['ci95'])} pass@{row['k']} {several}"
