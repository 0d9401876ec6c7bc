"""Whole runs on a tiny world: what they leave behind, how they resume, what they refuse."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_sgopd.__main__ import main
from megatron_sgopd.config.load import load_config
from megatron_sgopd.evaluation.folder import read_records
from megatron_sgopd.rollouts.make_engine import _starting
from tests.conftest import SIZES
from tests.support import conversion_cases, train_cases
from tests.support.documents import (
    RUN_FOLDER,
    check_run_folder,
    first_cells,
    status_words,
    written_names,
)
from tests.support.pool import RankError

STEPS = 4


def overrides(world: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        f"model.student.hf_path={world}/student/hf",
        f"model.teacher.hf_path={world}/teacher/hf",
        f"data.train={world}/train.jsonl",
        f"evaluation.data={world}/test.jsonl",
        f"evaluation.during_data={world}/dev.jsonl",
        "evaluation.k=2",
        "evaluation.during_k=1",
        "evaluation.every=2",
        f"num_steps={STEPS}",
        "rollout.num_prompts=4",
        "rollout.n=2",
        "rollout.max_new_tokens=12",
        "parallel.micro_batch_size=3",
        "optimizer.lr_warmup_steps=0",
        "distill.phases.end_frac=1.0",
        f"logging.run_dir={run_dir}",
        "logging.progress=false",
        "logging.rollouts_every=2",
        *more,
    ]


def run(pool: Any, recipe: str, settings: list[str], fault: Any = None) -> list[str]:
    """The status on each rank; docs/metrics.md and docs/run_folder.md name all that is left."""
    said = list(pool(2).run(train_cases.run, f"recipes/demo/{recipe}.yaml", settings, fault))
    folders = [text.partition("=")[2] for text in settings if text.startswith("logging.run_dir=")]
    check_run_folder(Path(folders[-1]))
    return said


def test_a_run_leaves_what_the_readme_says(
    pool: Any, world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = overrides(
        world, tmp_path / "run", "checkpoint.at_end=true", "evaluation.at_start=true"
    )
    assert run(pool, "sg_opd", settings) == ["finished"] * 2
    folder = tmp_path / "run"
    check_run_folder(world / "student")  # of method sft
    assert (folder / "status").read_text() == "finished\n"
    rows = train_cases.metrics_without_time(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    first = rows[0]
    for name in ("rollout/accuracy", "gate/open_rate", "distill/reverse_kl", "train/grad_norm"):
        assert name in first
    assert first["phases/requested_fraction"] == 0.5
    assert first["engine/mismatch_kl"] < 1e-6
    assert "evaluation/avg_at_k" in rows[1]
    checkpoint = folder / "checkpoints" / "step-00000004"
    assert sorted(p.name for p in (checkpoint / "hf").iterdir()) == [
        "config.json",
        "generation_config.json",
        "recipe.yaml",
        "sgopd.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert sorted(p.name for p in (folder / "rollouts").iterdir()) == [
        "step-000001.jsonl",
        "step-000002.jsonl",
        "step-000004.jsonl",
    ]
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["method"], summary["estimator"], summary["steps"]) == ("sg_opd", "sampled", 4)
    records = read_records(folder / "evaluation" / "final")
    assert len(records) == SIZES.test
    correct = sum(sum(r["is_correct"]) for r in records)
    assert summary["avg_at_k"] == pytest.approx(correct / (2 * SIZES.test))
    before = read_records(folder / "evaluation" / "start")
    capsys.readouterr()
    assert main(["compare", str(folder), str(folder / "evaluation" / "start")]) == 0
    table = capsys.readouterr().out
    points = 100 * (summary["avg_at_k"] - summary["initial_avg_at_k"])
    assert re.search(rf"avg@2 .* {re.escape(f'{points:+.1f}')} ", table), table
    assert summary["initial_avg_at_k"] == sum(sum(r["is_correct"]) for r in before) / 12
    assert summary["seeds"] == [42]
    scores = {row["step"]: row.get("evaluation/avg_at_k") for row in rows}
    best = max((2, 4), key=lambda step: scores[step])  # the first of equals
    assert summary["best"] == {"step": best, "avg_at_k": scores[best], "k": 1}
    card = (folder / "hf" / "README.md").read_text()
    assert f"| avg@2 | {100 * summary['avg_at_k']:.1f} % |" in card
    assert "- sg_opd\n" in card and "library_name: transformers" in card
    assert (folder / "config.yaml").read_text() in card
    assert f"on the development set at step {best} |" in (folder / "hf_best/README.md").read_text()
    # The newest checkpoint of the run gives the same directory, recipe and results and all.
    conversion_cases.run(pool, conversion_cases.to_hf(folder, tmp_path / "exported"))
    for name in ("model.safetensors", "config.json", "tokenizer.json", "README.md"):
        assert (tmp_path / "exported" / name).read_bytes() == (folder / "hf" / name).read_bytes()
    # The measured tie width is in the resolved recipe, which loads again.
    written = load_config(folder / "config.yaml")
    assert isinstance(written.distill.gate.eps, float)
    assert written.distill.gate.eps == summary["gate_eps"]


@pytest.mark.parametrize("recipe", ["opd", "sg_opd_full_vocab"])
def test_every_arm_of_the_demonstration_runs(
    pool: Any, world: Path, tmp_path: Path, recipe: str
) -> None:
    sets = f"{{test: {world}/test.jsonl, dev: {world}/dev.jsonl}}"
    settings = ["evaluation.data=null", f"evaluation.benchmarks={sets}", "evaluation.n=3"]
    assert run(pool, recipe, overrides(world, tmp_path / "run", *settings)) == ["finished"] * 2
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["k"], summary["num_samples"]) == (2, 3)
    by_name = {name: s["num_problems"] for name, s in summary["benchmarks"].items()}
    assert by_name == {"test": SIZES.test, "dev": SIZES.dev}
    assert len(read_records(tmp_path / "run" / "evaluation" / "final")) == 10
    rows = train_cases.metrics_without_time(tmp_path / "run")
    assert len(rows) == STEPS
    assert all(row["distill/reverse_kl"] == row["distill/reverse_kl"] for row in rows)
    requested = rows[0]["phases/requested_fraction"]
    assert requested == (0.0 if recipe == "opd" else 0.5)


@pytest.mark.parametrize("how", ["stop", "die"])
def test_a_resumed_run_equals_one_that_was_never_interrupted(
    pool: Any, world: Path, tmp_path: Path, how: str
) -> None:
    every = "checkpoint.every=2"
    whole = overrides(world, tmp_path / "whole", every)
    assert run(pool, "sg_opd", whole) == ["finished"] * 2
    cut = overrides(world, tmp_path / "cut", every)
    # "die" after step 3: the checkpoint of step 2 is the last one, step 3 is done again.
    after = 2 if how == "stop" else 3
    assert run(pool, "sg_opd", cut, (how, after)) == ["stopped" if how == "stop" else "died"] * 2
    if how == "die":
        assert len(train_cases.metrics_without_time(tmp_path / "cut")) == 3
    assert run(pool, "sg_opd", cut) == ["finished"] * 2
    assert train_cases.metrics_without_time(tmp_path / "cut") == train_cases.metrics_without_time(
        tmp_path / "whole"
    )
    for export in ("hf", "hf_best"):
        a, b = (load_file(tmp_path / n / export / "model.safetensors") for n in ("whole", "cut"))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    whole, cut = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "cut"))
    assert whole["best"] == cut["best"] and whole["best"]["step"] in (2, 4)


@pytest.mark.parametrize("how", ["stop", "die"])
def test_rollouts_made_ahead_of_their_step_are_in_the_checkpoint(
    pool: Any, world: Path, tmp_path: Path, how: str
) -> None:
    every = "checkpoint.every=2"

    def ahead(name: str, fault: tuple[str, int] | None = None) -> Any:
        settings = overrides(world, tmp_path / name, every)
        return pool(2).run(train_cases.run_ahead, "recipes/demo/sg_opd.yaml", settings, fault)

    assert ahead("whole") == ["finished"] * 2
    after = 2 if how == "stop" else 3
    assert ahead("cut", (how, after)) == ["stopped" if how == "stop" else "died"] * 2
    assert ahead("cut") == ["finished"] * 2
    rows = [train_cases.metrics_without_time(tmp_path / name) for name in ("whole", "cut")]
    assert rows[0] == rows[1]
    # Step 2's were made for the checkpoint after two steps, and not again after it.
    assert (tmp_path / "cut" / "made").read_text().split() == ["0", "1", "2", "3"]


@pytest.mark.parametrize(
    ("where", "error", "steps"),
    [("push", "StaleWeights", 3), ("final evaluation", "EngineLost", 4)],
)
def test_a_run_that_loses_its_engines_keeps_what_it_trained(
    pool: Any, world: Path, tmp_path: Path, where: str, error: str, steps: int
) -> None:
    settings = overrides(world, tmp_path / "run", "checkpoint.every=0", "checkpoint.at_end=false")
    recipe = "recipes/demo/sg_opd.yaml"
    for said in pool(2).run(train_cases.run_without_engines, recipe, settings, where):
        assert said.startswith(f"{error}: planned. ")
        assert said.endswith(f"step-{steps:08d} has what was trained: train again to resume")
    assert len(train_cases.metrics_without_time(tmp_path / "run")) == steps
    assert run(pool, "sg_opd", settings) == ["finished"] * 2
    rows = train_cases.metrics_without_time(tmp_path / "run")
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


LAYOUTS = {  # of two ranks
    "PP2, packed": ["pipeline_model_parallel_size=2", "micro_batch_tokens=60"],
    "PP2 x VPP2": [
        "pipeline_model_parallel_size=2",
        "virtual_pipeline_model_parallel_size=2",
        "recompute_granularity=full",
    ],
    "DP2, distributed optimizer, overlapped, packed": [
        "data_parallel_size=2",
        "use_distributed_optimizer=true",
        "overlap_grad_reduce=true",
        "overlap_param_gather=true",
        "micro_batch_tokens=60",
    ],
    "CP2, packed": ["context_parallel_size=2", "micro_batch_tokens=60"],
    "TP2 + SP, all offloaded, teacher TP1": [
        "tensor_model_parallel_size=2",
        "sequence_parallel=true",
        "hidden_states_budget_mb=0.01",
        "optimizer.offload=true",
        "model.teacher.offload=true",
        "model.reference.offload=true",
        "model.teacher.tensor_model_parallel_size=1",
    ],
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_runs_in_every_layout_take_the_same_steps_and_resume_exactly(
    pool: Any, world: Path, tmp_path: Path, name: str
) -> None:
    layout = ["parallel.tensor_model_parallel_size=1"]
    for setting in LAYOUTS[name]:
        layout.append(setting if "." in setting.split("=")[0] else f"parallel.{setting}")
    # Four layers, enough for interleaved stages, with weights that are not the teacher's.
    student = [f"model.student.hf_path={world}/teacher/hf", "model.student.random_init=true"]
    student += ["checkpoint.every=2"]

    def settings(run_dir: str, *more: str) -> list[str]:
        return overrides(world, tmp_path / run_dir, *student, *more)

    assert run(pool, "sg_opd", settings("plain", "num_steps=1")) == ["finished"] * 2
    assert run(pool, "sg_opd", settings("whole", *layout)) == ["finished"] * 2
    assert run(pool, "sg_opd", settings("cut", *layout), ("stop", 2)) == ["stopped"] * 2
    assert run(pool, "sg_opd", settings("cut", *layout)) == ["finished"] * 2
    plain, whole, cut = (
        train_cases.metrics_without_time(tmp_path / name) for name in ("plain", "whole", "cut")
    )
    assert cut == whole
    for key in ("rollout/accuracy", "rollout/length", "train/tokens", "gate/mixed_groups"):
        assert whole[0][key] == plain[0][key]
    assert whole[0]["train/grad_norm"] == pytest.approx(plain[0]["train/grad_norm"], rel=1e-3)
    a, b = (load_file(tmp_path / name / "hf/model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_the_best_student_is_the_one_of_the_best_evaluation(
    pool: Any, world: Path, tmp_path: Path
) -> None:
    """With scores made up: the third of four is the best, its equal afterwards is not better."""
    settings = overrides(world, tmp_path / "run", "evaluation.every=1", "checkpoint.every=1")
    settings += ["checkpoint.keep=9"]
    scores = [0.1, 0.0, 0.5, 0.5]
    assert (
        pool(2).run(train_cases.run_with_scores, "recipes/demo/opd.yaml", settings, scores)
        == ["finished"] * 2
    )
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["best"] == {"step": 3, "avg_at_k": 0.5, "k": 1}
    third = conversion_cases.to_hf(tmp_path / "run/checkpoints/step-00000003", tmp_path / "third")
    conversion_cases.run(pool, third)
    kept = (tmp_path / "run/hf_best/model.safetensors").read_bytes()
    assert kept == (tmp_path / "third/model.safetensors").read_bytes()
    assert kept != (tmp_path / "run/hf/model.safetensors").read_bytes()


def test_checkpoints_are_pruned_and_a_finished_run_stays_finished(
    pool: Any, world: Path, tmp_path: Path
) -> None:
    settings = overrides(world, tmp_path / "run", "checkpoint.every=1", "checkpoint.keep=2")
    settings += ["checkpoint.at_end=true", "num_steps=3"]
    assert run(pool, "opd", settings) == ["finished"] * 2
    names = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert names == ["step-00000002", "step-00000003"]
    before = (tmp_path / "run/metrics.jsonl").read_text()
    assert run(pool, "opd", settings) == ["finished"] * 2
    assert (tmp_path / "run/metrics.jsonl").read_text() == before


def test_resuming_with_other_settings_is_refused_by_name(
    pool: Any, world: Path, tmp_path: Path
) -> None:
    settings = overrides(world, tmp_path / "run", "checkpoint.at_end=true", "num_steps=1")
    assert run(pool, "opd", settings) == ["finished"] * 2
    with pytest.raises(RankError, match=r"optimizer.lr was 0.0007, now 0.1"):
        run(pool, "opd", [*settings, "optimizer.lr=0.1"])
    # Where servers are is another matter: they may have had to move.
    elsewhere = ["num_steps=2", "rollout.vllm.port=9000", "rollout.vllm.max_restarts=9"]
    assert run(pool, "opd", [*settings, *elsewhere]) == ["finished"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.train=nowhere.jsonl", "nowhere.jsonl does not exist"),
        ("data.problem_field=question", "no field 'question'"),
        ("model.teacher.hf_path=nowhere", "nowhere does not exist"),
        ("rollout.max_new_tokens=5000", "exceed the model's"),
        ("rollout.max_prompt_tokens=3", "every prompt is longer than"),
    ],
)
def test_what_a_run_needs_is_checked_with_a_clear_error(
    pool: Any, world: Path, tmp_path: Path, change: str, message: str
) -> None:
    settings = overrides(world, tmp_path / "run", change)
    for error in pool(2).run(train_cases.error_of, "recipes/demo/opd.yaml", settings):
        assert message in error


def test_data_parallel_replicas_see_the_same_global_batch(
    pool: Any, world: Path, tmp_path: Path
) -> None:
    """TP 2 x DP 1 and TP 1 x DP 2: same prompts, seeds, rollouts; the same step up to rounding."""
    rows = []
    for tp in (2, 1):
        settings = overrides(
            world, tmp_path / f"tp{tp}", f"parallel.tensor_model_parallel_size={tp}"
        )
        settings += [f"parallel.data_parallel_size={2 // tp}", "num_steps=1"]
        assert run(pool, "sg_opd", settings) == ["finished"] * 2
        rows.append(train_cases.metrics_without_time(tmp_path / f"tp{tp}")[0])
    for name in ("rollout/accuracy", "rollout/length", "train/tokens", "gate/mixed_groups"):
        assert rows[0][name] == rows[1][name]
    for name in ("train/loss", "train/grad_norm", "distill/reverse_kl"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-4)


def test_a_labelled_pool_stands_in_for_the_teachers_engine(
    pool: Any, world: Path, tmp_path: Path
) -> None:
    problems = [json.loads(x) for x in (world / "train.jsonl").read_text().splitlines()]
    rows = [
        {
            "problem": p["problem"],
            "completion": rf"\boxed{{{p['answer']}}}",
            "is_correct": i % 2 == 0,  # the labels count, as does the run's own verifier
        }
        for i, p in enumerate(problems)
    ]
    labelled = tmp_path / "pool.jsonl"
    labelled.write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = overrides(
        world, tmp_path / "run", f"distill.phases.source={labelled}", "distill.phases.hold_frac=1.0"
    )
    settings += ["rollout.num_prompts=24", "num_steps=1", "data.shuffle=false"]
    assert run(pool, "sg_opd", settings) == ["finished"] * 2
    (row,) = train_cases.metrics_without_time(tmp_path / "run")
    assert row["phases/requested_fraction"] == 0.5
    assert 0.2 < row["phases/endorsement_rate"] < 0.8
    kept = (tmp_path / "run" / "rollouts" / "step-000001.jsonl").read_text()
    teachers = [r for r in map(json.loads, kept.splitlines()) if r["source"] == "teacher"]
    assert teachers and all(r["is_correct"] for r in teachers)
    right = {r["problem"] for r in rows if r["is_correct"]}
    assert {r["prompt"] for r in teachers} <= right


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "1+1=", "completion": "2"}', r"pool.jsonl:1: 'is_correct' is None"),
        (
            '{"problem": "what?", "completion": "2", "is_correct": true}',
            "1 problems and none of the 24",
        ),
        (None, "which is no file"),
    ],
)
def test_a_pool_that_cannot_serve_is_refused(
    pool: Any, world: Path, tmp_path: Path, line: str | None, message: str
) -> None:
    labelled = tmp_path / "pool.jsonl"
    if line is not None:
        labelled.write_text(line + "\n")
    settings = overrides(world, tmp_path / "run", f"distill.phases.source={labelled}")
    errors = pool(2).run(train_cases.error_of, "recipes/demo/sg_opd.yaml", settings)
    assert all(re.search(message, error) for error in errors)


@pytest.mark.parametrize("section", ["The run folder", "The evaluation folder"])
def test_every_documented_file_is_in_the_code(section: str) -> None:
    cells, names = first_cells(RUN_FOLDER, section), written_names()
    assert len(cells) == len(set(cells)) > 10
    parts = {part for cell in cells for part in cell.split("/") if part}
    patterns = {part: re.escape(part).replace(r"\*", ".*") for part in parts}
    unknown = [
        part
        for part, pattern in patterns.items()
        if not any(re.fullmatch(pattern, name) for name in names)
    ]
    assert unknown == [], "no code names these"


def test_every_word_of_status_is_documented() -> None:
    assert sorted(first_cells(RUN_FOLDER, "Status")) == sorted(status_words())


def test_a_file_that_is_not_documented_is_seen(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(AssertionError, match=r"does not name \['notes.txt'\]"):
        check_run_folder(tmp_path)


def test_a_request_to_stop_is_heeded_while_servers_start(tmp_path: Path) -> None:
    config = load_config("recipes/demo/sg_opd.yaml", [f"logging.run_dir={tmp_path}"])
    waiting = _starting(config, SimpleNamespace(rank=1))  # type: ignore[arg-type]
    waiting("http://localhost:1", 0.0)
    (tmp_path / "STOP").touch()
    with pytest.raises(InterruptedError, match="stopped on request"):
        waiting("http://localhost:1", 0.5)
