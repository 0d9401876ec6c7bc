"""metrics.jsonl, sums over ranks, and the clock."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sgopd.atomic_files import read_json_lines
from megatron_sgopd.config.schema import LoggingConfig
from megatron_sgopd.metrics import Clock, StepLog, add_up, progress_bar
from tests.support import model_cases
from tests.support.documents import METRICS, check_run_folder, first_cells, logged_names


def write(path: Path, first: int, steps: range) -> None:
    writer = StepLog(path.parent, LoggingConfig(), first)
    for step in steps:
        writer.write(step, {"loss/total": step / 3})
    writer.close()


def steps_of(path: Path) -> list[int]:
    return [row["step"] for row in list(read_json_lines(path))]


def test_rows_are_appended_and_keep_seven_digits(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    writer = StepLog(path.parent, LoggingConfig(), 0)
    writer.write(1, {"b/x": 1 / 3, "a/y": 1e-12, "a/z": 3.0})
    assert path.read_text().endswith("\n")  # on disk before close
    writer.close()
    assert path.read_text() == '{"step": 1, "a/y": 1e-12, "a/z": 3.0, "b/x": 0.3333333}\n'


@pytest.mark.parametrize(("resumed_at", "left"), [(0, []), (3, [1, 2, 3]), (9, [1, 2, 3, 4, 5])])
def test_resuming_cuts_back_to_the_checkpoint(
    tmp_path: Path, resumed_at: int, left: list[int]
) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 6))
    StepLog(path.parent, LoggingConfig(), resumed_at).close()
    assert steps_of(path) == left
    write(path, resumed_at, range(resumed_at + 1, resumed_at + 3))
    assert steps_of(path) == [*left, resumed_at + 1, resumed_at + 2]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, 0, range(1, 4))
    with path.open("a") as file:
        file.write('{"step": 4, "loss/to')
    assert steps_of(path) == [1, 2, 3]
    write(path, 4, range(5, 6))
    assert steps_of(path) == [1, 2, 3, 5]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert list(read_json_lines(tmp_path / "metrics.jsonl")) == []


def test_add_up_takes_names_from_any_part() -> None:
    def pair(s: float, n: float) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor(s), torch.tensor(n)

    total = add_up([{"a": pair(1, 2)}, {"b": pair(5, 1)}, {"a": pair(3, 4), "b": pair(1, 1)}])
    assert {k: (s.item(), n.item()) for k, (s, n) in total.items()} == {"a": (4, 6), "b": (6, 2)}
    assert add_up([]) == {}


def test_reduced_means_over_ranks(pool: Any) -> None:
    """Rank 0 counts a and b, rank 1 counts a and c; nobody counts d."""
    expected = {"a": (1.0 + 10.0) / (2 + 3), "b": 0.5, "c": -4.0, "big": 2.0**25 + 1}
    for means in pool(2).run(model_cases.means):
        assert means == pytest.approx(expected, rel=1e-9)
        assert set(means) == set(expected)


def test_the_clock_adds_spans_and_forgets_them() -> None:
    clock = Clock()
    with clock.span("train"):
        pass
    first = clock.seconds["time/train_s"]
    with pytest.raises(KeyError), clock.span("train"):
        raise KeyError("a span that fails still counts")
    assert clock.seconds["time/train_s"] > first >= 0
    assert set(clock.take()) == {"time/train_s"}
    assert clock.take() == {}


@pytest.mark.parametrize("show", [True, False])
def test_the_progress_bar_shows_on_one_rank(show: bool, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("steps", 4, initial=1, show=show) as bar:
        bar.update(2)
    assert ("3/4" in capsys.readouterr().err) == show


def test_the_document_names_what_the_code_logs_and_nothing_else() -> None:
    documented, patterns = first_cells(METRICS), logged_names()
    assert len(documented) == len(set(documented)) > 40
    unknown = [name for name in documented if not any(re.fullmatch(p, name) for p in patterns)]
    assert unknown == [], "no code logs these"
    missing = [p for p in patterns if not any(re.fullmatch(p, name) for name in documented)]
    assert missing == [], "docs/metrics.md does not name these"


def test_a_metric_that_is_not_documented_is_seen_in_a_run(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", 0, range(1, 3))
    with pytest.raises(AssertionError, match=r"does not name \['loss/total'\]"):
        check_run_folder(tmp_path)
