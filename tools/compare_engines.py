"""Where a recipe's time goes with each rollout engine, side by side in one run.

Trains RECIPE for a few steps with the embedded engine, with vLLM, and with vLLM one step off, one
after the other, and prints a table in Markdown: mean seconds of a step by phase. Runs go into a
folder of their own, evaluation and checkpoints are off.

  generate   from the first request to the last completion, teacher rollouts too
  label      what the verifier takes longer than generation
  teacher    the frozen models' forward passes
  train      forward and backward passes, optimizer
  resync     weights to the engine, and the guard's probe
  other      the rest of the step
  waits      of the step, the time in which the trainer's ranks wait for rollouts
  idle       of the step, the time in which the rollout engine generates nothing
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

ENGINES = {
    "embedded": ("rollout.engine=embedded",),
    "vLLM": ("rollout.engine=vllm",),
    "vLLM, one step off": ("rollout.engine=vllm", "rollout.max_policy_lag=1"),
}
COLUMNS = ("generate", "label", "teacher", "train", "resync", "other", "step", "waits", "idle")
PLAIN = (
    "evaluation.every=0",
    "evaluation.at_start=false",
    "evaluation.at_end=false",
    "checkpoint.every=0",
    "checkpoint.at_end=false",
    "checkpoint.save_hf=false",
    "optimizer.lr_warmup_steps=0",
)
Row = dict[str, float]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", metavar="RECIPE")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--steps", type=int, default=14, help="default: %(default)s")
    parser.add_argument(
        "--skip", type=int, default=2, help="first steps left out of the means; default: 2"
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.skip < arguments.steps:
        parser.error(f"--skip is {arguments.skip}; below --steps {arguments.steps}")
    table = {}
    with tempfile.TemporaryDirectory(prefix="sgopd-engines-") as folder:
        for number, (name, settings) in enumerate(ENGINES.items()):
            print(f"[{number + 1}/{len(ENGINES)}] {name}", flush=True)
            run_dir = Path(folder) / str(number)
            overrides = [*PLAIN, *settings, *arguments.overrides]
            overrides += [f"num_steps={arguments.steps}", f"logging.run_dir={run_dir}"]
            command = [sys.executable, "-m", "megatron_sgopd", "train", arguments.recipe]
            if code := subprocess.run([*command, *overrides], check=False).returncode:
                return code
            text = (run_dir / "metrics.jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.splitlines()]
            ahead = "one step off" in name
            waiting = name != "embedded"  # an embedded engine decodes in the trainer's own ranks
            last = -1 if ahead else None  # nothing is generated while the last step trains
            kept = rows[arguments.skip : last]
            table[name] = means([phases(row, waiting=waiting) for row in kept])
    print("\n" + markdown(table))
    return 0


def phases(row: Row, *, waiting: bool) -> Row:
    """Seconds of one step, from its row of metrics.jsonl."""

    def of(*names: str) -> float:
        return sum(row.get(f"time/{name}_s", 0.0) for name in names)

    seconds = {
        "generate": of("generate_student", "generate_teacher"),
        "label": of("label"),
        "teacher": of("score"),
        "train": of("train"),
        "resync": of("push_weights"),
        "step": of("step"),
        "waits": of("rollout") if waiting else 0.0,
    }
    seconds["other"] = seconds["step"] - of("rollout", "score", "train", "push_weights")
    seconds["idle"] = max(0.0, seconds["step"] - seconds["generate"])
    return seconds


def means(rows: Sequence[Row]) -> Row:
    return {name: fmean(row[name] for row in rows) for name in rows[0]}


def markdown(table: dict[str, Row]) -> str:
    lines = [
        "| seconds per step | " + " | ".join(COLUMNS) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    for name, row in table.items():
        lines.append(f"| {name} | " + " | ".join(f"{row[c]:.2f}" for c in COLUMNS) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
