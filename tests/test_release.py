"""A wheel, installed outside the checkout: it has its recipes, and trains."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel was installed; its dependencies are this environment's."""
    folder = tmp_path_factory.mktemp("release")
    source = folder / "source"
    # setuptools writes into the folder that it builds: a copy, so that the checkout stays clean.
    names = subprocess.run(
        ["git", "ls-files", "megatron_sgopd", "recipes", "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    for name in names:
        copy = source / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            copy.symlink_to(os.readlink(ROOT / name))
        else:
            copy.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index", "--no-build-isolation", "--quiet"]
    target = folder / "site"
    subprocess.run([*pip, "install", *offline, "--target", target, source], check=True)
    return target


def sgopd(installed: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs the installed package's command, away from the checkout."""
    return subprocess.run(
        [sys.executable, "-m", "megatron_sgopd", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )


def test_it_is_the_wheel_that_answers(installed: Path, tmp_path: Path) -> None:
    result = sgopd(installed, "--version", cwd=tmp_path)
    assert result.stdout.startswith(f"sgopd {VERSION}; torch 2."), result.stdout + result.stderr


def test_the_wheel_carries_every_recipe(installed: Path, tmp_path: Path) -> None:
    shipped = installed / "megatron_sgopd" / "recipes"
    wanted = {p.relative_to(ROOT / "recipes") for p in (ROOT / "recipes").rglob("*.yaml")}
    assert {p.relative_to(shipped) for p in shipped.rglob("*.yaml")} == wanted
    result = sgopd(installed, "config", "recipes/demo/sg_opd.yaml", cwd=tmp_path)
    assert "method: sg_opd" in result.stdout, result.stderr
    result = sgopd(installed, "config", "recipes/demo/sg_opq.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert re.search(r"did you mean recipes/demo/sg_opd\.yaml\?", result.stderr)


def test_the_wheel_trains(installed: Path, world: Path, tmp_path: Path) -> None:
    result = sgopd(
        installed,
        "train",
        "recipes/demo/sg_opd.yaml",
        f"model.student.hf_path={world}/student/hf",
        f"model.teacher.hf_path={world}/teacher/hf",
        f"data.train={world}/train.jsonl",
        "evaluation.data=null",
        "evaluation.during_data=null",
        "evaluation.every=0",
        "evaluation.at_end=false",
        "parallel.tensor_model_parallel_size=1",
        "num_steps=1",
        "optimizer.lr_warmup_steps=0",
        "rollout.num_prompts=2",
        "rollout.n=2",
        "rollout.max_new_tokens=8",
        "logging.progress=false",
        f"logging.run_dir={tmp_path}/run",
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "status").read_text() == "finished\n"
    assert (tmp_path / "run" / "hf" / "model.safetensors").is_file()


def test_the_changelog_has_this_version() -> None:
    assert f"## {VERSION}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {VERSION}" in (ROOT / "CITATION.cff").read_text()
