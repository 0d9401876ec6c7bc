"""The rows of a case as a table for people. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_sgopd.bench.cases import Case
from megatron_sgopd.evaluation.tables import aligned

HEAD = ("", "time/plain", "ms", "of floor", "shards", "error", "collectives")


def case_table(case: Case, rows: Sequence[dict[str, Any]]) -> str:
    """Set a case's rows as lines; one allocator's follow the other's."""
    own_rows = [row for row in rows if _is_of(case, row)]
    blocks = []
    for allocator in dict.fromkeys(row["allocator"] for row in own_rows):
        cells = [_cells(row) for row in own_rows if row["allocator"] == allocator]
        title = f"{case.label}, allocator {allocator}"
        blocks.append(aligned([(title, *HEAD[1:]), *cells], rule=False) + "\n")
    return "\n".join(blocks)


def _is_of(case: Case, row: dict[str, Any]) -> bool:
    return all(
        row[name] == getattr(case, name)
        for name in ("form", "objective", "tokens", "vocab", "dtype", "tp")
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    error = row["gradient_rel_error"]
    counts = (row["collectives_forward"], row["collectives_backward"])
    return (
        f"{row['name']} {row['version']}" if "package" in row else row["name"],
        f"{row['time_ratio_to_plain']:.2f}",
        f"{row['time_ms']:.1f}",
        f"{row['floor_ms'] / row['time_ms']:.0%}",
        f"{row['extra_memory_shards']:.2f}",
        "" if error is None else f"{error:.1e}",
        "" if counts[0] is None else f"{counts[0]} + {counts[1]}",
    )
