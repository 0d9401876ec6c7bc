"""`sgopd doctor RECIPE`, and the same findings at the start of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_sgopd.__main__ import main
from megatron_sgopd.versions import TESTED
from tests.support import train_cases
from tests.test_train import overrides

RECIPE = "recipes/demo/opd.yaml"


@pytest.fixture
def pair(world: Path, tmp_path: Path) -> Path:
    """A copy of the world's student and teacher, to be spoilt."""
    for role in ("student", "teacher"):
        shutil.copytree(world / role / "hf", tmp_path / role / "hf")
    for file in world.glob("*.jsonl"):
        shutil.copy(file, tmp_path)
    return tmp_path


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def end_with_bos(folder: Path) -> None:
    """A model that ends its answers with what the other begins with: id 2."""
    edit(folder / "tokenizer_config.json", eos_token="<bos>")
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, eos_token_id=2)


def doctor(
    capsys: pytest.CaptureFixture[str], folder: Path, *changes: str
) -> tuple[int, dict[tuple[str, str], str]]:
    """(exit code, (about, level) -> text) of the command."""
    code = main(["doctor", RECIPE, *overrides(folder, folder / "run", *changes)])
    printed = capsys.readouterr().out
    found: dict[tuple[str, str], str] = {}
    key = ("", "")
    for line in printed.splitlines():
        about, level, text = line[:15].strip(), line[15:24].strip(), line[24:]
        key = (about, level) if about else key
        found[key] = found.get(key, "") + text
    assert printed.splitlines()[-1].startswith("FAILED" if code else "ok")
    return code, found


def test_a_good_recipe(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = doctor(capsys, pair)
    assert code == 0
    assert {level for about, level in found if not about.startswith("ok")} == {"ok"}
    assert "torch" in found["versions", "ok"]
    assert "1 file(s) of weights" in found["teacher", "ok"]
    assert found["first prompt", "ok"].startswith("'<bos>")
    assert "24 problems" in found["data", "ok"]
    assert found["verifier", "ok"] == "math_verify"


@pytest.mark.parametrize(
    ("change", "about", "text"),
    [
        ("model.teacher.hf_path=nowhere", "models", "nowhere does not exist"),
        ("data.train=nowhere.jsonl", "data", "nowhere.jsonl does not exist"),
        ("evaluation.data=nowhere.jsonl", "data", "nowhere.jsonl does not exist"),
        ("data.problem_field=question", "data", "no field 'question'"),
        ("rollout.max_prompt_tokens=3", "data", "every prompt is longer than"),
        ("rollout.max_new_tokens=5000", "length", "lower rollout.max_new_tokens to 480"),
        ("verifier.name=nowhere.check", "verifier", "No module named 'nowhere'"),
        ("data.chat_template='{{ x.y.z }}'", "chat template", "cannot be rendered"),
    ],
)
def test_what_is_wrong_is_named(
    pair: Path, capsys: pytest.CaptureFixture[str], change: str, about: str, text: str
) -> None:
    code, found = doctor(capsys, pair, change)
    assert code == 1
    assert text in found[about, "error"]


def test_prompts_left_out_are_a_warning(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (pair / "train.jsonl").read_text().splitlines()]
    rows[1]["problem"] = "1" * 40
    (pair / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code, found = doctor(capsys, pair)
    assert code == 0
    assert "of the first 24 1 are longer than rollout.max_prompt_tokens 32" in str(
        found["data", "warning"]
    )


def test_missing_weights_are_told_by_role(pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pair / "teacher/hf/model.safetensors").unlink()
    code, found = doctor(capsys, pair)
    assert code == 1
    assert "holds no weights" in found["teacher", "error"]
    assert "1 file(s) of weights" in found["student", "ok"]


def test_versions_that_were_not_tested_are_a_warning(
    pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TESTED, "torch", ("1.0",))
    code, found = doctor(capsys, pair)
    assert code == 0
    assert "not tested; tested is 1.0" in found["versions", "warning"]


def test_a_run_is_refused_by_what_doctor_refuses(
    pool: Any, pair: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On every rank alike, before a model is loaded: the teacher's weights are not there."""
    end_with_bos(pair / "teacher/hf")
    (pair / "teacher/hf/model.safetensors").unlink()
    settings = overrides(pair, pair / "run")
    for error in pool(2).run(train_cases.error_of, RECIPE, settings):
        assert "set rollout.stop_token_ids=[1, 2]" in error
    code, found = doctor(capsys, pair)
    assert code == 1
    assert "set rollout.stop_token_ids=[1, 2]" in found["end of answer", "error"]


def test_a_run_keeps_what_was_found(
    pool: Any, pair: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    end_with_bos(pair / "teacher/hf")
    settings = overrides(pair, pair / "run", "rollout.stop_token_ids=[1]", "num_steps=1")
    assert pool(2).run(train_cases.run, RECIPE, settings) == ["finished"] * 2
    rows = [json.loads(x) for x in (pair / "run/preflight.jsonl").read_text().splitlines()]
    assert [r["about"] for r in rows if r["level"] == "warning"] == ["end of answer"]
    assert "2 ('<bos>')" in next(r["what"] for r in rows if r["level"] == "warning")


def test_a_run_with_a_teacher_of_more_padding_rows_is_the_same_run(
    pool: Any, world: Path, pair: Path
) -> None:
    """With phased teacher sampling: the teacher's engine has the padding too, and it is loud."""
    folder = pair / "teacher/hf"
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    weights["model.embed_tokens.weight"] = torch.cat([embedding, 9 * embedding[:10]])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder / "config.json", vocab_size=rows + 10)
    metrics = []
    for name, where in (("padded", pair), ("plain", world)):
        settings = overrides(where, pair / name, "num_steps=2")
        assert (
            pool(2).run(train_cases.run, "recipes/demo/sg_opd.yaml", settings) == ["finished"] * 2
        )
        metrics.append(train_cases.metrics_without_time(pair / name))
    assert metrics[0] == metrics[1]
    assert metrics[0][0]["phases/requested_fraction"] == 0.5
