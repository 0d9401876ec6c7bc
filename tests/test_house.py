"""House rules that a tool can check: layers, imports, file sizes, requirements, make's targets."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
UNTRACKED = {"__pycache__", "build", "runs"}  # and whatever starts with a dot, but for .ci

# Places of one machine, and hosts of package indexes. The escapes keep this file from matching.
MACHINE_PATH = re.compile(r"(?<![\w.*~}>)-])/(?:home|root|Users|work)/\w|\bfile:/{3}\w")
INDEX_HOST = re.compile(r"pypi\.org/simple|pythonhosted\.org|pytorch\.org/whl")
MAY_NAME_AN_INDEX = {"Makefile", "README.md"}  # through the one variable TORCH_INDEX

LAYERS = "layers: a package imports from those below it only"
MATHEMATICS = "Megatron: the mathematics does not know it"
ENGINE = "vLLM: it runs in its own process"
LAUNCHER = "nemo-run: it has an environment of its own"
LIGHT = "torch: recipes, nouns, the verifier and what launches"


def project_files(*suffixes: str) -> Iterator[Path]:
    """The files of the checkout, build products and environments left out."""
    for folder, folders, names in os.walk(ROOT):
        folders[:] = [
            name
            for name in folders
            if name not in UNTRACKED
            and not name.endswith(".egg-info")
            and (not name.startswith(".") or name == ".ci")
        ]
        for name in names:
            path = Path(folder, name)
            if not suffixes or path.suffix in suffixes:
                yield path


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared_requirements() -> dict[str, Requirement]:
    project = pyproject()["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return {canonicalize_name(line.name): line for line in map(Requirement, lines)}


def requirement_lines(path: str) -> list[str]:
    """The logical lines of a requirements file: no comments, continuation lines joined."""
    text = (ROOT / path).read_text().replace("\\\n", " ")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def locked_versions(lock: str = "cpu") -> dict[str, Version]:
    lines = requirement_lines(f"requirements/{lock}.lock")
    pins = (line.split()[0].split("==") for line in lines)
    return {canonicalize_name(name): Version(version) for name, version in pins}


def run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a tool of this environment; make's own variables do not reach it."""
    inherited = {"ARGS", "ARMS", "JSON", "LEVEL", "MAKEFLAGS", "MAKELEVEL", "MFLAGS", "QUICK"}
    inherited |= {"SEED", "SMALL"}
    environment = {key: value for key, value in os.environ.items() if key not in inherited}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def lint_imports(cwd: Path) -> subprocess.CompletedProcess[str]:
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    return run(sys.executable, "-c", program, cwd=cwd)


def copy_package(target: Path) -> Path:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "megatron_sgopd", target / "megatron_sgopd", ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", target)
    return target


@pytest.fixture
def copy_of_package(tmp_path: Path) -> Path:
    return copy_package(tmp_path)


def plant(root: Path, module: str, line: str) -> None:
    path = root / "megatron_sgopd" / module
    path.write_text((path.read_text() if path.exists() else "") + f"\n{line}\n")


PLANTED = {  # what is planted: the contract that must name it, and how
    ("metrics.py", "import megatron_sgopd.evaluation.ask"): (
        LAYERS,
        "metrics -> megatron_sgopd.evaluation.ask",
    ),
    ("model/gpt.py", "import megatron_sgopd.training.packing"): (
        LAYERS,
        "model.gpt -> megatron_sgopd.training.packing",
    ),
    ("train.py", "import megatron_sgopd.demo"): (LAYERS, "train -> megatron_sgopd.demo"),
    ("utils.py", "import math"): (LAYERS, "utils"),
    ("training/objective.py", "import megatron.core"): (
        MATHEMATICS,
        "training.objective -> megatron",
    ),
    ("rollouts/sampler.py", "import vllm"): (ENGINE, "rollouts.sampler -> vllm"),
    ("cli/launch.py", "import nemo_run"): (LAUNCHER, "cli.launch -> nemo_run"),
    ("launch/nemo/experiments.py", "import torch"): (LIGHT, "launch.nemo.experiments -> torch"),
    ("config/schema.py", "import torch"): (LIGHT, "config.schema -> torch"),
    ("verifier/rules.py", "import torch"): (LIGHT, "verifier.rules -> torch"),
}


