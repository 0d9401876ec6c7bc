"""Makes table, summary, and sentences that say no more than the figures, of evaluations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sgopd.demo.arms import BASELINE, LIFT_BAR
from megatron_sgopd.evaluation.accuracy import Difference, Record, paired_difference, summarize
from megatron_sgopd.evaluation.folder import read_records
from megatron_sgopd.evaluation.tables import aligned, interval, percent

QUICK_VERDICT = "Quick form: a few steps on a few problems, which make no claim on accuracy."


def read_evaluation(run_dir: Path) -> list[dict[str, Any]]:
    """Reads the records of a run's last evaluation."""
    return read_records(run_dir / "evaluation" / "final")


def compare(
    evaluations: Mapping[str, Sequence[Record]], run_summaries: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """`student`, `teacher` and `arms` of the demonstration's summary.json.

    Args:
        evaluations: final records of `student` (before), `teacher` and each arm.
        run_summaries: each arm's own summary.json.
    """
    before, teacher = summarize(evaluations["student"]), summarize(evaluations["teacher"])
    arms = {}
    for name, run in run_summaries.items():
        records = evaluations[name]
        arms[name] = {
            **{key: run.get(key) for key in ("method", "estimator", "engine", "engine_version")},
            "seeds": [run.get("seed")],
            "steps": run.get("steps"),
            "seconds": run.get("seconds"),
            **summarize(records),
            "initial_avg_at_k": before["avg_at_k"],
            "teacher_avg_at_k": teacher["avg_at_k"],
            "lift": _as_json(paired_difference(records, evaluations["student"])),
        }
        if BASELINE in run_summaries and name != BASELINE:
            difference = paired_difference(records, evaluations[BASELINE])
            arms[name][f"minus_{BASELINE}"] = _as_json(difference)
    return {"arms": arms, "student": before, "teacher": teacher}


def readings(comparison: Mapping[str, Any]) -> list[str]:
    """Returns what the figures say, a sentence each, with their intervals and their limits."""
    arms, before = comparison["arms"], comparison["student"]
    sentences = []
    for name, arm in arms.items():
        reached = "reached" if arm["lift"]["mean"] >= LIFT_BAR else "missed"
        sentences.append(
            f"{name} - student before: {_signed(arm['lift'])} points of avg@{arm['k']}; "
            f"the bar of +{100 * LIFT_BAR:.0f} is {reached}."
        )
    for name, arm in arms.items():
        if difference := arm.get(f"minus_{BASELINE}"):
            verdict = (
                "separated from zero on these problems, by one seed of training"
                if difference["separated"]
                else "not separated from zero; one seed cannot say more"
            )
            sentences.append(f"{name} - {BASELINE}: {_signed(difference)}: {verdict}.")
    sentences += _confounds(arms)
    sentences += _greedy_readings(arms, before)
    sentences += _teacher_readings(arms, comparison["teacher"])
    sentences.append(
        "Intervals are 95 % bootstraps over the test problems: they do not hold what another seed "
        "of the training would change."
    )
    return sentences


def verdict(comparison: Mapping[str, Any], *, quick: bool) -> str:
    """One sentence for the end of the demonstration."""
    if quick:
        return QUICK_VERDICT
    arms = comparison["arms"]
    missed = [name for name, arm in arms.items() if arm["lift"]["mean"] < LIFT_BAR]
    bar = f"{100 * LIFT_BAR:.0f} points"
    first = (
        f"Less than {bar} above the student before: {', '.join(missed)}."
        if missed
        else f"Every arm is at least {bar} above the student before."
    )
    differences = {n: a.get(f"minus_{BASELINE}") for n, a in arms.items()}
    better = [n for n, d in differences.items() if d and d["separated"] and d["mean"] > 0]
    worse = [n for n, d in differences.items() if d and d["separated"] and d["mean"] < 0]
    parts = [first]
    if better:
        parts.append(f"Better than {BASELINE} here: {', '.join(better)}.")
    if worse:
        parts.append(f"Worse than {BASELINE} here: {', '.join(worse)}.")
    level = [n for n, d in differences.items() if d and not d["separated"]]
    if level:
        parts.append(f"Not told apart from {BASELINE}: {', '.join(level)}.")
    return " ".join(parts)


def table(comparison: Mapping[str, Any]) -> str:
    """Aligned text, accuracies in per cent, differences in points."""
    arms = comparison["arms"]
    k = comparison["student"]["k"]
    header = [
        "",
        f"avg@{k}",
        "95 %",
        f"pass@{k}",
        "greedy",
        "lift",
        f"minus {BASELINE}",
        "seconds",
    ]
    rows = [header, _row("teacher", comparison["teacher"]), _row("student", comparison["student"])]
    rows += [_row(name, arm) for name, arm in arms.items()]
    return aligned(rows)


def _row(name: str, entry: Mapping[str, Any]) -> list[str]:
    difference, lift = entry.get(f"minus_{BASELINE}"), entry.get("lift")
    seconds = entry.get("seconds")
    return [
        name,
        percent(entry["avg_at_k"]),
        interval(entry["ci95"]),
        percent(entry["pass_at_k"]),
        percent(entry["greedy"]),
        _signed(lift) if lift else "",
        _signed(difference) if difference else "",
        f"{seconds:.0f}" if seconds is not None else "",
    ]


def _confounds(arms: Mapping[str, Any]) -> list[str]:
    """Arms whose difference to the baseline is not the method's alone."""
    if BASELINE not in arms:
        return []
    estimator = arms[BASELINE]["estimator"]
    others = [name for name, arm in arms.items() if arm["estimator"] != estimator]
    if not others:
        return []
    return [
        f"{', '.join(others)}: the estimator is another than {BASELINE}'s ({estimator}), so the "
        f"difference is not the gate's or the phases' alone."
    ]


def _greedy_readings(arms: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    if before["greedy"] is None or any(arm["greedy"] is None for arm in arms.values()):
        return []
    after = ", ".join(f"{name} {percent(arm['greedy'])}" for name, arm in arms.items())
    sentence = f"Greedy accuracy: student before {percent(before['greedy'])}, {after} (per cent)"
    if before["greedy"] > before["avg_at_k"] + 0.2:
        sentence += (
            "; the student knew much of this when greedy, so a good part of the lift is "
            "reliability under sampling"
        )
    return [sentence + "."]


def _teacher_readings(arms: Mapping[str, Any], teacher: Mapping[str, Any]) -> list[str]:
    above = [name for name, arm in arms.items() if arm["ci95"][0] > teacher["avg_at_k"]]
    if above:
        return [f"Above the teacher's {percent(teacher['avg_at_k'])}: {', '.join(above)}."]
    return [f"No arm is clearly above its teacher's {percent(teacher['avg_at_k'])} per cent."]


def _as_json(difference: Difference) -> dict[str, Any]:
    return {
        "mean": difference.mean,
        "ci95": list(difference.ci95),
        "separated": difference.separated,
    }


def _signed(difference: Mapping[str, Any]) -> str:
    return f"{100 * difference['mean']:+.1f} {interval(difference['ci95'])}"
