"""The folders: no cycle among modules, no import that goes up, and tests that mirror them."""

from __future__ import annotations

from pathlib import Path

from tests.package_graph import broken_layers, find_cycle, layers, module_graph

ROOT = Path(__file__).resolve().parent.parent
OF_THE_WHOLE = {"house", "package_graph", "public_api", "release"}
BESIDE = {"support", "tools", "vllm", "cluster", "gpu"}  # folders of tests that mirror none


def test_no_module_cycle_and_no_import_that_goes_up() -> None:
    graph = module_graph()
    assert len(graph) > 150, "the package was found"
    assert find_cycle(graph) == []
    assert broken_layers(graph, layers()) == []


def test_planted_cycle_and_planted_break_are_found(tmp_path: Path) -> None:
    for name, text in {
        "__init__.py": "",
        "data/__init__.py": "",
        "data/rows.py": "def late():\n    from megatron_sgopd.data import problems\n",
        "data/problems.py": "import megatron_sgopd.data.rows\nimport megatron_sgopd.types\n",
        "types.py": "from megatron_sgopd.data.problems import Problem\n",
    }.items():
        path = tmp_path / "megatron_sgopd" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = module_graph(tmp_path)
    cycle = find_cycle(graph)
    assert cycle[0] == cycle[-1] and len(cycle) in (3, 4), cycle
    assert broken_layers(graph, layers()) == [
        "megatron_sgopd.types -> megatron_sgopd.data.problems"
    ]


def test_tests_mirror_the_package() -> None:
    tests, package = ROOT / "tests", ROOT / "megatron_sgopd"
    folders = {
        path.parent.relative_to(tests) for path in tests.rglob("test_*.py") if path.parent != tests
    }
    strangers = {str(f) for f in folders if f.parts[0] not in BESIDE and not (package / f).is_dir()}
    assert strangers == set(), "folders of tests that are no package's"
    for path in tests.glob("test_*.py"):
        module = path.stem.removeprefix("test_")
        assert (package / f"{module}.py").is_file() or module in OF_THE_WHOLE, (
            f"{path.name} tests no module of the top level: it belongs in a folder"
        )
