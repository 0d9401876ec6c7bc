"""One self-contained HTML page from run folders alone: table, curves, sampled rollouts.

A run folder may lack any of its files or quantities: what is there is shown.
"""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_sgopd.atomic_files import read_json_lines, write_file
from megatron_sgopd.evaluation.accuracy import paired_difference, summarize
from megatron_sgopd.evaluation.folder import read_records
from megatron_sgopd.evaluation.report_figures import COLOURS, PANELS, draw
from megatron_sgopd.evaluation.tables import interval, percent

BASELINE_METHOD = "opd"
_EXAMPLES = 3  # rollouts shown per run, moment and outcome

_STYLE = """
:root { color-scheme: light; }
body { margin: 0; background: #f8fafc; color: #0f172a;
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 44px 0 12px; }
h3 { font-size: 15px; margin: 0; } .muted { color: #64748b; } small { color: #64748b; }
.card { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: 16px 18px; }
.wide { overflow-x: auto; } .grid { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(320px, 100%), 1fr)); }
.grid svg { width: 100%; height: auto; display: block; margin-top: 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: right; font-weight: 600; color: #475569; border-bottom: 2px solid #e2e8f0; }
th, td { padding: 7px 10px; white-space: nowrap; } td { text-align: right;
  border-bottom: 1px solid #f1f5f9; } th:first-child, td:first-child { text-align: left; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 50%; margin-right: 7px; }
.legend span { margin-right: 18px; } ul { margin: 8px 0; padding-left: 20px; }
details { margin-top: 10px; } summary { cursor: pointer; font-weight: 600; }
.rollout { display: grid; grid-template-columns: 64px 1fr; gap: 2px 12px; padding: 8px 0;
  border-bottom: 1px solid #f1f5f9; font-size: 13px; }
.rollout code { font: 13px/1.5 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; } .right { color: #047857; } .wrong { color: #b91c1c; }
"""


@dataclass(frozen=True)
class RunFolder:
    """Describes what a run has left, as far as it is there."""

    name: str
    summary: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evaluation: list[dict[str, Any]] = field(default_factory=list)  # records of the last
    rollouts: dict[int, list[dict[str, Any]]] = field(default_factory=dict)  # by step

    @property
    def is_distillation(self) -> bool:
        """Tells whether the student sampled: supervised runs have no rollout curves."""
        return any("rollout/accuracy" in row for row in self.metrics)


