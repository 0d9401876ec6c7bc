"""The merged table of an array of evaluations."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_sgopd.__main__ import main


def write(out: Path, model: str, benchmark: str, avg: float) -> None:
    scores = {"num_samples": 8, "k": 4, "avg_at_k": avg, "pass_at_k": 0.75}
    scores |= {"ci95": [avg - 0.1, avg + 0.1]}
    folder = out / model / benchmark
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"benchmarks": {benchmark: scores}}))


def test_a_line_for_each_model_and_a_column_for_each_benchmark(tmp_path: Path, capsys):
    write(tmp_path, "before", "aime24", 0.125)
    write(tmp_path, "before", "aime25", 0.25)
    write(tmp_path, "after", "aime24", 0.5)
    write(tmp_path, "older", "aime24", 0.1)  # of another call; it hides nothing
    wanted = [f"{model}/{name}" for model in ("before", "after") for name in ("aime24", "aime25")]
    assert main(["cluster", "table", str(tmp_path), *wanted]) == 1
    text = (tmp_path / "table.txt").read_text()
    assert text == (
        "        aime24                               aime25\n"
        "after   avg@8 50.0 [40.0, 60.0] pass@4 75.0  -\n"
        "before  avg@8 12.5 [2.5, 22.5] pass@4 75.0   avg@8 25.0 [15.0, 35.0] pass@4 75.0\n"
        "older   avg@8 10.0 [0.0, 20.0] pass@4 75.0   -\n"
    )
    said = capsys.readouterr().out
    assert f"1 of 4 evaluations are missing, see {tmp_path}/logs: after/aime25\n" in said
    rows = json.loads((tmp_path / "table.json").read_text())
    assert [(r["model"], r["benchmark"], r["avg_at_k"]) for r in rows] == [
        ("after", "aime24", 0.5),
        ("before", "aime24", 0.125),
        ("before", "aime25", 0.25),
        ("older", "aime24", 0.1),
    ]
    write(tmp_path, "after", "aime25", 0.5)
    assert main(["cluster", "table", str(tmp_path), *wanted]) == 0
