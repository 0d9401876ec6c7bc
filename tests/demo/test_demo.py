"""The demonstration's driver, with a stand-in for the trainer, and its recipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sgopd.config.load import diff, load_config
from megatron_sgopd.demo import phases
from megatron_sgopd.demo.arms import (
    ARM_DIFFERENCES,
    DEFAULT_ARMS,
    DEMO_RECIPES,
    available_arms,
    chosen_arms,
    trainings,
)
from megatron_sgopd.demo.comparison import compare, readings, table, verdict
from megatron_sgopd.demo.driver import Options, TrainingFailed, run_demo
from megatron_sgopd.demo.phases import source_key
from megatron_sgopd.demo.world import QUICK_SIZES, WorldSizes

FAKE_TRAINER = (sys.executable, str(Path(__file__).parents[1] / "support" / "fake_trainer.py"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished demonstration, to be copied."""
    out = tmp_path_factory.mktemp("made") / "demo"
    run_demo(Options(arms=DEFAULT_ARMS, seed=5, quick=True, out=out, trainer=FAKE_TRAINER))
    return out


@pytest.fixture
def options(tmp_path: Path) -> Options:
    """A demonstration that has not run."""
    return Options(
        arms=DEFAULT_ARMS, seed=5, quick=True, out=tmp_path / "demo", trainer=FAKE_TRAINER
    )


@pytest.fixture
def finished(options: Options, made: Path, monkeypatch: pytest.MonkeyPatch) -> Options:
    """A demonstration that has run elsewhere and was moved here. It writes no report."""
    shutil.copytree(made, options.out)
    trained(options)
    monkeypatch.setattr(
        "megatron_sgopd.evaluation.report.write_report", lambda *args, **kwargs: None
    )
    return options


