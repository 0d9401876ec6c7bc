"""`sgopd launch` without nemo-run: executors, sweeps, what is refused, a run's commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sgopd.__main__ import main
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.launch.submission import (
    Executor,
    batch_commands,
    changed,
    check,
    find_executors,
    local_command,
    make_runs,
    parse_sweep,
    read_executors,
    sbatch_options,
)

ROOT = Path(__file__).resolve().parents[2]
DEMO, QWEN = "recipes/demo/sg_opd.yaml", "recipes/qwen3_8node.yaml"
EXECUTORS = """
h100:
  account: research
  nodes: 4
  gpus_per_node: 8
  time: 12:00:00
  container_image: /images/sgopd.sqsh
  mounts: ["/data:/data"]
  env: {HF_HOME: /data/hf}
  options: {qos: high}
local: {env: {OMP_NUM_THREADS: 2}}
"""


@pytest.fixture
def executors(tmp_path: Path) -> Path:
    path = tmp_path / "executors.yaml"
    path.write_text(EXECUTORS)
    return path


def test_an_executors_file(executors: Path):
    found = find_executors(str(executors), {})
    assert found == {
        "h100": Executor(
            kind="slurm",
            account="research",
            nodes=4,
            gpus_per_node=8,
            time="12:00:00",  # and not 43200
            container_image="/images/sgopd.sqsh",
            mounts=("/data:/data",),
            env={"HF_HOME": "/data/hf"},
            options={"qos": "high"},
        ),
        "local": Executor(kind="local", env={"OMP_NUM_THREADS": "2"}),
        "slurm": Executor(kind="slurm"),
    }


def test_the_folders_own_file_comes_before_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "sgopd").mkdir()
    (tmp_path / "sgopd" / "executors.yaml").write_text("mine: {nodes: 3}")
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    home = {"XDG_CONFIG_HOME": str(tmp_path)}
    assert find_executors(None, home)["mine"].nodes == 3
    Path("executors.yaml").write_text("here: {nodes: 5}")
    assert sorted(find_executors(None, home)) == ["here", "local", "slurm"]
    assert sorted(find_executors(None, {"XDG_CONFIG_HOME": "nowhere"})) == [
        "here",
        "local",
        "slurm",
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: {acount: x}", "executors.yaml, a: unknown key 'acount'; did you mean 'account'?"),
        ("a: {nodes: many}", "executors.yaml, a: nodes is 'many'; a number from 1 on is wanted"),
        ("a: {nodes: 0}", "executors.yaml, a: nodes is '0'; a number from 1 on is wanted"),
        ("a: {kind: ssh}", "executors.yaml, a: kind is 'ssh'; one of local, slurm"),
        ("a: {mounts: /data}", "executors.yaml, a: mounts is '/data'; a list is wanted"),
        ("a: {env: [A=1]}", "executors.yaml, a: env is ['A=1']; a mapping is wanted"),
        ("a: {time: [1]}", "executors.yaml, a: time is ['1']; one value is wanted"),
        ("a: {mounts: [[b, c]]}", "executors.yaml, a: mounts is [['b', 'c']]; a list of texts"),
        ("a: {env: {B-C: d}}", "executors.yaml, a: env: 'B-C' is 'd'; a variable's name and"),
        ("a: {env: {B: {c: d}}}", "executors.yaml, a: env: 'B' is {'c': 'd'}; a variable's name"),
        ("a: {options: {q s: d}}", "executors.yaml, a: options: 'q s' is 'd'; an option of sbatch"),
        ("a: {options: {gpus-per-node: 2}}", "executors.yaml, a: options: gpus-per-node is a sett"),
        ("local: {nodes: 2}", "executors.yaml, local: a local run takes no nodes"),
        ("a: b", "executors.yaml, a: 'b'; a mapping is wanted"),
        ("- a", "executors.yaml: NAME: {account: …"),
        ("a: {", "executors.yaml: not YAML"),
    ],
)
def test_a_mistake_in_an_executors_file_is_named(tmp_path: Path, text: str, words: str):
    path = tmp_path / "executors.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        read_executors(path)
    assert str(error.value).replace(f"{tmp_path}/", "").startswith(words)


def test_the_command_line_comes_before_the_file(executors: Path):
    h100 = find_executors(str(executors), {})["h100"]
    told = {
        "nodes": 2,
        "time": None,
        "mounts": ["/more:/more"],
        "env": ["A=b=c", "HF_HOME=/other"],
        "options": ["qos=low", "signal=B:USR1@60"],
    }
    found = changed(h100, told)
    assert (found.nodes, found.time, found.account) == (2, "12:00:00", "research")
    assert found.mounts == ("/data:/data", "/more:/more")
    assert found.env == {"A": "b=c", "HF_HOME": "/other"}
    assert found.options == {"qos": "low", "signal": "B:USR1@60"}
    with pytest.raises(ConfigError, match="--env 'A': KEY=VALUE is wanted"):
        changed(h100, {"env": ["A"]})


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("optimizer.lr=1e-5,3e-5", ["1e-5", "3e-5"]),
        ("distill.gate.eps=auto, 0.1", ["auto", "0.1"]),
        ("rollout.stop_token_ids=[1,2],[3]", ["[1,2]", "[3]"]),
        ('data.prompt_suffix="a, b","c"', ['"a, b"', '"c"']),
    ],
)
def test_a_sweep_is_values_as_they_are_written(text: str, values: list[str]):
    assert parse_sweep(text) == (text.split("=")[0], values)


@pytest.mark.parametrize(
    "text", ["optimizer.lr", "=1", "optimizer.lr=", "name=a,b", "seed=[1", "seed=1]"]
)
def test_what_is_no_sweep(text: str):
    with pytest.raises(ConfigError, match=r"--sweep .* is wanted"):
        parse_sweep(text)


def test_a_sweep_is_a_run_for_each_combination():
    runs = make_runs(DEMO, ["seed=1"], ["optimizer.lr=1e-5,3e-5", "distill.gate.lambda_high=1.5,2"])
    assert [run.name for run in runs] == [
        "demo_sg_opd-lr-1e-5-lambda_high-1p5",
        "demo_sg_opd-lr-1e-5-lambda_high-2",
        "demo_sg_opd-lr-3e-5-lambda_high-1p5",
        "demo_sg_opd-lr-3e-5-lambda_high-2",
    ]
    first = runs[0]
    assert first.overrides == (
        "seed=1",
        "optimizer.lr=1e-5",
        "distill.gate.lambda_high=1.5",
        "name=demo_sg_opd-lr-1e-5-lambda_high-1p5",
    )
    assert (first.config.optimizer.lr, first.config.distill.gate.lambda_high) == (1e-5, 1.5)
    assert first.run_dir == "runs/demo_sg_opd-lr-1e-5-lambda_high-1p5"


def test_runs_of_a_sweep_have_folders_of_their_own():
    runs = make_runs(DEMO, ["logging.run_dir=out/x/"], ["seed=1,2"])
    assert [run.run_dir for run in runs] == ["out/x-seed-1", "out/x-seed-2"]
    assert [run.config.logging.run_dir for run in runs] == ["out/x-seed-1", "out/x-seed-2"]
    with pytest.raises(ConfigError, match="two runs would be called demo_sg_opd-seed-1"):
        make_runs(DEMO, [], ["seed=1,1"])
    with pytest.raises(ConfigError, match=r"unknown key 'optimizer\.lrr'"):
        make_runs(DEMO, [], ["optimizer.lrr=1,2"])


@pytest.mark.parametrize(
    ("executor", "environment", "words"),
    [
        (Executor("local"), {}, ""),
        (Executor(nodes=2, gpus_per_node=1), {}, ""),
        (Executor(nodes=2), {"SGOPD_PROCESSES_PER_NODE": "1"}, ""),
        (Executor(nodes=2, env={"SGOPD_PROCESSES_PER_NODE": "1"}), {}, ""),
        (Executor(nodes=2), {"SGOPD_PROCESSES_PER_NODE": "x"}, "a number from 1 on is wanted"),
        (Executor(nodes=2), {}, "16 processes cannot be TP 2"),
        (Executor(), {}, "64 processes cannot be TP 2"),
        (Executor(nodes=2, gpus_per_node=1), {"SGOPD_ENGINE_NODES": "2"}, ""),
    ],
)
def test_a_run_must_fit_the_nodes(executor: Executor, environment: dict[str, str], words: str):
    runs = make_runs(DEMO, [], [])
    if words:
        with pytest.raises(ConfigError, match=words):
            check(runs, executor, environment)
    else:
        check(runs, executor, environment)


def test_nodes_for_engines_are_the_environments_too():
    runs = make_runs(QWEN, [], [])
    check(runs, Executor(), {})
    with pytest.raises(ConfigError, match="which leaves none for the trainers"):
        check(runs, Executor(), {"SGOPD_ENGINE_NODES": "8"})


def test_the_commands_of_a_run():
    (run,) = make_runs(DEMO, ["data.prompt_suffix=a b", "num_steps=9"], [])
    told = "recipes/demo/sg_opd.yaml 'data.prompt_suffix=a b' num_steps=9"
    root = Path("/some where")
    assert local_command(run, root, {}) == (
        f"cd '/some where'\nexec '/some where/.venv/bin/python' -m megatron_sgopd train {told}"
    )
    assert " python3 -m megatron_sgopd" in local_command(run, root, {"SGOPD_PYTHON": "python3"})
    assert batch_commands(run, root, None, [], {"A": "x y"}).splitlines() == [
        "export SGOPD_ROOT='/some where'",
        "export A='x y'",
        "cd '/some where'",
        f"exec bash slurm/sgopd_8node.sh {told}",
    ]
    container = batch_commands(run, root, "i.sqsh", ["/a:/a", "/b:/c"], {}).splitlines()
    assert container[1:3] == ["export SGOPD_CONTAINER=i.sqsh", "export SGOPD_MOUNTS=/a:/a,/b:/c"]


def test_the_batch_scripts_own_options():
    assert sbatch_options(ROOT / "slurm" / "sgopd_8node.sh") == {
        "job_name": "sgopd",
        "nodes": "8",
        "gpus_per_node": "8",
        "exclusive": True,
        "mem": "0",
        "output": "%x_%j.out",
        "open_mode": "append",
        "requeue": True,
        "no_kill": True,
        "signal": "B:USR1@1800",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--executor", "slurm", "optimizer.lrr=1"), "unknown key 'optimizer.lrr'"),
        (("--executor", "h100"), "--executor h100: known are local, slurm"),
        (("--executor", "slurm", "--nodes", "2"), "16 processes cannot be TP 2"),
        (("--executor", "local", "--executors", "none.yaml"), "none.yaml does not exist"),
        (("--executor", "slurm", "--nodes", "0"), "--nodes is '0'; a number from 1 on is wanted"),
        (("--executor", "local", "--nodes", "2", "--time", "1"), "takes no nodes or time"),
        (("--executor", "local", "--env", "A"), "--env 'A': KEY=VALUE is wanted"),
        (("--executor", "slurm", "--env", "A-B=c"), "--env: 'A-B' is 'c'; a variable's name"),
        (("--executor", "slurm", "--option", "nodes=2"), "--option: nodes is a setting of its own"),
        (("--executor", "local", "--sweep", "seed=1", "--sweep", "seed=2"), "seed comes twice"),
        (("--executor", "local", "--experiment", "a b/c"), "--experiment is 'a b/c'; letters"),
    ],
)
def test_mistakes_are_told_before_nemo_run_is_looked_for(
    arguments: tuple[str, ...],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SGOPD_LAUNCH_PYTHON", "/nowhere/python")
    assert main(["launch", DEMO, *arguments]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [("launch", DEMO, "--executor", "local"), ("jobs", "list")])
def test_without_nemo_run_it_says_how_to_get_it(
    arguments: tuple[str, ...],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setenv("SGOPD_LAUNCH_PYTHON", "/nowhere/python")
    assert main(arguments) == 2
    assert "/nowhere/python does not exist: make it with `make launch-env`" in (
        capsys.readouterr().err
    )


def test_it_goes_on_in_the_environment_that_has_nemo_run(tmp_path: Path):
    """With the same arguments, in the order in which they came."""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    python.chmod(0o755)
    arguments = ["launch", DEMO, "num_steps=9", "--executor", "local", "seed=a b"]
    arguments[-1] = "data.prompt_suffix=a b"
    done = subprocess.run(
        [sys.executable, "-m", "megatron_sgopd", *arguments],
        env={"SGOPD_LAUNCH_PYTHON": str(python), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout) == ["-m", "megatron_sgopd", *arguments], done.stderr


def test_elsewhere_than_in_the_project_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    recipe = str(Path(DEMO).absolute())
    monkeypatch.chdir(tmp_path)
    assert main(["launch", recipe, "--executor", "local"]) == 2
    assert "call it from the project's folder, or export SGOPD_ROOT" in capsys.readouterr().err
