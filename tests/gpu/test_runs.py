"""Whole runs of `sgopd train` on one GPU: embedded engine, and vLLM on the trainer's own device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.demo.models import STUDENT, TEACHER, write_model_dir
from megatron_sgopd.demo.world import WorldSizes, write_world

ROOT = Path(__file__).resolve().parents[2]
SIZES = WorldSizes(train=64, dev=8, test=8, teacher=64, student_noisy=32, student_terse=32)
ONE_RANK = ["parallel.tensor_model_parallel_size=1", "logging.progress=false"]


def train(recipe: str, *overrides: str, device: str = "cuda", fails: bool = False) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sgopd", "train", recipe, *ONE_RANK, *overrides],
        cwd=ROOT,
        env={**os.environ, "SGOPD_DEVICE": device},
        capture_output=True,
        text=True,
        timeout=400,
    )
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == fails, said[-6000:]
    return said


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, seed=3, level="normal", sizes=SIZES)
    for name, size in (("student", STUDENT), ("teacher", TEACHER)):
        write_model_dir(folder / "bare" / name, size)
        train(f"recipes/demo/{name}.yaml", *sft(folder, name), f"logging.run_dir={folder}/{name}")
    return folder


def sft(folder: Path, name: str) -> list[str]:
    return [
        f"model.student.hf_path={folder}/bare/{name}",
        f"data.train={folder}/{name}_sft.jsonl",
        "evaluation.data=null",
        "evaluation.every=0",
        "num_steps=12",
        "rollout.num_prompts=16",
        "optimizer.lr_warmup_steps=0",
    ]


def arm(folder: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [
        f"model.student.hf_path={folder}/student/hf",
        f"model.teacher.hf_path={folder}/teacher/hf",
        f"data.train={folder}/train.jsonl",
        f"evaluation.data={folder}/test.jsonl",
        "evaluation.every=0",
        "evaluation.k=2",
        "num_steps=4",
        "rollout.num_prompts=8",
        "optimizer.lr_warmup_steps=0",
        f"logging.run_dir={run_dir}",
        *overrides,
    ]


def test_training_is_the_cpus(world: Path, tmp_path: Path) -> None:
    """The same losses and gradient norms, step by step, where nothing is sampled."""
    settings = [*sft(world, "student"), "num_steps=5"]
    train("recipes/demo/student.yaml", *settings, f"logging.run_dir={tmp_path}/cpu", device="cpu")
    train("recipes/demo/student.yaml", *settings, f"logging.run_dir={tmp_path}/gpu")
    for cpu, gpu in zip(rows(tmp_path / "cpu"), rows(tmp_path / "gpu"), strict=True):
        assert gpu["train/loss"] == pytest.approx(cpu["train/loss"], rel=1e-4)
        assert gpu["train/grad_norm"] == pytest.approx(cpu["train/grad_norm"], rel=1e-3)
    assert "memory/peak_gib" in rows(tmp_path / "gpu")[0]
    assert "memory/peak_gib" not in rows(tmp_path / "cpu")[0]


VARIANTS = {
    "float32": [],
    "bfloat16": ["model.dtype=bfloat16"],
    "packed": ["parallel.micro_batch_tokens=256", "model.dtype=bfloat16"],
    "recompute": ["parallel.recompute_granularity=full", "parallel.use_distributed_optimizer=true"],
    "offload": [
        "model.teacher.offload=true",
        "model.reference.offload=true",
        "optimizer.offload=true",
        "parallel.hidden_states_budget_mb=0.01",
    ],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_arm_trains_stops_and_resumes(world: Path, tmp_path: Path, variant: str) -> None:
    recipe = "recipes/demo/sg_opd_full_vocab.yaml"
    settings = arm(world, tmp_path / "run", *VARIANTS[variant], "checkpoint.at_end=true")
    train(recipe, *settings, "num_steps=2")
    train(recipe, *settings)
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == [1, 2, 3, 4]
    loose = "bfloat16" in str(VARIANTS[variant])
    assert all(row["engine/mismatch_kl"] < (1e-2 if loose else 1e-6) for row in log)
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


COLOCATED = [
    "rollout.engine=vllm",
    "rollout.vllm.colocated=true",
    "rollout.vllm.gpu_memory_utilization=0.2",
    "rollout.vllm.teacher.gpu_memory_utilization=0.15",
    "rollout.vllm.extra_args=['--enforce-eager']",
]
VLLM = {
    "ipc, bfloat16": ["model.dtype=bfloat16"],
    "ipc, float32": ["model.dtype=float32"],
    "file": ["model.dtype=bfloat16", "rollout.vllm.weight_transfer=file"],
}


@pytest.mark.parametrize("variant", VLLM)
def test_vllm_on_the_trainers_gpu(world: Path, tmp_path: Path, variant: str) -> None:
    """Servers of student and teacher; every push is proven by the guard."""
    settings = arm(world, tmp_path / "run", *COLOCATED, *VLLM[variant])
    said = train("recipes/demo/sg_opd.yaml", *settings)
    log = rows(tmp_path / "run")
    assert [row["step"] for row in log] == [1, 2, 3, 4], said[-3000:]
    assert all(row["engine/restarts"] == 0 for row in log)
    assert log[0]["phases/realised_fraction"] >= 0
    print({k: [row[k] for row in log] for k in ("engine/probe_mismatch_kl",) if k in log[0]})
    print((tmp_path / "run" / "engines" / "student-0.log").read_text()[-3000:])
