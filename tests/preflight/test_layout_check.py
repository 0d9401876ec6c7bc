"""`sgopd doctor --parallel` finds planted faults, and finds nothing where there is none."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import doctor_cases

RECIPE = "recipes/qwen3_1p7b_from_4b.yaml"
TP = "parallel.tensor_model_parallel_size"
PP = "parallel.pipeline_model_parallel_size"
CP = "parallel.context_parallel_size"
PACKED = "parallel.micro_batch_tokens=20000"
PLAIN = [  # the recipe's objective on one replica, and of its layout nothing
    "parallel.data_parallel_size=1",
    "parallel.sequence_parallel=false",
    "parallel.micro_batch_tokens=null",
    "parallel.use_distributed_optimizer=false",
    "parallel.overlap_grad_reduce=false",
    "parallel.recompute_granularity=none",
]

LAYOUTS = {
    "TP2": [f"{TP}=2"],
    "TP2 SP packed": [f"{TP}=2", "parallel.sequence_parallel=true", PACKED],
    "PP2": [f"{TP}=1", f"{PP}=2"],
    "PP2 VPP2": [f"{TP}=1", f"{PP}=2", "parallel.virtual_pipeline_model_parallel_size=2"],
    "CP2 packed": [f"{TP}=1", f"{CP}=2", PACKED],
    "teacher TP1": [f"{TP}=2", "model.teacher.tensor_model_parallel_size=1"],
    "full_vocab": [f"{TP}=2", "distill.estimator=full_vocab", "rollout.tis=none"],
    "DP2, overlapped": [
        f"{TP}=1",
        "parallel.data_parallel_size=2",
        "parallel.use_distributed_optimizer=true",
        "parallel.overlap_grad_reduce=true",
        "parallel.overlap_param_gather=true",
    ],
}
FAULTS = {
    "norms are not summed over TP": ("TP2", "norm", "summed over tensor parallel ranks"),
    "the loss is scaled by PP": ("PP2", "", "all by the factor 2.0000"),
    "one CP rank's tokens count twice": ("CP2 packed", "", "do not train with this layout"),
}


def check(pool: Any, layout: str, fault: str | None = None) -> Any:
    overrides = [*PLAIN, *LAYOUTS[layout]]
    first, second = pool(2).run(doctor_cases.check, RECIPE, overrides, fault)
    assert first == second
    return first


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sound_layout_passes(pool: Any, layout: str) -> None:
    report = check(pool, layout)
    assert report.ok, report.lines()
    assert report.worst in report.lines()[3]
    assert f"{report.gradient_errors[report.worst]:.1e}" in report.lines()[3]
    assert report.lines()[-1].startswith("ok")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found_and_named(pool: Any, fault: str) -> None:
    layout, where, hint = FAULTS[fault]
    report = check(pool, layout, fault)
    assert not report.ok
    assert where in report.worst
    assert report.gradient_errors[report.worst] > 1e-2
    assert report.worst in "\n".join(report.lines())
    assert report.lines()[-1].startswith("FAILED")
    assert hint in report.lines()[-1]


def test_the_command_on_a_recipe(tmp_path: Path) -> None:
    """As a user types it: it starts its ranks, prints the worst parameter, and says ok."""
    command = [sys.executable, "-m", "megatron_sgopd", "doctor", "--parallel", RECIPE]
    done = subprocess.run(
        [*command, f"{TP}=2", "parallel.data_parallel_size=1"],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "starting 2 ranks" in done.stdout
    assert "the worst is model." in done.stdout
    assert "ok: the layout" in done.stdout
    assert not list(tmp_path.glob("sgopd-doctor-*"))
