"""`sgopd evaluate`, `rescore` and `compare` on tiny models: figures, resumption, refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sgopd.__main__ import _parse, main
from megatron_sgopd.atomic_files import read_json_lines
from megatron_sgopd.cli.evaluate import PROTOCOL, config_of
from megatron_sgopd.config.load import load_config
from megatron_sgopd.evaluation.samples import (
    Journal,
    join,
    journal_path,
    merge_journals,
    read_samples,
)
from megatron_sgopd.model import content_digest as fingerprints
from megatron_sgopd.model.content_digest import fingerprint
from megatron_sgopd.rollouts.vllm_servers.server import free_ports
from tests.cli.test_cli import sgopd
from tests.support import evaluation_cases
from tests.support.documents import check_files
from tests.support.evaluation_cases import SHORT, complaint, judge, make_model, on_ranks, write_sets

STOPS = "rollout.stop_token_ids=[" + ",".join(map(str, range(40))) + "]"  # most answers end
OWN = "verifier.name=tests.support.evaluation_cases.judge"
SETS = ("aime25", "hmmt")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: make_model(folder / name, seed) for seed, name in enumerate("ab", 1)}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_sets(tmp_path_factory.mktemp("sets"))


@pytest.fixture(scope="module")
def evaluated(
    pool: Any, models: dict[str, Path], sets: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Evaluations of both models by one rank, never interrupted."""
    folder = tmp_path_factory.mktemp("evaluated")
    for name in models:
        given = arguments(models[name], sets, folder / name)
        assert pool(1).run(on_ranks, given) == ["finished"]
    return {name: folder / name for name in models}


def arguments(model: Path, sets: list[str], out: Path, *more: str) -> list[str]:
    return [str(model), *sets, "--out", str(out), *SHORT, STOPS, OWN, *more]


def contents(folder: Path) -> dict[str, bytes]:
    """What must be the same however an evaluation came about."""
    files = [*(folder / "samples" / f"{name}.jsonl" for name in SETS), folder / "summary.json"]
    return {file.name: file.read_bytes() for file in files}


def marks(folder: Path, name: str) -> dict[str, list[bool]]:
    """{problem: whether each sample is right}, judged here."""
    found: dict[str, list[bool]] = {}
    for row in read_json_lines(folder / "samples" / f"{name}.jsonl"):
        if row["sample"] >= 0:
            right = judge(row["completion"], "") and row["finish_reason"] == "stop"
            found.setdefault(row["id"], []).append(right)
    return found


# -- figures ---------------------------------------------------------------------------------------


def test_figures_are_those_of_the_samples(evaluated: dict[str, Path]) -> None:
    folder = evaluated["a"]
    check_files(folder, "The evaluation folder")
    summary = json.loads((folder / "summary.json").read_text())
    averages, passes, lengths, cut = [], [], [], []
    for name in SETS:
        found = marks(folder, name)
        rows = list(read_json_lines(folder / "samples" / f"{name}.jsonl"))
        assert all(len(m) == 5 for m in found.values())
        subsets = [list(combinations(m, 3)) for m in found.values()]
        averages.append(np.mean([np.mean(m) for m in found.values()]))
        passes.append(np.mean([np.mean([any(s) for s in each]) for each in subsets]))
        lengths.append(np.mean([r["length"] for r in rows if r["sample"] >= 0]))
        cut.append(np.mean([r["finish_reason"] == "length" for r in rows if r["sample"] >= 0]))
        told = summary["benchmarks"][name]
        assert told["avg_at_k"] == pytest.approx(averages[-1])
        assert told["pass_at_k"] == pytest.approx(passes[-1])
        greedy = [
            judge(r["completion"], "") and r["finish_reason"] == "stop"
            for r in rows
            if r["sample"] < 0
        ]
        assert told["greedy"] == pytest.approx(np.mean(greedy))
        assert told["ci95"][0] <= told["avg_at_k"] <= told["ci95"][1]
    assert 0 < np.mean(averages) < np.mean(passes) < 1, "samples that tell something"
    for key, values in {
        "avg_at_k": averages,
        "pass_at_k": passes,
        "mean_length": lengths,
        "truncated": cut,
    }.items():
        assert summary[key] == pytest.approx(np.mean(values)), key
    assert (summary["k"], summary["num_samples"], summary["num_problems"]) == (3, 5, 5)


