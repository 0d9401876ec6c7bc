"""`sgopd plan` on the command line: exit codes, JSON, mistakes in one line; who gets which GPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_sgopd.preflight.plan.job import Cluster
from megatron_sgopd.preflight.plan.report import as_json, lines
from tests.preflight.plan.test_plan import EIGHT, OWN, RECIPE, ROOT, plan_of

PROBE = (
    "import sys, atexit; heavy = ('torch', 'transformers', 'megatron', 'numpy'); "
    "atexit.register(lambda: print('loaded:', *[m for m in heavy if m in sys.modules])); "
    "from megatron_sgopd.__main__ import main; sys.exit(main())"
)
CLUSTER = ("--nodes", "1", "--gpus-per-node", "8")


def sgopd_plan(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE, "plan", RECIPE, *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_plan_that_fits_and_its_json(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    done = sgopd_plan(*CLUSTER, "--json", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("the planner's table, as Qwen/Qwen3-4B", "time of a step", "It fits: "):
        assert words in done.stdout
    assert done.stdout.endswith("loaded:\n"), "nothing heavy was imported"
    written = json.loads(file.read_text())
    assert written["fits"] is True
    assert written == json.loads(json.dumps(as_json(plan_of())))
    assert list(tmp_path.iterdir()) == [file], "no temporary file is left"


def test_json_is_documented() -> None:
    """Every name of the JSON stands in docs/planning.md."""
    text = (ROOT / "docs/planning.md").read_text()

    def names(tree: Any) -> set[str]:
        if isinstance(tree, list):
            return set().union(*map(names, tree)) if tree else set()
        if not isinstance(tree, dict):
            return set()
        return set(tree) | set().union(*map(names, tree.values()))

    found = names(as_json(plan_of(gpu="a100-40", cluster=EIGHT)))
    found -= {key for key in found if "." in key}  # recipe keys among the changes
    assert len(found) > 80
    assert sorted(name for name in found if f"`{name}`" not in text) == []


def test_a_plan_that_does_not_fit_says_what_to_change() -> None:
    done = sgopd_plan(*CLUSTER, "--gpu-memory-gb", "40", "model.teacher.offload=false")
    assert (done.returncode, done.stderr) == (1, "")
    assert "It does not fit:" in done.stdout
    assert "model.reference.offload=true    (" in done.stdout


MISTAKES = {
    "a key": ((*CLUSTER, "parallel.tensr=3"), "unknown key 'parallel.tensr'"),
    "no nodes": (("--nodes", "0", "--gpus-per-node", "8"), "--nodes is 0; it must be above 0"),
    "endless memory": ((*CLUSTER, "--gpu-memory-gb", "inf"), "--gpu-memory-gb is inf; it must"),
    "no number": ((*CLUSTER, "--train-mfu", "nan"), "--train-mfu is nan; it must be above 0"),
    "too few": (("--nodes", "1", "--gpus-per-node", "4"), "TP 2 x PP 1 x CP 1 x DP 4 = 8"),
    "a remainder": (
        ("--nodes", "1", "--gpus-per-node", "7", "parallel.data_parallel_size=null"),
        "the trainer's 7 GPUs are no multiple of TP 2 x PP 1 x CP 1 = 2",
    ),
    "heads": (
        (
            *("--nodes", "1", "--gpus-per-node", "32", "parallel.data_parallel_size=null"),
            *("parallel.tensor_model_parallel_size=16", "rollout.num_prompts=128"),
        ),
        "does not divide the student's num_key_value_heads 8",
    ),
    "recomputation": (
        (*CLUSTER, "parallel.recompute_num_layers=3"),
        "parallel.recompute_num_layers is 3, which does not divide the 28 layers",
    ),
    "prompts": (
        ("--nodes", "3", "--gpus-per-node", "8", "parallel.data_parallel_size=null"),
        "rollout.num_prompts is 128, which 12 data-parallel replicas",
    ),
    "engine nodes of a shared engine": (
        ("--nodes", "2", "--gpus-per-node", "8", "rollout.vllm.nodes=1"),
        "rollout.vllm.nodes is 1",
    ),
    "all nodes for engines": (
        ("--nodes", "2", "--gpus-per-node", "8", "rollout.vllm.nodes=2", *OWN),
        "rollout.vllm.nodes is 2 of 2 nodes",
    ),
    "too many engines for their nodes": (
        (
            *("--nodes", "2", "--gpus-per-node", "8", "rollout.vllm.nodes=1", *OWN),
            "rollout.vllm.num_engines=5",
        ),
        "the student's vLLM servers need 10 GPUs, and rollout.vllm.nodes 1 have 8",
    ),
    "an engine wider than a node": (
        (*CLUSTER, *OWN, "rollout.vllm.tensor_parallel_size=16"),
        "a server lives on one node",
    ),
    "no model": (
        (*CLUSTER, "model.teacher.hf_path=somebody/something"),
        "HF_HUB_OFFLINE is set",
    ),
    "no directory": (
        (*CLUSTER, "model.student.hf_path=/nowhere"),
        "model.student.hf_path is /nowhere, which has no config.json",
    ),
    "no place for the JSON": ((*CLUSTER, "--json", "/nowhere/plan.json"), "cannot be written"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(name: str) -> None:
    arguments, words = MISTAKES[name]
    done = sgopd_plan(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("sgopd: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


# -- who gets which GPUs ---------------------------------------------------------------------------


def test_engines_on_nodes_of_their_own() -> None:
    plan = plan_of(
        *OWN, "rollout.vllm.nodes=2", "rollout.vllm.num_engines=8", cluster=Cluster(4, 8)
    )
    job = plan.job
    assert (job.trainer_gpus, job.engine_gpus, job.idle_gpus) == (16, 16, 0)
    assert plan.engines[0].num_engines == 8
    assert not any(name.startswith("vllm") for name in plan.fullest.items("generate"))


@pytest.mark.parametrize(
    ("overrides", "engines"),
    [
        (["rollout.vllm.urls=['http://a:1','http://b:1']"], 2 * 2 + 2),  # and one of the teacher
        (["rollout.vllm.devices=['0,1','2,3','4,5','6,7']"], 8),
        (["rollout.vllm.num_engines=2", "distill.phases.enabled=false"], 4),
    ],
)
def test_gpus_of_engines_are_not_the_trainers(overrides: list[str], engines: int) -> None:
    overrides = [*overrides, "rollout.num_prompts=60"]
    job = plan_of(*OWN, *overrides, cluster=Cluster(2, 8)).job
    assert job.engine_gpus + job.teacher_engine_gpus == engines
    assert job.trainer_gpus == 16 - engines


def test_engine_nodes_that_are_not_full_leave_gpus_idle() -> None:
    job = plan_of(*OWN, "rollout.vllm.nodes=2", cluster=Cluster(4, 8)).job
    assert (job.trainer_gpus, job.engine_gpus, job.idle_gpus) == (16, 8, 8)


def test_idle_gpus_are_told() -> None:
    plan = plan_of(cluster=Cluster(2, 8))
    assert plan.job.idle_gpus == 8
    assert any("8 of 16 GPUs stay idle" in line for line in lines(plan))
