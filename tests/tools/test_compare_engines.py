"""tools/compare_engines.py: what its table is made of."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tools.compare_engines import markdown, means, phases

ROW = {
    "time/rollout_s": 3.0,
    "time/generate_student_s": 2.0,
    "time/generate_teacher_s": 0.5,
    "time/label_s": 0.25,
    "time/score_s": 1.0,
    "time/train_s": 2.0,
    "time/push_weights_s": 0.5,
    "time/step_s": 7.0,
}


def test_phases_of_a_step() -> None:
    told = phases(ROW, waiting=True)
    assert told["generate"] == 2.5 and told["label"] == 0.25 and told["resync"] == 0.5
    assert told["other"] == pytest.approx(0.5)  # 7 - 3 - 1 - 2 - 0.5
    assert told["waits"] == 3.0 and told["idle"] == 4.5
    assert phases(ROW, waiting=False)["waits"] == 0.0


def test_the_table_holds_the_means() -> None:
    later = {**ROW, "time/train_s": 4.0}
    row = means([phases(ROW, waiting=True), phases(later, waiting=True)])
    head, _, line = markdown({"vLLM": row}).splitlines()
    assert head.startswith("| seconds per step | generate | label |")
    assert line.startswith("| vLLM | 2.50 | 0.25 | 1.00 | 3.00 | 0.50 |")


def test_a_skip_of_all_steps_is_refused() -> None:
    command = [sys.executable, "tools/compare_engines.py", "r.yaml", "--steps", "2", "--skip", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--skip is 2; below --steps 2" in done.stderr
