"""The command line: help and mistakes answer at once, in one line, without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sgopd.__main__ import main
from megatron_sgopd.cli.common import rank_environment
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.load import load_config
from megatron_sgopd.distributed import torchrun

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "recipes/demo/sg_opd.yaml"
HEAVY = ("torch", "transformers", "megatron", "numpy")
# Runs the command line and says at the end what it had loaded.
PROBE = (
    "import sys, atexit; "
    f"atexit.register(lambda: print('loaded:', *[m for m in {HEAVY} if m in sys.modules])); "
    "from megatron_sgopd.__main__ import main; sys.exit(main())"
)


def sgopd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own; no other variables than the given ones."""
    return subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "COLUMNS": "100", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["usage: sgopd", "train", "run a recipe", "config", "print a recipe"]),
        (["train", "--help"], ["usage: sgopd train", "RECIPE", "key=value"]),
        (["config", "--help"], ["usage: sgopd config", "resolved"]),
    ],
)
def test_help_answers_without_torch(arguments: list[str], words: list[str]):
    result = sgopd(*arguments)
    assert (result.returncode, result.stderr) == (0, "")
    for word in words:
        assert word in result.stdout
    assert result.stdout.endswith("loaded:\n"), "nothing heavy was imported"


MISTAKES = {
    "unknown key": (["train", RECIPE, "rollout.num_promts=8"], "'rollout.num_prompts'"),
    "bad type": (["train", RECIPE, "num_steps=ten"], "'num_steps' is 'ten' (str); allowed: int"),
    "bad choice": (["config", RECIPE, "distill.method=x"], "one of sft, grpo, opd"),
    "no recipe": (["train", "recipes/demo/sg_opt.yaml"], "recipes/demo/sg_opd.yaml?"),
    "cannot be": (["train", RECIPE, "rollout.temperature=0"], "rollout.temperature is 0"),
    "not an override": (["train", RECIPE, "quickly"], "section.key=value"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(case: str):
    arguments, words = MISTAKES[case]
    result = sgopd(*arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("sgopd: ")
    assert result.stderr.count("\n") == 1, "one line, no traceback"
    assert words in result.stderr
    assert result.stdout == "loaded:\n", "nothing heavy was imported"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "COMMAND"),
        (["fly"], "'train', 'config'"),
        (["train"], "RECIPE"),
        (["train", RECIPE, "--quickly"], "--quickly"),
    ],
)
def test_wrong_usage_is_exit_code_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("usage: sgopd")
    assert words in printed.err.replace("train, config", "'train', 'config'")


def test_a_world_that_does_not_fit_is_told_before_torch_is_loaded():
    result = sgopd("train", RECIPE, RANK="0", WORLD_SIZE="3")
    assert result.returncode == 2
    assert result.stderr.startswith("sgopd: 3 processes cannot be TP 2 x PP 1 x CP 1 x DP 1")
    assert result.stdout == "loaded:\n"


def test_config_prints_what_loads_again(tmp_path: Path):
    arguments = ["config", RECIPE, "rollout.n=8", "data.prompt_suffix='\\n\u03bb: #'"]
    result = sgopd(*arguments, PYTHONUTF8="1")
    assert (result.returncode, result.stderr) == (0, "")
    printed, _, loaded = result.stdout.rpartition("loaded:")
    assert loaded == "\n"
    recipe = tmp_path / "printed.yaml"
    recipe.write_text(printed, encoding="utf-8")
    config = load_config(recipe)
    assert (config.rollout.n, config.data.prompt_suffix) == (8, "\\n\u03bb: #")
    assert (config.rollout.tis, config.logging.run_dir) == ("token", "runs/demo_sg_opd")
    again = sgopd("config", str(recipe), PYTHONUTF8="1")
    assert again.stdout == result.stdout


def test_train_starts_as_many_ranks_as_the_layout_has(monkeypatch: pytest.MonkeyPatch):
    started = []
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torchrun, "run_ranks", lambda *a: started.append(a) or 1)
    for name in ("RANK", "WORLD_SIZE", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    overrides = ["parallel.data_parallel_size=3", "rollout.num_prompts=9", "logging.run_dir=r/x"]
    assert main(["train", RECIPE, *overrides]) == 1
    assert started == [(6, ["train", RECIPE, *overrides], Path("r/x"))]


SRUN = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1"}
MASTER = {"MASTER_ADDR": "node1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        ({}, None),
        ({"RANK": "1", "WORLD_SIZE": "2", "HOME": "x"}, {"RANK": "1", "WORLD_SIZE": "2"}),
        (SRUN | MASTER, {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}),
        (
            {"RANK": "1", "WORLD_SIZE": "2"} | SRUN | MASTER,  # torchrun under srun
            {"RANK": "1", "WORLD_SIZE": "2"},
        ),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),  # by hand in an allocation
        ({"SLURM_NTASKS": "4"}, None),  # the same
    ],
)
def test_a_ranks_place_in_the_job(environment: dict[str, str], place: dict[str, str] | None):
    assert rank_environment(environment) == place


@pytest.mark.parametrize("given", [{}, {"MASTER_ADDR": "node1"}, {"MASTER_PORT": "29500"}])
def test_srun_without_a_meeting_point_is_refused(given: dict[str, str]):
    with pytest.raises(ConfigError) as caught:
        rank_environment(SRUN | given)
    message = str(caught.value)
    assert {name for name in MASTER if name in message} == MASTER.keys() - given.keys()
    assert "before srun" in message
