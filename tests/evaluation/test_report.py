"""The report from run folders: what it shows, leaves out, and must not let through."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_sgopd.demo.world import WorldSizes, write_world
from megatron_sgopd.evaluation.accuracy import paired_difference, summarize
from megatron_sgopd.evaluation.report import read_run, write_report
from megatron_sgopd.evaluation.report_figures import PANELS, draw
from tests.support.fake_trainer import write_run

VOID = {"meta", "br", "path", "use", "image", "rect", "img", "link", "hr"}


class Balanced(HTMLParser):
    """Fails on a tag that closes what is not open; keeps text and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [v or "" for k, v in attrs if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parse(path: Path) -> Balanced:
    parser = Balanced()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("runs")
    sizes = WorldSizes(train=4, dev=4, test=30, teacher=4, student_noisy=4, student_terse=4)
    write_world(home / "world", seed=0, level="normal", sizes=sizes)
    lines = (home / "world" / "test.jsonl").read_text().splitlines()
    problems = [json.loads(line) for line in lines]
    methods = {"student": "sft", "opd": "opd", "sg_opd": "sg_opd"}
    for name, method in methods.items():
        write_run(home / name, problems, method)
    return {name: home / name for name in methods}


@pytest.fixture(scope="module")
def page(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    write_report(list(runs.values()), out, title="A < B", notes=["one <i> note"])
    return out


def test_page_is_well_formed_and_fetches_nothing(page: Path):
    parsed = parse(page)
    assert [r for r in parsed.references if not r.startswith("#")] == []
    assert "@import" not in page.read_text() and "url(http" not in page.read_text()
    assert list(page.parent.iterdir()) == [page]


def test_title_and_notes_are_escaped(page: Path):
    text = page.read_text()
    assert "<h1>A &lt; B</h1>" in text and "one &lt;i&gt; note" in text


def test_table_shows_the_statistics_of_the_records(page: Path, runs: dict[str, Path]):
    text = page.read_text()
    evaluations = {name: read_run(path).evaluation for name, path in runs.items()}
    for name, records in evaluations.items():
        row = next(r for r in re.findall(r"<tr>(.*?)</tr>", text) if f"</i>{name}<" in r)
        cells = re.findall(r"<td>(.*?)</td>", row)
        figures = summarize(records)
        assert cells[3] == f"{100 * figures['avg_at_k']:.1f}"
        low, high = figures["ci95"]
        assert cells[4] == f"[{100 * low:.1f}, {100 * high:.1f}]"
        if name == "opd":
            assert cells[5] == ""
        else:
            mean = paired_difference(records, evaluations["opd"]).mean
            assert cells[5].startswith(f"{100 * mean:+.1f} ")
        assert cells[8] == f"{100 * figures['greedy']:.1f}"


def test_no_difference_is_shown_between_other_problems(runs: dict[str, Path], tmp_path: Path):
    problem = {"id": "x", "problem": "1+1=", "answer": "2", "solution": "\\boxed{2}"}
    write_run(tmp_path / "elsewhere", [problem], "sg_opd")
    write_report([runs["opd"], tmp_path / "elsewhere"], tmp_path / "r.html")
    assert "<td>other problems</td>" in (tmp_path / "r.html").read_text()


def test_completions_are_escaped(page: Path):
    text = page.read_text()
    assert "&lt;b&gt;3+3=5;&lt;/b&gt;\\boxed{9} &amp; so on" in text
    assert "<b>3+3=5;" not in text


def test_rollouts_of_start_and_end_with_both_outcomes(page: Path):
    text = page.read_text()
    assert text.count("<summary>step 10</summary>") == text.count("<summary>step 30</summary>") == 2
    assert 'class="right">right' in text and 'class="wrong">wrong' in text


@pytest.mark.parametrize("panel", PANELS, ids=lambda p: p.title)
def test_every_panel_is_drawn_where_its_quantity_is_there(panel, page: Path):
    assert f"<h3>{panel.title}</h3>" in page.read_text()


def test_supervised_runs_show_their_training_alone(page: Path):
    supervised = page.read_text().split("<h2>Supervised training</h2>")[1].split("<h2>")[0]
    assert re.findall("<h3>(.*?)</h3>", supervised) == ["Training loss", "Gradient norm"]


def test_a_panel_draws_a_line_per_run_and_key():
    panel = next(p for p in PANELS if p.keys[0] == "gate/open_rate")
    rows = [{"step": i, "gate/open_rate": 0.1 * i, "gate/open_rate_mixed": 0.2} for i in (1, 2, 3)]
    colours = {"a": "#ff0000", "b": "#00ff00", "c": "#0000ff"}
    svg = draw(panel, {"a": rows, "b": rows, "c": [{"step": 1}]}, colours)
    assert svg is not None and svg.startswith("<svg role=")
    lines = [
        re.findall(rf'<path [^>]*style="(fill: none[^"]*stroke: {c}[^"]*)"', svg)
        for c in colours.values()
    ]
    assert [len(found) for found in lines] == [2, 2, 0]
    assert [sum("dasharray" in style for style in found) for found in lines] == [1, 1, 0]


def test_a_panel_without_values_is_left_out():
    assert draw(PANELS[0], {"a": [{"step": 1, "train/loss": 2.0}]}, {"a": "#000000"}) is None


@pytest.mark.parametrize(
    "missing", ["summary.json", "metrics.jsonl", "evaluation/final", "rollouts"]
)
def test_a_folder_may_lack_any_part(missing: str, runs: dict[str, Path], tmp_path: Path):
    run = tmp_path / "partial"
    shutil.copytree(runs["sg_opd"], run)
    target = run / missing
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    write_report([run, runs["opd"]], tmp_path / "r.html")
    assert "</i>partial" in "".join((tmp_path / "r.html").read_text())
    parse(tmp_path / "r.html")


def test_folders_of_one_name_are_told_apart(runs: dict[str, Path], tmp_path: Path):
    shutil.copytree(runs["opd"], tmp_path / "opd")
    write_report([runs["opd"], tmp_path / "opd"], tmp_path / "r.html")
    assert "</i>opd (2)<" in (tmp_path / "r.html").read_text()


def test_what_is_no_run_is_named(tmp_path: Path):
    with pytest.raises(ValueError, match="is no folder"):
        write_report([tmp_path / "nothing"], tmp_path / "r.html")
    with pytest.raises(ValueError, match=r"has no metrics.jsonl"):
        write_report([tmp_path], tmp_path / "r.html")
    with pytest.raises(ValueError, match="at least one"):
        write_report([], tmp_path / "r.html")


def test_a_broken_line_is_named(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2: not JSON"):
        read_run(tmp_path)