def test_answers_of_the_real_schemas_are_read(evaluated: dict[str, Path]) -> None:
    problems = [list(read_json_lines(evaluated["a"] / "problems" / f"{n}.jsonl")) for n in SETS]
    assert [p["answer"] for p in problems[0]] == ["42", "15"]
    assert [p["answer"] for p in problems[1]] == ["\\frac{1}{2}", "\\sqrt{2}", "(1, 2]"]


@pytest.mark.parametrize(
    "layout",
    [["parallel.data_parallel_size=2"], ["parallel.tensor_model_parallel_size=2"]],
    ids=["two replicas", "two ranks of one"],
)
def test_two_ranks_give_what_one_gives(
    pool: Any,
    models: dict[str, Path],
    sets: list[str],
    evaluated: dict[str, Path],
    tmp_path: Path,
    layout: list[str],
) -> None:
    given = arguments(models["a"], sets, tmp_path / "out", *layout)
    assert pool(2).run(on_ranks, given) == ["finished"] * 2
    assert contents(tmp_path / "out") == contents(evaluated["a"])


# -- resumption ------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [1, 11, 37])
def test_a_killed_evaluation_goes_on_and_nothing_is_made_twice(
    pool: Any,
    models: dict[str, Path],
    sets: list[str],
    evaluated: dict[str, Path],
    tmp_path: Path,
    after: int,
) -> None:
    given = arguments(models["a"], sets, tmp_path / "out")
    rank = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    rank |= {"MASTER_PORT": str(free_ports("127.0.0.1", 1)[0])}
    program = [sys.executable, "-m", "tests.support.evaluation_cases", str(after), *given]
    killed = subprocess.run(program, env=os.environ | rank, capture_output=True, timeout=200)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    journals = list((tmp_path / "out" / "journals").iterdir())
    assert any(not journal.read_bytes().endswith(b"\n") for journal in journals), "a torn line"
    there = {name: set(read_samples(tmp_path / "out", name)) for name in SETS}
    assert min(after - 1, 1) <= sum(map(len, there.values())) < 30
    (made,) = pool(1).run(evaluation_cases.made_on_ranks, given)
    assert sorted(made) == sorted(
        (row["id"], row["sample"])
        for name in SETS
        for row in read_json_lines(evaluated["a"] / "samples" / f"{name}.jsonl")
        if (row["id"], row["sample"]) not in there[name]
    )
    assert contents(tmp_path / "out") == contents(evaluated["a"])
    assert not list((tmp_path / "out" / "journals").iterdir())


