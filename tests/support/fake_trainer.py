"""A stand-in for `sgopd train` in tests: it leaves a run folder and learns nothing.

    python fake_trainer.py RECIPE key=value ...

`fake.fail=NAME` makes the run of that folder name end with an error; `fake.empty=NAME` makes it end
well and leave nothing.
"""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

SAMPLES = 8


def main() -> int:
    overrides = dict(a.removeprefix("++").split("=", 1) for a in sys.argv[2:])
    run_dir = Path(overrides["logging.run_dir"])
    if overrides.get("fake.fail") == run_dir.name:
        print("ValueError: optimizer.lr is -1; wanted a positive number", file=sys.stderr)
        return 3
    if overrides.get("fake.empty") == run_dir.name:
        return 0
    problems = [json.loads(s) for s in Path(overrides["evaluation.data"]).read_text().splitlines()]
    write_run(run_dir, problems, method_of(run_dir.name), seed=int(overrides["seed"]))
    with (run_dir.parent / "trained.txt").open("a") as log:
        print(run_dir.name, file=log)
    return 0


def method_of(name: str) -> str:
    if name in ("teacher", "student"):
        return "sft"
    return "opd" if name == "opd" else "sg_opd"


def write_run(
    run_dir: Path,
    problems: list[dict],
    method: str,
    *,
    seed: int = 0,
    accuracy: float | None = None,
) -> None:
    """A run folder as the trainer leaves one, with drawn outcomes."""
    rng = random.Random(f"{seed}/{run_dir.name}")
    known = {"teacher": 0.8, "student": 0.12, "opd": 0.55}
    accuracy = known.get(run_dir.name, 0.62) if accuracy is None else accuracy
    for folder in ("evaluation", "rollouts", "hf"):
        (run_dir / folder).mkdir(parents=True, exist_ok=True)
    (run_dir / "hf" / "config.json").write_text("{}\n")
    _write_evaluation(run_dir / "evaluation" / "final", problems, accuracy, rng)
    rows = [_metrics(step, method, accuracy, rng) for step in range(1, 31)]
    _write(run_dir / "metrics.jsonl", rows)
    if method != "sft":
        for step in (10, 30):
            sample = [_rollout(step, p, rng) for p in problems[:6]]
            _write(run_dir / "rollouts" / f"step-{step:06d}.jsonl", sample)
    estimator = "full_vocab" if "full_vocab" in run_dir.name else "sampled"
    summary: dict[str, object] = {"method": method, "estimator": estimator, "engine": "embedded"}
    summary |= {"engine_version": "0", "steps": 30, "seconds": 41.5, "seed": seed}
    (run_dir / "summary.json").write_text(json.dumps(summary))


def _write_evaluation(
    folder: Path, problems: list[dict], accuracy: float, rng: random.Random
) -> None:
    """An evaluation folder with one benchmark, "test"."""
    for name in ("problems", "samples"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    keys = ("id", "problem", "answer")
    _write(folder / "problems" / "test.jsonl", [{k: p[k] for k in keys} for p in problems])
    rows = [row for problem in problems for row in _answers(problem, accuracy, rng)]
    _write(folder / "samples" / "test.jsonl", rows)
    settings = {
        "name": "fake",
        "model": {"path": str(folder), "content": "none"},
        "verifier": "math_verify",
        "scoring": {"n": SAMPLES, "k": SAMPLES, "greedy": True, "bootstrap_samples": 100},
        "benchmarks": {"test": {"problems": "p", "prompts": "q"}},
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "summary.json").write_text("{}")


def _answers(problem: dict, accuracy: float, rng: random.Random) -> list[dict]:
    difficulty = rng.betavariate(4 * accuracy, 4 * (1 - accuracy))
    marks = [rng.random() < difficulty for _ in range(SAMPLES)] + [rng.random() < accuracy]
    return [
        {
            "id": problem["id"],
            "sample": sample,
            "completion": problem["solution"],
            "length": 5,
            "finish_reason": "stop",
            "is_correct": mark,
        }
        for sample, mark in zip([*range(SAMPLES), -1], marks, strict=True)
    ]


def _metrics(step: int, method: str, accuracy: float, rng: random.Random) -> dict:
    row: dict[str, float] = {"step": step, "train/loss": 3 * math.exp(-step / 9), "train/lr": 7e-4}
    row["train/grad_norm"] = 1 + rng.random()
    if method == "sft":
        return row | {"phases/realised_fraction": 0.0}
    row["rollout/accuracy"] = 0.1 + (accuracy - 0.1) * step / 30 + rng.gauss(0, 0.03)
    row["rollout/length"] = 30 + 4 * rng.random()
    row["distill/reverse_kl"] = 5 * math.exp(-step / 6)
    row["student/entropy"] = 0.1 + 0.8 * math.exp(-step / 8)
    row["engine/mismatch_kl"] = 1e-9 * rng.random()
    row["gate/mixed_groups"] = 0.5 + rng.gauss(0, 0.05)
    if step % 10 == 0:
        row["evaluation/avg_at_k"] = 0.1 + (accuracy - 0.1) * step / 30
    if method == "sg_opd":
        row["gate/open_rate"] = 0.3 + rng.gauss(0, 0.02)
        row["gate/open_rate_mixed"] = 0.5 + rng.gauss(0, 0.02)
        row["phases/requested_fraction"] = max(0.0, 0.5 - step / 24)
        row["phases/realised_fraction"] = 0.8 * max(0.0, 0.5 - step / 24)
    return row


def _rollout(step: int, problem: dict, rng: random.Random) -> dict:
    right = rng.random() < 0.5
    text = problem["solution"] if right else "<b>3+3=5;</b>\\boxed{9} & so on"
    return {
        "step": step,
        "prompt": problem["problem"],
        "completion": text,
        "answer": problem["answer"],
        "is_correct": right,
        "source": "student",
        "verifier_advantage": 1.0 if right else -1.0,
    }


def _write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
