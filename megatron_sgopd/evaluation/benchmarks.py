"""Benchmarks: problem files, read and rendered as prompts, with nothing left out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_sgopd.config.schema import Config, DataConfig, EvaluationConfig
from megatron_sgopd.data.problems import load_problems
from megatron_sgopd.data.rendering import render
from megatron_sgopd.types import Prompt


@dataclass(frozen=True)
class Benchmark:
    """One problem set under the name of its column in the table."""

    name: str
    file: str
    prompts: tuple[Prompt, ...]

    @property
    def problems(self) -> list[dict[str, str]]:
        """`id`, `problem` and `answer` of each, as they are kept on disk."""
        return [{"id": p.id, "problem": p.text, "answer": p.answer} for p in self.prompts]

    def identity(self) -> dict[str, str]:
        """Returns what two evaluations must share: `problems`, and with token ids `prompts`."""
        return {
            "problems": _digest(self.problems),
            "prompts": _digest([p.token_ids for p in self.prompts]),
        }


def load_benchmarks(
    sets: Mapping[str, str],
    data: DataConfig,
    fields: EvaluationConfig,
    tokenizer: Any,
    *,
    max_problems: int | None,
    max_prompt_tokens: int,
) -> list[Benchmark]:
    """Reads the first `max_problems` of each set and renders them like the training prompts.

    `fields` names the problem and answer fields where they differ from those of `data`.

    Raises:
        ValueError: a set that cannot be read or holds a prompt beyond rollout.max_prompt_tokens.
    """
    most = max_prompt_tokens
    loaded = []
    for name, path in sets.items():
        try:
            problems = load_problems(
                path,
                problem_field=fields.problem_field or data.problem_field,
                answer_field=fields.answer_field or data.answer_field,
                solution_field=None,
                min_difficulty=None,
                section="evaluation",
            )[:max_problems]
            prompts = render(problems, tokenizer, data, most)
        except ValueError as error:
            raise ValueError(f"benchmark {name}: {error}") from error
        if len(prompts) < len(problems):
            kept = {p.id for p in prompts}
            long = next(p for p in problems if p.id not in kept)
            raise ValueError(
                f"benchmark {name}: {len(problems) - len(prompts)} of {len(problems)} prompts are "
                f"longer than rollout.max_prompt_tokens {most}, the first of them {long.id!r}: "
                "raise it (a score that leaves problems out compares with nothing)"
            )
        loaded.append(Benchmark(name, path, tuple(prompts)))
    return loaded


def with_lengths(config: Config, benchmarks: list[Benchmark], positions: int | None) -> Config:
    """The config with servers no longer than the model (`positions`) allows.

    Raises:
        ValueError: a prompt and an answer's limit do not fit into the model's positions.
    """
    longest = max(len(p.token_ids) for b in benchmarks for p in b.prompts)
    limit = config.evaluation.max_new_tokens or config.rollout.max_new_tokens
    if positions is None:
        return config
    if longest + limit > positions:
        room = positions - longest
        advice = f"set evaluation.max_new_tokens to at most {room}" if room > 0 else "use another"
        raise ValueError(
            f"prompts of up to {longest} tokens and evaluation.max_new_tokens {limit} exceed the "
            f"model's {positions} positions (max_position_embeddings): {advice}"
        )
    vllm = config.rollout.vllm
    shortened = replace(vllm, max_model_len=min(vllm.max_model_len or positions, positions))
    return replace(config, rollout=replace(config.rollout, vllm=shortened))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
