"""Finds cycles and broken layers among the package's modules.

`python -m tests.package_graph` prints them, and exits with 1 if there are any. import-linter checks
the layers of packages (`make lint`); this adds cycles between files of one package, reads imports
inside functions too, and needs nothing but the syntax trees.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "megatron_sgopd"
# Importing the package itself gives access to what its `__init__` loads on demand, not to a module.
Graph = Mapping[str, set[str]]  # module -> the modules that it imports


def module_graph(root: Path = ROOT) -> dict[str, set[str]]:
    """Reads which module imports which, both by dotted name; `root` holds the package."""
    files = {_module_name(path.relative_to(root)): path for path in (root / PACKAGE).rglob("*.py")}
    return {
        module: {name for name in _imports(path, files) if name not in (module, PACKAGE)}
        for module, path in files.items()
    }


def find_cycle(graph: Graph) -> list[str]:
    """Returns the modules of one cycle, the first of them again at its end; empty if none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def layers(root: Path = ROOT) -> dict[str, int]:
    """Reads the layer of each package and top-level module from pyproject.toml, the lowest 0."""
    contracts = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    (rows,) = (c["layers"] for c in contracts["contracts"] if c["type"] == "layers")
    return {
        name.strip(): height for height, row in enumerate(reversed(rows)) for name in row.split("|")
    }


def broken_layers(graph: Graph, heights: Mapping[str, int]) -> list[str]:
    """Lists each import that leaves its package and does not go down, as "a -> b"."""
    return sorted(
        f"{module} -> {imported}"
        for module in graph
        for imported in graph[module]
        if (here := _unit(module)) != (there := _unit(imported))
        and PACKAGE not in (here, there)
        and heights[there] >= heights[here]
    )


def _unit(module: str) -> str:
    """Returns the package or top-level module that a module belongs to."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else PACKAGE


def _module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _imports(path: Path, modules: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def main() -> int:
    """Prints what is wrong; returns the exit code."""
    graph = module_graph()
    cycle, broken = find_cycle(graph), broken_layers(graph, layers())
    edges = sum(map(len, graph.values()))
    print(f"{len(graph)} modules, {edges} imports")
    print(f"cycle: {' -> '.join(cycle) if cycle else 'none'}")
    print("imports that do not go down:", *(broken or ["none"]), sep="\n  ")
    return 1 if cycle or broken else 0


if __name__ == "__main__":
    sys.exit(main())