@pytest.fixture(scope="module")
def broken_contracts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Contract name -> import-linter's words on it, for a copy with everything above planted."""
    root = copy_package(tmp_path_factory.mktemp("planted"))
    for module, line in PLANTED:
        plant(root, module, line)
    result = lint_imports(root)
    assert result.returncode == 1, result.stdout + result.stderr
    _, details = result.stdout.split("Broken contracts", maxsplit=1)
    parts = re.split(r"^(.+)\n-{3,}$", details, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


# A docstring that begins like this cannot be read without the signature.
NO_VERB = re.compile(
    r"(Of|That|Where|Whether|What|Which|In|For|By|With|From|To|At|On|How|When|Who|As|If|Around|Until"
    r"|Without|Between|Inside|Those|Whose)\b"
)
NO_NAMES = {"told", "odd", "mine"}  # of variables: they say nothing of what they hold


def test_docstrings_begin_with_a_verb_and_names_say_what_they_hold():
    docstrings, names = [], []
    for path in sorted((ROOT / "megatron_sgopd").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                first = (ast.get_docstring(node) or "").partition("\n")[0]
                if NO_VERB.match(first):
                    docstrings.append(f"{path.name}: {first}")
            elif isinstance(node, ast.Name) and node.id in NO_NAMES:
                names.append(f"{path.name}:{node.lineno}: {node.id}")
    assert docstrings == []
    assert names == []


def test_layers_and_boundaries_hold():
    result = lint_imports(ROOT)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"Contracts: \d+ kept, 0 broken", result.stdout)


@pytest.mark.parametrize("planted", PLANTED, ids=lambda planted: " ".join(planted))
def test_planted_import_breaks_its_contract(
    broken_contracts: dict[str, str], planted: tuple[str, str]
):
    contract, evidence = PLANTED[planted]
    (words,) = (text for name, text in broken_contracts.items() if name.startswith(contract))
    assert re.search(rf"-\s+megatron_sgopd\.{re.escape(evidence)}\b", words), words


@pytest.mark.parametrize(
    ("module", "line", "codes"),
    [
        ("sgopd.py", "import megatron.core", {"TID251"}),
        ("rollouts/sampler.py", "from vllm import LLM", {"TID251"}),
        ("training/student.py", "import megatron.core.optimizer", set()),  # allowed there
        ("launch/submission.py", "import nemo_run", {"TID251"}),
        ("launch/nemo/recipes.py", "import nemo_run.cli", set()),  # allowed there
        ("types.py", "import torch", {"TID253"}),
        ("evaluation/accuracy.py", "from torch import Tensor", {"TID253"}),
        ("verifier/pool.py", "import torch.nn", {"TID253"}),
        ("demo/models.py", "import transformers", {"TID253"}),
        ("training/objective.py", "import torch.nn", set()),
        ("evaluation/accuracy.py", "def late():\n    import torch\n", set()),
        ("training/objective.py", "from . import sgopd", {"TID252"}),
    ],
)
def test_planted_import_meets_ruffs_bans(
    copy_of_package: Path, module: str, line: str, codes: set[str]
):
    plant(copy_of_package, module, line)
    path = f"megatron_sgopd/{module}"
    command = ("-m", "ruff", "check", "--no-cache", "--select", "TID", "--output-format", "concise")
    result = run(sys.executable, *command, path, cwd=copy_of_package)
    assert set(re.findall(r"TID\d+", result.stdout)) == codes, result.stdout + result.stderr


def test_files_stay_short():
    package = ROOT / "megatron_sgopd"
    lengths = {
        str(path.relative_to(ROOT)): path.read_text().count("\n")
        for path in project_files(".py")
        if path.is_relative_to(package)
    }
    assert len(lengths) > 20, "the package was not found"
    assert {name: n for name, n in lengths.items() if n > MAX_LINES} == {}, "split these files"


def test_no_file_names_a_machine_or_an_index():
    found = []
    for path in project_files():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue  # an image
        name = str(path.relative_to(ROOT))
        patterns = [MACHINE_PATH] if name in MAY_NAME_AN_INDEX else [MACHINE_PATH, INDEX_HOST]
        for number, line in enumerate(text.splitlines(), start=1):
            found += [f"{name}:{number}: {line}" for regex in patterns if regex.search(line)]
    assert found == []


@pytest.mark.parametrize(
    ("line", "is_caught"),
    [
        ("open('/home/" + "ada/data')", True),
        ("--find-links file:" + "///wheels", True),
        ("cd /work" + "/main", True),
        ("runs/home/x and recipes/work/y", False),
        ("$HOME/work/x", False),
        ("~/root/x", False),
    ],
)
def test_machine_path_pattern(line: str, is_caught: bool):
    assert bool(MACHINE_PATH.search(line)) == is_caught


def test_pyproject_declares_ranges_only():
    project = pyproject()["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    exact = [
        line
        for line in lines
        if Requirement(line).url
        or any(s.operator in ("==", "===") for s in Requirement(line).specifier)
    ]
    assert len(lines) > 20
    assert exact == []
    assert "apex" not in {Requirement(line).name for line in lines}, "not NVIDIA's apex on PyPI"


@pytest.mark.parametrize("lock", ["cpu", "launch", "bench"])
def test_lock_pins_and_hashes_every_package(lock: str):
    lines = requirement_lines(f"requirements/{lock}.lock")
    pattern = re.compile(r"[a-z0-9][a-z0-9._-]*==[^\s;]+( +--hash=sha256:[0-9a-f]{64})+")
    assert len(lines) > 50
    assert [line[:80] for line in lines if not pattern.fullmatch(line)] == []


def test_lock_lies_within_the_declared_ranges():
    locked = locked_versions()
    declared = declared_requirements()
    assert sorted(declared.keys() - locked.keys()) == [], "run make lock"
    outside = {
        name: str(locked[name])
        for name, requirement in declared.items()
        if not requirement.specifier.contains(locked[name], prereleases=True)
    }
    assert outside == {}, "run make lock"


@pytest.mark.parametrize("path", ["requirements/cpu.in", "requirements/vllm-constraints.txt"])
def test_lock_obeys_its_inputs(path: str):
    locked = locked_versions()
    requirements = [Requirement(line) for line in requirement_lines(path)]
    assert len(requirements) >= 4
    for requirement in requirements:
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}, locked: {version}"


