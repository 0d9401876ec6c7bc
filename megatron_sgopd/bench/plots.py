"""Figures from the rows of `sgopd bench kl --json`: the exact reverse KL on logits, fp32.

One SVG for each of tokens, vocabulary and tensor-parallel size, time and extra memory side by side.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from megatron_sgopd.config.errors import ConfigError

AXES = {"tokens": "tokens", "vocab": "vocabulary", "tp": "tensor-parallel ranks"}
COLOURS = ("#475569", "#d97706", "#059669", "#db2777", "#7c3aed", "#0891b2")
OURS = "#2563eb"
MARKERS = ("o", "s", "^", "D", "v", "P")
INK, GRID = "#64748b", "#e2e8f0"
MIB = 1 << 20

Row = dict[str, Any]


def plot(file: Path, folder: Path) -> list[Path]:
    """Write the figures and give their paths; an axis along which nothing varies has none.

    Raises:
        ConfigError: the file or the folder is not there, or the file holds no such rows.
    """
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}); it is made by --json") from error
    if not folder.is_dir():
        raise ConfigError(f"--out {folder} is no folder; make it first")
    drawn = [row for row in rows if _is_drawn(row)]
    if drawn and any(row["allocator"] == "default" for row in drawn):
        drawn = [row for row in drawn if row["allocator"] == "default"]
    paths = []
    for axis in AXES:
        lines = _varying(drawn, axis)
        if lines:
            paths.append(folder / f"bench_{axis}.svg")
            _draw(lines, axis, paths[-1])
    if not paths:
        raise ConfigError(
            f"{file} has no reverse KL on fp32 logits along any of {', '.join(AXES.values())}; "
            "measure more shapes with --shapes"
        )
    return paths


def _is_drawn(row: Row) -> bool:
    is_main = not row["ours"] or row["name"] == "ours"
    return is_main and (row["form"], row["objective"], row["dtype"]) == (
        "logits",
        "reverse_kl",
        "fp32",
    )


def _varying(rows: Sequence[Row], axis: str) -> list[Row]:
    """Find rows in which this axis takes most values and the other two stay as they are."""
    others = [name for name in AXES if name != axis]
    groups: dict[tuple[int, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in others), []).append(row)

    def values(key: tuple[int, ...]) -> int:
        return len({row[axis] for row in groups[key]})

    best = max(sorted(groups), key=values, default=None)
    return [] if best is None or values(best) < 2 else groups[best]


def _draw(rows: Sequence[Row], axis: str, path: Path) -> None:
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "font.family": "sans-serif",
        "svg.hashsalt": path.name,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(8.4, 3.2), layout="constrained")
        time, memory = figure.subplots(1, 2)
        names = sorted({row["name"] for row in rows}, key=lambda name: (name != "ours", name))
        for index, name in enumerate(names):
            points = sorted((row for row in rows if row["name"] == name), key=lambda r: r[axis])
            at = [row[axis] for row in points]
            look: dict[str, Any] = {
                "color": OURS if name == "ours" else COLOURS[(index - 1) % len(COLOURS)],
                "linewidth": 2.2 if name == "ours" else 1.3,
                "marker": MARKERS[index % len(MARKERS)],
                "markersize": 9 - 2 * min(index, 3),  # equal values stay visible below one another
                "label": name,
            }
            time.plot(at, [row["time_ms"] for row in points], **look)
            memory.plot(at, [_mebibytes(row) for row in points], **look)
        _dress(time, rows, axis, "forward and backward, ms")
        _dress(memory, rows, axis, "extra memory of a rank, MiB")
        figure.legend(
            *time.get_legend_handles_labels(),
            loc="outside lower center",
            ncols=len(names),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
        )
        figure.suptitle(_title(rows, axis), fontsize=9, color=INK)
        figure.savefig(path, metadata={"Date": None, "Creator": None})


def _mebibytes(row: Row) -> float:
    """Count at least one, so that a log scale holds it."""
    shard = row["tokens"] * row["vocab"] // row["tp"] * 4
    return max(row["extra_memory_shards"] * shard / MIB, 1.0)


def _title(rows: Sequence[Row], axis: str) -> str:
    first = rows[0]
    fixed = [f"{AXES[name]} {first[name]:,}" for name in AXES if name != axis]
    setting = f"{first['device']}, allocator {first['allocator']}"
    return f"reverse KL on fp32 logits: {', '.join(fixed)} ({setting})"


def _dress(axes: Axes, rows: Sequence[Row], axis: str, label: str) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({row[axis] for row in rows})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(AXES[axis], color=INK)
    axes.set_ylabel(label, color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=8)
