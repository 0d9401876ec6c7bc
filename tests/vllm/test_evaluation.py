"""`sgopd evaluate` on a real vLLM server, against the embedded engine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_sgopd.evaluation.samples import read_samples
from tests.support.evaluation_cases import SHORT, make_model, on_ranks, write_sets


def test_a_server_with_its_own_weights_answers_as_the_embedded_engine(
    pool: Any, tmp_path: Path
) -> None:
    model, sets = make_model(tmp_path / "model", seed=1), write_sets(tmp_path / "sets")
    stops = "rollout.stop_token_ids=[" + ",".join(map(str, range(40))) + "]"
    own = "verifier.name=tests.support.evaluation_cases.judge"
    given = [str(model), *sets, *SHORT, stops, own]
    program = [sys.executable, "-m", "megatron_sgopd", "evaluate", *given, "rollout.engine=vllm"]
    done = subprocess.run([*program, "--out", str(tmp_path / "vllm")], timeout=200)
    assert done.returncode == 0
    assert pool(1).run(on_ranks, [*given, "--out", str(tmp_path / "embedded")]) == ["finished"]
    summaries = [
        json.loads((tmp_path / name / "summary.json").read_text()) for name in ("vllm", "embedded")
    ]
    assert [s["engine"] for s in summaries] == ["vllm", "embedded"]
    assert summaries[0]["engine_version"] == "0.32.0"
    assert summaries[0]["greedy"] == summaries[1]["greedy"]
    for name in ("aime25", "hmmt"):
        theirs, ours = (read_samples(tmp_path / e, name) for e in ("vllm", "embedded"))
        assert theirs.keys() == ours.keys()
        greedy = [key for key in ours if key[1] < 0]
        assert greedy and all(theirs[key] == ours[key] for key in greedy)
        assert len({row["completion"] for row in theirs.values()}) > len(greedy)