@pytest.fixture(autouse=True, scope="module")
def unchanging_source() -> Iterator[None]:
    """What else is edited while the tests run does not decide what they reuse."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(phases, "source_key", lambda: "the source")
        yield


def trained(options: Options) -> list[str]:
    """The runs the trainer was asked for since the last call."""
    log = options.home / "trained.txt"
    names = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return names


ALL_RUNS = ["teacher", "student", *DEFAULT_ARMS]


def test_demo_leaves_summary_and_report(options: Options, capfd: pytest.CaptureFixture[str]):
    run_demo(options)
    summary = json.loads((options.out / "summary.json").read_text())
    assert list(summary["arms"]) == list(DEFAULT_ARMS)
    assert (summary["seed"], summary["level"], summary["quick"]) == (5, "normal", True)
    arm = summary["arms"]["sg_opd_full_vocab"]
    assert (arm["method"], arm["estimator"], arm["seeds"]) == ("sg_opd", "full_vocab", [5])
    assert arm["lift"]["mean"] == pytest.approx(arm["avg_at_k"] - summary["student"]["avg_at_k"])
    opd = summary["arms"]["opd"]["avg_at_k"]
    assert arm["minus_opd"]["mean"] == pytest.approx(arm["avg_at_k"] - opd)
    assert arm["teacher_avg_at_k"] == summary["teacher"]["avg_at_k"]
    assert arm["ci95"][0] <= arm["avg_at_k"] <= arm["ci95"][1]
    assert {"pass_at_k", "k", "greedy", "initial_avg_at_k", "engine", "engine_version"} <= set(arm)
    assert set(summary["phase_seconds"]) == {"world", *ALL_RUNS}
    assert "sg_opd_full_vocab" in (options.out / "report.html").read_text()
    out = capfd.readouterr().out
    assert "[1/7]" in out and "[7/7]" in out
    assert out.count("make no claim on accuracy") == 2
    assert trained(options) == ALL_RUNS


def test_printed_commands_can_be_repeated(options: Options, capfd: pytest.CaptureFixture[str]):
    run_demo(options)
    commands = [s[2:] for s in capfd.readouterr().out.splitlines() if s.startswith("$ ")]
    assert len(commands) == 5
    trained(options)
    subprocess.run(commands[2], shell=True, check=True)
    assert trained(options) == ["opd"]


def test_second_run_reuses_everything_and_says_so(
    finished: Options, capfd: pytest.CaptureFixture[str]
):
    first = json.loads((finished.out / "summary.json").read_text())
    second = run_demo(finished)
    out = capfd.readouterr().out
    assert trained(finished) == []
    assert out.count("reused: ") == 6 and "Every run is there already" in out
    assert second["reused"] == ["world", *ALL_RUNS]
    assert second["arms"] == first["arms"]


@pytest.mark.parametrize(
    ("damage", "expected", "reason"),
    [
        ("opd/hf/config.json", ["opd"], "config.json has changed"),
        ("sg_opd/phase.json", ["sg_opd"], "cannot be read"),
        ("sg_opd/evaluation/final/samples/test.jsonl", ["sg_opd"], "test.jsonl has changed"),
    ],
)
def test_corrupt_results_are_made_again(
    finished: Options,
    damage: str,
    expected: list[str],
    reason: str,
    capfd: pytest.CaptureFixture[str],
):
    (finished.home / damage).write_text("{")
    run_demo(finished)
    assert trained(finished) == expected
    assert reason in capfd.readouterr().out
    run_demo(finished)
    assert trained(finished) == []


def test_missing_file_is_made_again(finished: Options):
    (finished.home / "teacher" / "hf" / "config.json").unlink()
    run_demo(finished)
    assert trained(finished) == ["teacher"]  # the same weights came out: the arms stand


def test_interrupted_phase_is_made_again(finished: Options):
    (finished.home / "student" / phases.MARKER).unlink()
    run_demo(finished)
    assert trained(finished) == ["student"]


def test_arms_follow_the_weights_they_started_from(finished: Options):
    # A student made again with other weights, as another machine's arithmetic may.
    student = finished.home / "student"
    (student / "hf" / "config.json").write_text('{"other": 1}')
    content = json.loads((student / phases.MARKER).read_text())
    phases.mark_finished(student, content["key"], 1.0)
    run_demo(finished)
    assert trained(finished) == list(DEFAULT_ARMS)


def test_changed_recipe_redoes_its_run_alone(finished: Options, tmp_path: Path):
    recipes = tmp_path / "recipes"
    shutil.copytree(DEMO_RECIPES, recipes)
    with (recipes / "sg_opd.yaml").open("a") as recipe:
        recipe.write("# changed\n")
    run_demo(replace(finished, recipes=recipes))
    assert trained(finished) == ["sg_opd"]


def test_override_redoes_every_run(finished: Options):
    run_demo(replace(finished, overrides=("optimizer.clip_grad=0.5",)))
    assert trained(finished) == ALL_RUNS


def test_other_worlds_have_their_own_folders(options: Options):
    homes = {
        replace(options, **change).home
        for change in ({}, {"seed": 6}, {"level": "hard"}, {"quick": False})
    }
    assert len(homes) == 4
    assert options.home.name == "normal-5-quick"


def test_source_key_reads_the_trainer_and_not_the_driver(tmp_path: Path):
    for name in ("train.py", "evaluation/report.py", "demo/driver.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("one")
    before = source_key(tmp_path)
    (tmp_path / "evaluation/report.py").write_text("two")
    (tmp_path / "demo/driver.py").write_text("two")
    assert source_key(tmp_path) == before
    (tmp_path / "train.py").write_text("two")
    assert source_key(tmp_path) != before


def test_first_failure_stops_and_its_error_is_last(
    options: Options, capfd: pytest.CaptureFixture[str]
):
    with pytest.raises(TrainingFailed) as failure:
        run_demo(replace(options, overrides=("fake.fail=opd",)))
    captured = capfd.readouterr()
    assert failure.value.exit_status == 3
    assert trained(options) == ["teacher", "student"]
    assert captured.err.splitlines()[-1].startswith("ValueError: optimizer.lr is -1")
    assert captured.out.splitlines()[-1].startswith("$ ")
    assert not (options.out / "summary.json").exists()


def test_a_run_on_another_engine_than_was_asked_for_is_an_error(options: Options) -> None:
    with pytest.raises(TrainingFailed, match="with 'embedded', asked for was 'vllm'"):
        run_demo(replace(options, engine="vllm"))  # the fake trainer says embedded


def test_run_that_leaves_nothing_is_a_failure(options: Options):
    with pytest.raises(TrainingFailed, match=r"teacher ended without .*summary.json"):
        run_demo(replace(options, overrides=("fake.empty=teacher",)))


def test_command_line():
    command = [sys.executable, "-m", "megatron_sgopd.demo"]
    help_text = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "--quick" in help_text.stdout and "sg_opd_full_vocab" in help_text.stdout
    for wrong, message in [
        (["--arms", "sg_odp"], "there is no arm 'sg_odp'"),
        (["seed"], "'seed' is no override"),
        (["--level", "easy"], "invalid choice: 'easy'"),
    ]:
        result = subprocess.run([*command, *wrong], capture_output=True, text=True)
        assert result.returncode == 2 and message in result.stderr


def test_driver_imports_neither_torch_nor_transformers():
    code = (
        "import sys, megatron_sgopd.demo.__main__\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_an_arm_is_a_recipe(tmp_path: Path):
    for name in ("teacher", "student", "opd", "grpo"):
        (tmp_path / f"{name}.yaml").write_text("")
    assert available_arms(tmp_path) == ["opd", "grpo"]
    assert chosen_arms("all", tmp_path) == ["opd", "grpo"]
    assert chosen_arms("grpo,grpo", tmp_path) == ["grpo"]
    with pytest.raises(ValueError, match="no arm was named"):
        chosen_arms(",", tmp_path)
    assert tuple(chosen_arms(None)) == DEFAULT_ARMS


def evaluation(counts: list[int], greedy: list[bool]) -> list[dict]:
    return [
        {
            "id": str(i),
            "problem": str(i),
            "num_samples": 8,
            "num_correct": c,
            "greedy_is_correct": g,
        }
        for i, (c, g) in enumerate(zip(counts, greedy, strict=True))
    ]


def compared(opd: int, sg_opd: list[int], student_greedy: bool = False) -> dict:
    n = len(sg_opd)
    evaluations = {
        "student": evaluation([1] * n, [student_greedy] * n),
        "teacher": evaluation([7] * n, [True] * n),
        "opd": evaluation([opd] * n, [True] * n),
        "sg_opd": evaluation(sg_opd, [True] * n),
    }
    runs = {"opd": {"method": "opd", "seed": 1}, "sg_opd": {"method": "sg_opd", "seed": 1}}
    return compare(evaluations, runs)


@pytest.mark.parametrize(
    ("opd", "sg_opd", "reading", "conclusion"),
    [
        (
            4,
            [5] * 40,
            "sg_opd - opd: +12.5 [12.5, 12.5]: separated",
            "Better than opd here: sg_opd.",
        ),
        (
            5,
            [4] * 40,
            "sg_opd - opd: -12.5 [-12.5, -12.5]: separated",
            "Worse than opd here: sg_opd.",
        ),
        (4, [2, 7] * 20, "not separated from zero; one seed", "Not told apart from opd: sg_opd."),
    ],
)
def test_reading_follows_the_figures(opd: int, sg_opd: list[int], reading: str, conclusion: str):
    comparison = compared(opd, sg_opd)
    assert any(reading in sentence for sentence in readings(comparison))
    assert verdict(comparison, quick=False).endswith(f"before. {conclusion}")


def test_missed_bar_is_said():
    comparison = compared(3, [4] * 10)  # +25 and +37.5 points
    sentences = readings(comparison)
    assert any(
        "opd - student before: +25.0" in s and "bar of +30 is missed" in s for s in sentences
    )
    assert any("sg_opd - student before" in s and "is reached" in s for s in sentences)
    assert "Less than 30 points above the student before: opd." in verdict(comparison, quick=False)


@pytest.mark.parametrize("greedy", [True, False])
def test_student_that_is_right_when_greedy_is_called_that(greedy: bool):
    sentences = readings(compared(4, [4] * 10, student_greedy=greedy))
    assert any("reliability under sampling" in s for s in sentences) is greedy


def test_another_estimator_is_said_to_be_a_reason():
    comparison = compared(4, [5] * 10)
    assert not any("estimator" in s for s in readings(comparison))
    comparison["arms"]["opd"]["estimator"] = "sampled"
    comparison["arms"]["sg_opd"]["estimator"] = "full_vocab"
    assert any(s.startswith("sg_opd: the estimator is another") for s in readings(comparison))


def test_quick_makes_no_claim():
    assert "no claim on accuracy" in verdict(compared(4, [5] * 10), quick=True)


def test_table_is_aligned():
    lines = table(compared(4, [5] * 10)).splitlines()
    head, rule, *rows = lines
    assert len(rule) == max(map(len, lines)) and set(rule) == {"-"}
    end = head.index("greedy") + len("greedy")
    assert all(row[:end].split()[-1][-1].isdigit() or row[:end].endswith("-") for row in rows)
    assert all(row[end : end + 1] in ("", " ") for row in rows), "numbers end below their heading"
    assert lines[-1].split()[:2] == ["sg_opd", "62.5"]


def test_quick_lessons_fill_their_steps():
    plans = {p.name: p for p in trainings(DEFAULT_ARMS, seed=1, quick=True, extra=())}
    for role, rows in [
        ("teacher", QUICK_SIZES.teacher),
        ("student", QUICK_SIZES.student_noisy + QUICK_SIZES.student_terse),
    ]:
        assert f"num_steps={rows // 64}" in plans[role].overrides


@pytest.mark.parametrize("quick", [True, False])
def test_only_the_arms_evaluate_while_training_and_on_dev(quick: bool):
    for plan in trainings(DEFAULT_ARMS, seed=1, quick=quick, extra=()):
        during = [o for o in plan.overrides if o.startswith("evaluation.during_data=")]
        assert during == (
            []
            if plan.name in ("teacher", "student")
            else ["evaluation.during_data={home}/world/dev.jsonl"]
        )
        assert quick == any(o.startswith("num_steps=") for o in plan.overrides)
        if not during:
            assert not any(o.startswith("evaluation.every=") for o in plan.overrides)


# --- the recipes, through the package's own loader ---


def load(name: str, overrides: tuple[str, ...] = ()):
    return load_config(DEMO_RECIPES / f"{name}.yaml", list(overrides))


@pytest.mark.parametrize("arm", DEFAULT_ARMS[1:])
def test_arms_differ_in_the_listed_keys_alone(arm: str):
    differences = set(diff(load("opd"), load(arm)))
    assert {"name", "distill.method"} <= differences <= ARM_DIFFERENCES


def test_listed_keys_are_all_used():
    used = {key for arm in DEFAULT_ARMS[1:] for key in diff(load("opd"), load(arm))}
    assert used == ARM_DIFFERENCES


@pytest.mark.parametrize("quick", [True, False])
@pytest.mark.parametrize("name", ALL_RUNS)
def test_recipe_takes_the_drivers_overrides(name: str, quick: bool):
    plans = {p.name: p for p in trainings(DEFAULT_ARMS, seed=9, quick=quick, extra=())}
    config = load(name, tuple(o.replace("{home}", "here") for o in plans[name].overrides))
    sizes = QUICK_SIZES if quick else WorldSizes()
    rows = {
        "teacher": sizes.teacher,
        "student": sizes.student_noisy + sizes.student_terse,
    }.get(name, sizes.train)
    needed = config.num_steps * config.rollout.num_prompts
    assert config.seed == 9
    assert config.evaluation.data == "here/world/test.jsonl"
    assert needed == rows or (quick and name in DEFAULT_ARMS)
    assert config.parallel.tensor_model_parallel_size == 2


def test_default_paths_are_those_of_the_default_demo():
    home = str(Options(arms=DEFAULT_ARMS).home)
    for plan in trainings(DEFAULT_ARMS, seed=42, quick=False, extra=()):
        overrides = [o.replace("{home}", home) for o in plan.overrides]
        assert load(plan.name, tuple(overrides)) == load(plan.name)
