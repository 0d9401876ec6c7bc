"""The report's figures: one small SVG per quantity, a line per run."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

COLOURS = ("#2563eb", "#d97706", "#059669", "#db2777", "#7c3aed", "#475569", "#0891b2", "#b91c1c")
Metrics = Sequence[Mapping[str, Any]]  # the rows of metrics.jsonl


@dataclass(frozen=True)
class Panel:
    """One figure: what it shows, and the keys of metrics.jsonl drawn (the first solid)."""

    title: str
    keys: tuple[str, ...]
    note: str
    percent: bool = False


PANELS = (
    Panel(
        "Rollout accuracy",
        ("rollout/accuracy",),
        "Share of the student's training rollouts that the verifier passes.",
        percent=True,
    ),
    Panel(
        "avg@k on the development problems",
        ("evaluation/avg_at_k",),
        "Held-out problems, not the ones of the table.",
        percent=True,
    ),
    Panel(
        "Reverse KL, student to teacher",
        ("distill/reverse_kl",),
        "Mean of log p_student - log p_teacher over sampled tokens, in nats.",
    ),
    Panel(
        "Student entropy",
        ("student/entropy",),
        "Per token, in nats. A collapse to 0 leaves nothing to sample.",
    ),
    Panel(
        "Gate open",
        ("gate/open_rate", "gate/open_rate_mixed"),
        "Share of tokens where teacher and verifier agree; dashed: in groups of mixed outcome.",
        percent=True,
    ),
    Panel(
        "Groups of mixed outcome",
        ("gate/mixed_groups",),
        "Elsewhere all samples are right or all are wrong, and the gate is closed.",
        percent=True,
    ),
    Panel(
        "Phased teacher sampling",
        ("phases/realised_fraction", "phases/requested_fraction"),
        "Share of the batch that is teacher rollouts the verifier passed; dashed: asked for.",
        percent=True,
    ),
    Panel(
        "Completion length",
        ("rollout/length",),
        "Mean tokens of a student rollout.",
    ),
    Panel("Training loss", ("train/loss",), "Methods' losses are not comparable with each other."),
    Panel("Gradient norm", ("train/grad_norm",), "Before clipping."),
    Panel(
        "Engine and trainer apart",
        ("engine/mismatch_kl",),
        "KL between the engine's and the trainer's log-probabilities; float noise is the floor.",
    ),
)


def draw(panel: Panel, runs: Mapping[str, Metrics], colours: Mapping[str, str]) -> str | None:
    """The panel as an SVG element; None where no run has any of its quantities."""
    lines = [
        (name, index, *_series(rows, key))
        for name, rows in runs.items()
        for index, key in enumerate(panel.keys)
    ]
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    scale = 100.0 if panel.percent else 1.0
    with matplotlib.rc_context({"svg.fonttype": "none", "font.family": "sans-serif"}):
        figure = Figure(figsize=(4.6, 2.7), layout="constrained")
        axes = figure.add_subplot()
        for name, index, steps, values in lines:
            axes.plot(
                steps,
                [scale * value for value in values],
                color=colours[name],
                linewidth=1.7 if index == 0 else 1.1,
                linestyle="-" if index == 0 else "--",
                marker="o" if len(steps) <= 6 else None,
                markersize=3.5,
            )
        axes.set_xlabel("step", color="#64748b")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("%" if panel.percent else "", color="#64748b")
        axes.grid(color="#e2e8f0", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#cbd5e1")
        axes.tick_params(colors="#64748b", labelsize=8)
        if panel.percent:
            axes.set_ylim(bottom=0)
        return _svg(figure, panel.title)


def _series(rows: Metrics, key: str) -> tuple[list[int], list[float]]:
    points = [(int(row["step"]), float(row[key])) for row in rows if row.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _svg(figure: Figure, label: str) -> str:
    """The <svg> element alone, named for screen readers."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = stream.getvalue()
    return f'<svg role="img" aria-label="{label}" ' + text[text.index("<svg") + len("<svg ") :]