def test_the_launchers_lock_obeys_its_input_and_reads_recipes_with_the_same_versions():
    launch, cpu = locked_versions("launch"), locked_versions()
    for requirement in map(Requirement, requirement_lines("requirements/launch.in")):
        assert requirement.specifier.contains(launch[canonicalize_name(requirement.name)])
    for name in ("omegaconf", "pyyaml", "setuptools"):
        assert launch[name] == cpu[name], "run make lock"
    assert "torch" not in launch, "the launcher has no need of it"


def test_the_benchs_lock_obeys_its_input_and_shares_the_trainers_versions():
    bench, cpu = locked_versions("bench"), locked_versions()
    for requirement in map(Requirement, requirement_lines("requirements/bench.in")):
        assert requirement.specifier.contains(bench[canonicalize_name(requirement.name)])
    other = {name for name in bench.keys() & cpu.keys() if bench[name] != cpu[name]}
    assert other <= {"setuptools"}, "run make lock"  # nvidia-modelopt asks for a newer one
    assert bench.keys() >= {"torch", "transformers", "megatron-core", "trl", "liger-kernel"}
    cuda = ("nvidia-cu", "nvidia-nccl", "nvidia-nv", "cuda-")
    assert [name for name in bench if name.startswith(cuda)] == []


def test_lock_holds_the_build_backend_and_no_cuda():
    locked = locked_versions()
    assert str(locked["torch"]).endswith("+cpu")
    assert [name for name in locked if name.startswith("nvidia-")] == []
    (backend,) = map(Requirement, pyproject()["build-system"]["requires"])
    assert backend.specifier.contains(locked[backend.name]), "installing would need isolation"


@pytest.mark.parametrize(
    ("variables", "options"),
    [
        ((), ""),
        (("QUICK=1",), "--quick"),
        (("QUICK=0",), ""),
        (("SEED=7", "LEVEL=hard"), "--seed 7 --level hard"),
        (
            ("SEED=7", "LEVEL=hard", "ARMS=all", "QUICK=1"),
            "--seed 7 --level hard --arms all --quick",
        ),
    ],
)
def test_make_demo_hands_its_variables_on(variables: tuple[str, ...], options: str):
    assert last_of_make("demo", *variables) == (
        f".venv/bin/python -m megatron_sgopd.demo {options}".strip()
    )


@pytest.mark.parametrize(
    ("variables", "options"),
    [((), ""), (("JSON=rows.json", "SMALL=1"), "--json rows.json --small"), (("SMALL=0",), "")],
)
def test_make_bench_hands_its_variables_on(variables: tuple[str, ...], options: str):
    assert last_of_make("bench", *variables) == (
        f".venv-bench/bin/python -m megatron_sgopd bench kl {options}".strip()
    )


def last_of_make(target: str, *variables: str) -> str:
    """The last command of a target, on one line; it is not run."""
    result = run("make", "--dry-run", target, *variables, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    joined = " ".join(result.stdout.replace("\\\n", " ").split())
    return joined[joined.rindex(".venv") :]
