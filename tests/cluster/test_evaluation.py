"""`bash slurm/evaluate.sh`: an array of evaluations, and their table."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.cluster.conftest import Tiny
from tests.cluster.jobs import Cluster, Job

SETTINGS = [
    "rollout.engine=embedded",
    "model.dtype=float32",
    "rollout.max_prompt_tokens=64",
    "evaluation.max_new_tokens=16",
    "evaluation.n=2",
    "evaluation.k=2",
    "data.prompt_suffix=''",
]


def test_models_and_benchmarks_are_an_array_with_one_table(
    cluster: Cluster, tiny: Tiny, shared: Path
) -> None:
    out = shared / "evaluations"
    models, sets = [tiny.student, tiny.teacher], {"dev": "dev.jsonl", "test": "test.jsonl"}
    benchmarks = [f"{name}={tiny.world / file}" for name, file in sets.items()]
    said = cluster.call(
        *("bash", "slurm/evaluate.sh", str(out), *map(str, models), "--"),
        *(*benchmarks, "--", *SETTINGS),
        SGOPD_GPUS="1",
    )
    (array, last) = map(int, re.findall(r"job (\d+)", said))
    table = Job(cluster, last, out / "logs" / f"sgopd-table_{last}.out")
    assert table.end() == "COMPLETED", table.text + "".join(
        path.read_text() for path in (out / "logs").iterdir()
    )
    rows = json.loads((out / "table.json").read_text())
    labels = ["-".join(model.parts[1:]) for model in models]
    assert [(row["model"], row["benchmark"]) for row in rows] == [
        (label, name) for label in sorted(labels) for name in sets
    ]
    assert {row["num_problems"] for row in rows if row["benchmark"] == "test"} == {6}
    assert {row["num_samples"] for row in rows} == {2}
    text = (out / "table.txt").read_text()
    assert len(text.splitlines()) == 3
    assert len(list((out / "logs").glob(f"sgopd-evaluate_{array}_*.out"))) == 4