def test_more_samples_and_another_k_build_on_those_that_are_there(
    pool: Any,
    models: dict[str, Path],
    sets: list[str],
    evaluated: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(evaluated["a"], out)
    more = arguments(models["a"], sets, out, "evaluation.n=6")
    (made,) = pool(1).run(evaluation_cases.made_on_ranks, more)
    assert [sample for _, sample in made] == [5] * 5
    # No rank is needed for what is there.
    monkeypatch.setattr(
        "megatron_sgopd.distributed.torchrun.run_ranks", lambda *_, **__: pytest.fail("ranks")
    )
    assert main(["evaluate", *arguments(models["a"], sets, out, "evaluation.k=5")]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["k"], summary["num_samples"]) == (5, 5)
    assert summary["pass_at_k"] == pytest.approx(
        np.mean([np.mean([any(m) for m in marks(evaluated["a"], n).values()]) for n in SETS])
    )


def test_a_moved_model_is_the_same_and_other_weights_are_not(
    models: dict[str, Path],
    sets: list[str],
    evaluated: dict[str, Path],
    tmp_path: Path,
    capsys: Any,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(evaluated["a"], out)
    shutil.copytree(models["a"], tmp_path / "moved")
    assert main(["evaluate", *arguments(tmp_path / "moved", sets, out)]) == 0
    capsys.readouterr()
    for change, words in {
        "evaluation.temperature=0.7": "sampling.temperature: 1.0 and 0.7",
        "data.prompt_suffix=' Think.'": "the prompts of aime25",
        "seed=3": "seed: 42 and 3",
        "verifier.name=math_verify": "`sgopd rescore`",
    }.items():
        said = complaint(capsys, "evaluate", *arguments(models["a"], sets, out, change))
        assert words in said and "another --out" in said
    said = complaint(capsys, "evaluate", *arguments(models["b"], sets, out))
    assert "the model's content" in said


def test_a_benchmark_set_aside_keeps_its_prompts(
    models: dict[str, Path],
    sets: list[str],
    evaluated: dict[str, Path],
    tmp_path: Path,
    capsys: Any,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(evaluated["a"], out)
    assert main(["evaluate", *arguments(models["a"], sets[:2], out)]) == 0
    assert list(json.loads((out / "summary.json").read_text())["benchmarks"]) == ["aime25"]
    capsys.readouterr()
    swapped = [*sets[:2], "--benchmark", f"hmmt={sets[1].partition('=')[2]}"]
    assert "the prompts of hmmt" in complaint(
        capsys, "evaluate", *arguments(models["a"], swapped, out)
    )


def test_one_evaluation_at_a_time_writes_into_a_folder(
    models: dict[str, Path],
    sets: list[str],
    evaluated: dict[str, Path],
    tmp_path: Path,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from megatron_sgopd.evaluation import job as evaluation_job

    monkeypatch.setattr(evaluation_job, "LOCK_PATIENCE_S", 0.0)
    out = tmp_path / "out"
    shutil.copytree(evaluated["a"], out)
    with evaluation_job.locked(out):
        said = complaint(capsys, "evaluate", *arguments(models["a"], sets, out))
    assert "being written by another evaluation" in said


def test_a_stopped_evaluation_says_where_it_stands(
    pool: Any, models: dict[str, Path], sets: list[str], tmp_path: Path
) -> None:
    given = arguments(models["a"], sets, tmp_path / "out")
    assert pool(1).run(evaluation_cases.stopped_on_ranks, given) == ["stopped"]
    rows = [read_samples(tmp_path / "out", name) for name in SETS]
    assert sum(map(len, rows)) == 8, "a part, and no more"


# -- refusals --------------------------------------------------------------------------------------

REFUSED = {
    "no file": (
        ["--benchmark", "x=nowhere.jsonl"],
        [],
        "benchmark x: nowhere.jsonl does not exist",
    ),
    "empty": (["--benchmark", "x={tmp}/empty.jsonl"], [], "holds no problems"),
    "no such field": ([], ["evaluation.answer_field=Answer"], "Set evaluation.answer_field to one"),
    "not NAME=FILE": (["--benchmark", "x"], [], "NAME=FILE is wanted"),
    "twice": (["--benchmark", "aime25=y"], [], "a name comes twice"),
    "k above n": ([], ["evaluation.k=6"], "evaluation.k is 6 and evaluation.n 5"),
    "top_p": ([], ["evaluation.top_p=0"], "evaluation.top_p is 0"),
    "long prompts": (
        [],
        ["rollout.max_prompt_tokens=3"],
        "longer than rollout.max_prompt_tokens 3",
    ),
    "positions": (
        [],
        ["evaluation.max_new_tokens=600"],
        "set evaluation.max_new_tokens to at most",
    ),
    "no template": ([], ["data.chat_template=null"], "set data.chat_template=plain"),
    "--model": (["--model", "teacher"], [], "goes with a RECIPE"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_one_line(
    models: dict[str, Path], sets: list[str], tmp_path: Path, capsys: Any, case: str
) -> None:
    options, overrides, words = REFUSED[case]
    (tmp_path / "empty.jsonl").touch()
    options = [option.format(tmp=tmp_path) for option in options]
    given = arguments(models["a"], [*sets, *options], tmp_path / "out", *overrides)
    assert words in complaint(capsys, "evaluate", *given)
    assert not (tmp_path / "out").exists()


def test_mistakes_in_the_arguments_answer_without_torch() -> None:
    for given, words in {
        ("recipes/evaluation_paper.yaml", "evaluation.k=64"): "evaluation.k is 64",
        ("recipes/demo/student.yaml",): "has no weights to evaluate",
        ("recipes/demo/opd.yaml", "evaluation.data=null"): "give --benchmark NAME=FILE",
        ("recipes/demo/student.yaml", "--model", "teacher"): "no model.teacher.hf_path",
    }.items():
        result = sgopd("evaluate", *given)
        assert (result.returncode, result.stdout) == (2, "loaded:\n"), result.stderr
        assert words in result.stderr and result.stderr.count("\n") == 1


# -- recipes ---------------------------------------------------------------------------------------


def test_the_papers_protocol_is_one_recipe() -> None:
    config = load_config(PROTOCOL, unread=["data.train"])
    e = config.evaluation
    assert (e.n, e.k, e.temperature, e.top_p, e.max_new_tokens) == (32, 32, 1.0, 1.0, 16384)
    assert (e.top_k, e.min_p, config.seed) == (None, 0.0, 42)
    assert list(e.benchmarks) == ["aime24", "aime25", "hmmt25_feb", "hmmt25_nov"]
    assert config.data.chat_template_kwargs == {"enable_thinking": False}
    assert config.data.prompt_suffix == (
        "\nPlease reason step by step, and put your final answer within \\boxed{}."
    )


@pytest.mark.parametrize(
    ("given", "path", "name"),
    [
        ([], "runs/demo/normal-42/student/hf", "demo_opd"),
        (["--model", "teacher"], "runs/demo/normal-42/teacher/hf", "demo_opd-teacher"),
        (["--model", "runs/x/hf"], "runs/x/hf", "demo_opd-x-hf"),
    ],
)
def test_a_recipe_is_read_as_an_evaluation(given: list[str], path: str, name: str) -> None:
    config = config_of(_parse(["evaluate", "recipes/demo/opd.yaml", *given, "evaluation.n=9"]))
    assert (config.model.student.hf_path, config.name) == (path, name)
    assert (config.evaluation.n, config.evaluation.max_new_tokens) == (9, 64)
    assert config.logging.run_dir == f"runs/evaluations/{name}"
    p = config.parallel  # two ranks of one replica, which share requests and no weights
    assert (p.tensor_model_parallel_size, p.context_parallel_size, p.data_parallel_size) == (
        1,
        2,
        1,
    )


def test_a_fingerprint_sees_content_and_not_names(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copytree(models["a"], tmp_path / "copy")
    for whole in (fingerprints.WHOLE_BYTES, 1):
        monkeypatch.setattr(fingerprints, "WHOLE_BYTES", whole)
        assert fingerprint(copy) == fingerprint(models["a"]) != fingerprint(models["b"])
    weights = copy / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    assert fingerprint(copy) != fingerprint(models["a"])


# -- another verifier, another model ---------------------------------------------------------------


def test_samples_are_scored_again_by_another_verifier(
    evaluated: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    before = contents(evaluated["a"])
    name = "tests.support.evaluation_cases.always"
    given = ["rescore", str(evaluated["a"]), "--out", str(tmp_path / "again")]
    result = sgopd(*given, f"verifier.name={name}", "evaluation.k=2")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("loaded: numpy\n"), "no engine, no torch"
    summary = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert (summary["verifier"], summary["k"]) == (name, 2)
    assert summary["avg_at_k"] == pytest.approx(1 - summary["truncated"]), "cut off is wrong"
    assert contents(evaluated["a"]) == before
    said = complaint(capsys, "compare", str(tmp_path / "again"), str(evaluated["a"]))
    cases = "tests.support.evaluation_cases"
    assert f"verifier: '{cases}.always' and '{cases}.judge'" in said
    said = complaint(capsys, "rescore", str(evaluated["a"]), "evaluation.temperature=0.5")
    assert "does not read evaluation.temperature" in said


def test_scoring_again_replaces_no_other_samples(
    evaluated: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    other = tmp_path / "other"
    shutil.copytree(evaluated["b"], other)
    given = ["rescore", str(evaluated["a"]), OWN]
    said = complaint(capsys, *given, "--out", str(other))
    assert "holds other samples" in said and "the model's content" in said
    assert contents(other) == contents(evaluated["b"])
    for k in ("evaluation.k=2", "evaluation.k=3"):  # a folder of its own is written anew
        assert main([*given, k, "--out", str(tmp_path / "again")]) == 0


def test_two_models_are_compared_problem_by_problem(
    evaluated: dict[str, Path], tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "figures.json"
    given = ["compare", str(evaluated["a"]), str(evaluated["b"]), "--json", str(out)]
    assert main(given) == 0
    found, screen = json.loads(out.read_text()), capsys.readouterr().out
    a, b = ({n: marks(evaluated[m], n) for n in SETS} for m in "ab")
    gaps = {n: np.array([np.mean(a[n][i]) - np.mean(b[n][i]) for i in a[n]]) for n in SETS}
    rng = np.random.default_rng(42)
    draws = np.zeros(2000)
    for name in SETS:  # each set resampled within itself, then averaged
        size = len(gaps[name])
        draws += gaps[name][rng.integers(0, size, size=(2000, size))].mean(1) / 2
    told = found["avg_at_k"]
    assert told["difference"] == pytest.approx(np.mean([g.mean() for g in gaps.values()]))
    assert told["ci95"] == pytest.approx(np.quantile(draws, [0.025, 0.975]))
    assert told["first"] - told["second"] == pytest.approx(told["difference"])
    for name in SETS:
        each = found["benchmarks"][name]["avg_at_k"]
        assert each["difference"] == pytest.approx(gaps[name].mean())
        assert each["ci95"][0] <= each["difference"] <= each["ci95"][1]
    assert any(line.startswith("mean") and "pass@3" in line for line in screen.splitlines())


def test_what_does_not_compare_is_named(
    models: dict[str, Path],
    sets: list[str],
    evaluated: dict[str, Path],
    tmp_path: Path,
    capsys: Any,
) -> None:
    one = str(evaluated["a"])
    assert "holds no evaluation" in complaint(capsys, "compare", one, str(tmp_path))
    fewer = tmp_path / "fewer"
    shutil.copytree(evaluated["b"], fewer)
    assert main(["evaluate", *arguments(models["b"], sets[:2], fewer, "evaluation.k=2")]) == 0
    capsys.readouterr()
    said = complaint(capsys, "compare", one, str(fewer))
    assert "the problems of hmmt: the first alone has them" in said and "k: 3 and 2" in said
    cut = tmp_path / "cut"
    shutil.copytree(evaluated["b"], cut)
    rows = (cut / "samples" / "hmmt.jsonl").read_text().splitlines(keepends=True)
    (cut / "samples" / "hmmt.jsonl").write_text("".join(rows[:-1]))
    said = complaint(capsys, "compare", one, str(cut))
    assert "not finished (hmmt: 17 of 18 answers)" in said


# -- rows ------------------------------------------------------------------------------------------


def test_a_torn_last_line_is_left_out_and_another_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert list(read_json_lines(path)) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a"\n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl:2: not JSON"):
        list(read_json_lines(path))


def test_a_benchmark_does_not_touch_one_whose_name_begins_like_its_own(tmp_path: Path) -> None:
    row = {"id": "p", "sample": 0, "completion": "x"}
    for name in ("aime", "aime.24", "aime.00000"):
        journal = Journal(journal_path(tmp_path, name, 0))
        journal.append(row | {"completion": name})
        journal.close()
    rows = read_samples(tmp_path, "aime")
    assert rows == {("p", 0): row | {"completion": "aime"}}
    merge_journals(tmp_path, "aime", [{"id": "p"}], rows)
    for name in ("aime.24", "aime.00000"):
        assert read_samples(tmp_path, name) == {("p", 0): row | {"completion": name}}


def test_rows_are_joined_with_their_verdicts() -> None:
    answer = {"id": "p", "sample": 0, "completion": "x"}
    later = {"id": "p", "sample": 0, "completion": "y"}
    verdict = {"id": "p", "sample": 0, "is_correct": True}
    lonely = {"id": "q", "sample": 0, "is_correct": True}
    assert join([answer, verdict, later, lonely]) == {("p", 0): answer | verdict}