def read_run(directory: Path) -> RunFolder:
    """Reads a run folder. ValueError when it is none, or when a line of it is not JSON."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is no folder; wanted a run folder such as runs/NAME")
    summary_path = directory / "summary.json"
    run = RunFolder(
        name=directory.name,
        summary=json.loads(summary_path.read_text()) if summary_path.is_file() else {},
        metrics=list(read_json_lines(directory / "metrics.jsonl")),
        evaluation=_last_evaluation(directory),
    )
    for path in sorted((directory / "rollouts").glob("step-*.jsonl")):
        run.rollouts[int(path.stem.removeprefix("step-"))] = list(read_json_lines(path))
    if not (run.summary or run.metrics or run.evaluation or run.rollouts):
        raise ValueError(f"{directory} has no metrics.jsonl, summary.json, evaluation or rollouts")
    return run


def write_report(
    run_dirs: Sequence[Path],
    out_html: Path,
    *,
    title: str = "Sign-gated on-policy distillation",
    notes: Sequence[str] = (),
) -> None:
    """Writes the page: one file, nothing fetched from anywhere.

    Args:
        run_dirs: run folders, in the order of the table.
        out_html: the file to write; its folder is made.
        notes: sentences shown above the table.

    Raises ValueError for a folder that holds no run.
    """
    if not run_dirs:
        raise ValueError("no run folder was given; wanted at least one")
    runs = _with_own_names([read_run(Path(directory)) for directory in run_dirs])
    colours = {run.name: COLOURS[i % len(COLOURS)] for i, run in enumerate(runs)}
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f'<p class="muted">{_subtitle(runs)}</p>',
        _notes(notes),
        f"<h2>Results</h2>{_table(runs, colours)}",
        _curves(runs, colours),
        _samples(runs),
    ]
    page = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main></body></html>\n"
    )
    write_file(out_html, page)


def _last_evaluation(directory: Path) -> list[dict[str, Any]]:
    folder = directory / "evaluation" / "final"
    return read_records(folder) if (folder / "settings.json").is_file() else []


def _with_own_names(runs: Sequence[RunFolder]) -> list[RunFolder]:
    """Folders of one name, from different places, are told apart by a number."""
    named, seen = [], dict[str, int]()
    for run in runs:
        seen[run.name] = seen.get(run.name, 0) + 1
        name = run.name if seen[run.name] == 1 else f"{run.name} ({seen[run.name]})"
        named.append(RunFolder(name, run.summary, run.metrics, run.evaluation, run.rollouts))
    return named


def _subtitle(runs: Sequence[RunFolder]) -> str:
    engines = {run.summary.get("engine") for run in runs if run.is_distillation} - {None}
    seeds = sorted({str(run.summary["seed"]) for run in runs if "seed" in run.summary})
    parts = [f"{len(runs)} runs"]
    parts += [f"seed {', '.join(seeds)}"] if seeds else []
    parts += [f"rollouts by the {', '.join(sorted(map(str, engines)))} engine"] if engines else []
    return html.escape(" · ".join(parts))


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return f'<div class="card"><ul>{items}</ul></div>'


def _table(runs: Sequence[RunFolder], colours: Mapping[str, str]) -> str:
    """Accuracies in per cent; the difference to the first OPD run, paired by problem."""
    baseline = next((r for r in runs if r.summary.get("method") == BASELINE_METHOD), None)
    header = ["", "method", "estimator", "avg@k", "95 %", "pass@k", "k", "greedy", "steps", "s"]
    if baseline is not None:
        header.insert(5, f"minus {baseline.name}")
    rows = []
    for run in runs:
        figures = {**run.summary, **(summarize(run.evaluation) if run.evaluation else {})}
        dot = f'<i class="dot" style="background:{colours[run.name]}"></i>'
        cells = [
            dot + html.escape(run.name),
            html.escape(str(figures.get("method", ""))),
            html.escape(str(figures.get("estimator", "")) if run.is_distillation else ""),
            percent(figures.get("avg_at_k")),
            interval(figures["ci95"]) if figures.get("ci95") else "",
            percent(figures.get("pass_at_k")),
            str(figures.get("k", "")),
            percent(figures.get("greedy")),
            str(figures.get("steps", "")),
            _seconds(figures.get("seconds")),
        ]
        if baseline is not None:
            cells.insert(5, _difference(run, baseline))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    return (
        f'<div class="card wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div><p><small>Accuracies in per cent at "
        f"temperature 1, greedy beside them; intervals are 95 % bootstraps over problems, which do "
        f"not hold what another seed of the training would change.</small></p>"
    )


def _difference(run: RunFolder, baseline: RunFolder) -> str:
    """Points of avg@k with the interval; empty where the two saw different problems."""
    if run.name == baseline.name or not (run.evaluation and baseline.evaluation):
        return ""
    try:
        difference = paired_difference(run.evaluation, baseline.evaluation)
    except ValueError:
        return "other problems"
    return f"{100 * difference.mean:+.1f} <small>{interval(difference.ci95)}</small>"


def _curves(runs: Sequence[RunFolder], colours: Mapping[str, str]) -> str:
    distilled = {run.name: run.metrics for run in runs if run.is_distillation}
    taught = {run.name: run.metrics for run in runs if run.metrics and not run.is_distillation}
    sections = []
    of_training = [panel for panel in PANELS if panel.keys[0].startswith(("train/", "student/"))]
    for heading, group, panels in (
        ("Learning curves", distilled, PANELS),
        ("Supervised training", taught, of_training),
    ):
        cards = [
            f'<div class="card"><h3>{panel.title}</h3><small>{panel.note}</small>{svg}</div>'
            for panel in panels
            if (svg := draw(panel, group, colours)) is not None
        ]
        if cards:
            legend = "".join(
                f'<span><i class="dot" style="background:{colours[name]}"></i>'
                f"{html.escape(name)}</span>"
                for name in group
            )
            sections.append(
                f'<h2>{heading}</h2><p class="legend">{legend}</p>'
                f'<div class="grid">{"".join(cards)}</div>'
            )
    return "".join(sections)


def _samples(runs: Sequence[RunFolder]) -> str:
    """Right and wrong rollouts of each run's first and last sample."""
    cards = []
    for run in runs:
        if not run.rollouts:
            continue
        steps = sorted(run.rollouts)
        parts = [
            f"<details{' open' if step == steps[-1] else ''}><summary>step {step}</summary>"
            f"{''.join(_rollout(r) for r in _right_and_wrong(run.rollouts[step]))}</details>"
            for step in dict.fromkeys((steps[0], steps[-1]))
        ]
        cards.append(f'<div class="card"><h3>{html.escape(run.name)}</h3>{"".join(parts)}</div>')
    return f'<h2>Sampled rollouts</h2><div class="grid">{"".join(cards)}</div>' if cards else ""


def _right_and_wrong(rollouts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    right = [r for r in rollouts if r.get("is_correct")][:_EXAMPLES]
    return right + [r for r in rollouts if not r.get("is_correct")][:_EXAMPLES]


def _rollout(rollout: Mapping[str, Any]) -> str:
    is_correct = bool(rollout.get("is_correct"))
    mark = '<b class="right">right</b>' if is_correct else '<b class="wrong">wrong</b>'
    source = html.escape(str(rollout.get("source", "")))
    prompt, completion = (html.escape(str(rollout.get(k, ""))) for k in ("prompt", "completion"))
    answer = html.escape(str(rollout.get("answer", "")))
    return (
        f'<div class="rollout"><div>{mark}<br><small>{source}</small></div><div>'
        f"<small>{prompt}</small><br><code>{completion}</code><br>"
        f"<small>answer {answer}</small></div></div>"
    )


def _seconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds:.0f}"
