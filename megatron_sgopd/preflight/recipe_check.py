"""Checks a recipe before a model is loaded, for `sgopd doctor` and `sgopd train`.

Findings come out, also of what cannot be read at all: nothing is raised.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sgopd.config.checks import needs_reference, needs_teacher
from megatron_sgopd.config.schema import (
    Config,
    DataConfig,
    DistillConfig,
    EvaluationConfig,
    ModelConfig,
    RolloutConfig,
)
from megatron_sgopd.data.problems import Problem, load_problems
from megatron_sgopd.data.rendering import load_tokenizer, render
from megatron_sgopd.distributed.groups import from_first_rank
from megatron_sgopd.model.hf_location import resolve_hf_dir, weight_files
from megatron_sgopd.preflight.model_agreement import (
    Described,
    Finding,
    model_findings,
    pair_findings,
    prompt_findings,
)
from megatron_sgopd.verifier.worker import load_verifier
from megatron_sgopd.versions import TESTED, describe, installed, is_tested

FIRST = 64  # prompts that are rendered


def check_recipe(config: Config) -> list[Finding]:
    """Everything: versions, models, data, verifier."""
    return [
        _versions(config.rollout),
        *check_models(config),
        *(
            finding
            for role, path in _paths(config.model, config.distill).items()
            for finding in _caught(role, _weights, role, path, config.model.student.random_init)
        ),
        *_caught(
            "data",
            _prompts,
            config.data,
            config.model.student.hf_path,
            config.rollout.max_prompt_tokens,
            config.distill.method == "sft",
        ),
        *_caught("data", _evaluation, config.evaluation, config.data),
        *_caught("verifier", _verifier, config.verifier.name),
    ]


def check_models(config: Config) -> list[Finding]:
    """Checks that the models that the recipe needs agree with it and with each other."""
    return list(_caught("models", _models, config))


def require_agreement(config: Config, run_dir: Path) -> None:
    """`check_models` at the start of a run: rank 0 looks, prints warnings and keeps all findings
    in RUN_DIR/preflight.jsonl. Collective over all ranks.

    Raises:
        ValueError: on every rank alike, with all errors.
    """
    errors: list[str] = []
    if dist.get_rank() == 0:
        findings = check_models(config)
        rows = (json.dumps(vars(finding), ensure_ascii=False) + "\n" for finding in findings)
        (run_dir / "preflight.jsonl").write_text("".join(rows), encoding="utf-8")
        for finding in findings:
            if finding.level == "warning":
                print(f"{config.name}: warning, {finding.about}: {finding}", flush=True)
        errors = [str(finding) for finding in findings if finding.level == "error"]
    if errors := from_first_rank(errors):
        raise ValueError("\n".join(errors))


def _caught(
    about: str, check: Callable[..., Iterator[Finding]], *arguments: Any
) -> Iterator[Finding]:
    """Yields what a check finds; what keeps it from going on is an error."""
    try:
        yield from check(*arguments)
    except ValueError as error:
        yield Finding("error", about, str(error))


def _versions(rollout: RolloutConfig) -> Finding:
    needed = [p for p in TESTED if p != "vllm" or _starts_vllm(rollout)]
    versions = {package: installed(package) for package in needed}
    if missing := [package for package, version in versions.items() if version is None]:
        return Finding("error", "versions", describe(), fix=f"install {', '.join(missing)}")
    if all(version and is_tested(package, version) for package, version in versions.items()):
        return Finding("ok", "versions", describe())
    return Finding("warning", "versions", describe(), fix="sgopd doctor --parallel tries them")


def _starts_vllm(rollout: RolloutConfig) -> bool:
    """Tells whether servers start in this environment; others are asked for their version."""
    vllm = rollout.vllm
    return rollout.engine == "vllm" and not vllm.urls and vllm.python is None


# -- models ----------------------------------------------------------------------------------------


def _paths(model: ModelConfig, distill: DistillConfig) -> dict[str, str]:
    """Returns, by role, the directory or hub name of the models that the method needs."""
    paths = {"student": model.student.hf_path}
    if needs_teacher(distill):
        paths["teacher"] = model.teacher.hf_path or ""
    if needs_reference(distill) and model.reference.hf_path is not None:
        paths["reference"] = model.reference.hf_path
    return paths


def _models(config: Config) -> Iterator[Finding]:
    paths = _paths(config.model, config.distill)
    student = Described.read("student", resolve_hf_dir(paths.pop("student"), weights=False))
    yield from model_findings(student, config.rollout, config.model.dtype)
    yield from prompt_findings(student, config.data)
    for role, path in paths.items():
        other = Described.read(role, resolve_hf_dir(path, weights=False))
        yield from model_findings(other, config.rollout, config.model.dtype)
        yield from pair_findings(student, other, config)


def _weights(role: str, path: str, random_init: bool) -> Iterator[Finding]:
    if role == "student" and random_init:
        yield Finding("ok", role, f"{path}, weights drawn at random")
    elif Path(path).is_dir():
        count = len(weight_files(Path(path)))
        yield Finding("ok", role, f"{path}, {count} file(s) of weights")


# -- data ------------------------------------------------------------------------------------------


def _problems(data: DataConfig, path: str, *, train: bool, solutions: bool) -> list[Problem]:
    return load_problems(
        path,
        problem_field=data.problem_field,
        answer_field=data.answer_field,
        solution_field=data.solution_field if solutions else None,
        min_difficulty=data.min_difficulty if train else None,
    )


def _prompts(data: DataConfig, student: str, limit: int, solutions: bool) -> Iterator[Finding]:
    problems = _problems(data, data.train, train=True, solutions=solutions)
    first = problems[:FIRST]
    tokenizer = load_tokenizer(resolve_hf_dir(student, weights=False))
    prompts = render(first, tokenizer, data, limit)
    longest = max(len(prompt.token_ids) for prompt in prompts)
    what = f"{data.train}, {len(problems)} problems; of the first {len(first)} "
    if dropped := len(first) - len(prompts):
        yield Finding(
            "warning",
            "data",
            f"{what}{dropped} are longer than rollout.max_prompt_tokens {limit}",
            "they are left out",
            "raise it, or leave it if that is meant",
        )
    else:
        yield Finding("ok", "data", f"{what}the longest has {longest} tokens of {limit}")
    text = tokenizer.decode(list(prompts[0].token_ids))
    yield Finding("ok", "first prompt", repr(text if len(text) <= 300 else f"{text[:300]}…"))


def _evaluation(evaluation: EvaluationConfig, data: DataConfig) -> Iterator[Finding]:
    for path in dict.fromkeys((evaluation.data, evaluation.during_data)):
        if path is not None:
            count = len(_problems(data, path, train=False, solutions=False))
            yield Finding("ok", "data", f"{path}, {count} problems to evaluate")


def _verifier(name: str) -> Iterator[Finding]:
    if name != "math_verify":
        load_verifier(name)
    elif importlib.util.find_spec(name) is None:
        raise ValueError("math-verify is not installed: pip install math-verify")
    yield Finding("ok", "verifier", name)
