"""Data set -> prompts: read, rendered by the chat template, and dealt out step by step.

`PromptStream` has no state: the prompts of a step are a function of (seed, step), so that a resumed
run goes on with the prompts it would have had.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from megatron_sgopd.config.schema import DataConfig
from megatron_sgopd.data.rows import (
    Row,
    good_rows,
    hub_files,
    id_field,
    is_hub_name,
    number_field,
    read_rows,
    text_field,
)
from megatron_sgopd.types import Prompt

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Problem:
    """One row of a data set."""

    id: str
    problem: str
    answer: str
    solution: str | None = None


def load_problems(
    path: str,
    *,
    problem_field: str,
    answer_field: str,
    solution_field: str | None,
    min_difficulty: float | None,
    section: str = "data",
) -> list[Problem]:
    """Problems of a JSONL or Parquet file, or of a hub data set's train split.

    `section`: of the recipe, where the fields' names stand.

    Raises:
        ValueError: what is wrong, with file, line and field.
    """
    problems: list[Problem] = []
    ids: dict[str, str] = {}
    required = (problem_field, answer_field, *([solution_field] if solution_field else []))
    for where, row in _rows(path, required, ("id", "difficulty")):
        if min_difficulty is not None:
            hint = "; leave out data.min_difficulty if the set has none"
            difficulty = number_field(row, "difficulty", where, hint)
            if difficulty is None:
                raise ValueError(
                    f"{where}: field 'difficulty' is missing or null, a number is wanted{hint}"
                )
            if difficulty < min_difficulty:
                continue
        problem = Problem(
            id=id_field(row, "id", where) or where,
            problem=text_field(row, problem_field, where, f"{section}.problem_field"),
            answer=text_field(row, answer_field, where, f"{section}.answer_field"),
            solution=text_field(row, solution_field, where, "data.solution_field")
            if solution_field
            else None,
        )
        if problem.id in ids:
            raise ValueError(f"{where}: id {problem.id!r} is also that of {ids[problem.id]}")
        ids[problem.id] = where
        problems.append(problem)
    if not problems:
        raise ValueError(
            f"{path} holds no problems"
            + ("" if min_difficulty is None else f" of difficulty {min_difficulty} or more")
        )
    return problems


def _rows(
    path: str, required: tuple[str, ...], optional: tuple[str, ...]
) -> Iterator[tuple[str, Row]]:
    """(where it stands, row) of every row."""
    if is_hub_name(path):
        files = hub_files(path, "train")
    elif Path(path).is_file():
        files = [(Path(path).name, Path(path))]
    else:
        raise ValueError(
            f"{path} {'is no file' if Path(path).exists() else 'does not exist'}: give a .jsonl or "
            ".parquet file, or a hub data set OWNER/NAME"
        )
    for label, file in files:
        yield from good_rows(read_rows(file, label, required, optional))


# -- rendering -------------------------------------------------------------------------------------

PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"  # `plain`


def load_tokenizer(path: Path) -> Any:
    """The tokenizer of a Hugging Face directory."""
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        names = ", ".join(TOKENIZER_FILES)  # without them transformers makes an empty one
        raise ValueError(f"{path} holds no usable tokenizer: it has none of {names}")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} holds no usable tokenizer: {error}") from error


def render(
    problems: Sequence[Problem], tokenizer: Any, config: DataConfig, max_prompt_tokens: int
) -> list[Prompt]:
    """Prompts through the chat template; those over `max_prompt_tokens` are left out.

    Raises:
        ValueError: no template or one that fails, template arguments that are not the recipe's to
            set, no EOS token to end a solution with, or every prompt is too long.
    """
    from jinja2 import TemplateError  # here, so that reading problems does not load it

    kwargs = config.chat_template_kwargs
    fixed = sorted({"add_generation_prompt", "chat_template", "tokenize"} & set(kwargs))
    if fixed:
        raise ValueError(
            f"data.chat_template_kwargs sets {fixed[0]}, which is fixed: leave it out (the "
            "arguments are for the template itself, as enable_thinking is)"
        )
    template = _template(tokenizer, config)
    prompts = []
    longest = 0
    for problem in problems:
        messages = [{"role": "user", "content": problem.problem + config.prompt_suffix}]
        if config.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": config.system_prompt})
        try:
            text = tokenizer.apply_chat_template(
                messages,
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                **kwargs,
            )
        except TemplateError as error:
            whose = "data.chat_template" if template else "the tokenizer's own"
            raise ValueError(
                f"the chat template ({whose}) cannot be rendered for {problem.id!r}: {error}"
            ) from error
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        longest = max(longest, len(ids))
        if len(ids) > max_prompt_tokens:
            continue
        solution = None
        if problem.solution is not None:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    "the tokenizer has no end-of-sequence token to end the solutions with: set "
                    "eos_token in its tokenizer_config.json"
                )
            answer = tokenizer(problem.solution, add_special_tokens=False)["input_ids"]
            solution = (*answer, tokenizer.eos_token_id)
        prompts.append(Prompt(problem.id, tuple(ids), problem.answer, solution, problem.problem))
    if not prompts:
        raise ValueError(
            f"every prompt is longer than rollout.max_prompt_tokens {max_prompt_tokens} (the "
            f"longest has {longest} tokens): raise it"
        )
    return prompts


def _template(tokenizer: Any, config: DataConfig) -> str | None:
    if config.chat_template is not None:
        return PLAIN if config.chat_template == "plain" else config.chat_template
    if tokenizer.chat_template is None:
        raise ValueError(
            "the tokenizer has no chat template: set data.chat_template=plain (the problem as it "
            "is, for base models), or to a Jinja template"
        )
    return None


def stop_token_ids(tokenizer: Any, path: Path) -> tuple[int, ...]:
    """The ids that end an answer, sorted: the EOS ids of the tokenizer and of a Hugging Face
    directory's generation_config.json and config.json together.

    Raises:
        ValueError: there is none, or one of the files cannot be read.
    """
    ids = set()
    if tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    for name in ("generation_config.json", "config.json"):
        file = path / name
        if file.is_file():
            try:
                eos = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
                ids |= {int(i) for i in (eos if isinstance(eos, list) else [eos]) if i is not None}
            except (ValueError, TypeError, AttributeError) as error:
                raise ValueError(f"{file}: eos_token_id cannot be read ({error})") from error
    if not ids:
        raise ValueError(
            f"{path} names no end-of-sequence token: set rollout.stop_token_ids in the recipe"
        )
    return tuple(sorted(ids))


# -- dealing out -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class PromptStream:
    """Endless: epoch after epoch, each a permutation of its own (or the given order)."""

    prompts: Sequence[Prompt]
    seed: int
    shuffle: bool
    num_prompts: int  # per step, over all replicas

    def take(self, step: int) -> list[Prompt]:
        """The prompts of a step (from 0); the same on every rank."""
        first = step * self.num_prompts
        return [self._at(i) for i in range(first, first + self.num_prompts)]

    def _at(self, index: int) -> Prompt:
        epoch, place = divmod(index, len(self.prompts))
        if not self.shuffle:
            return self.prompts[place]
        return self.prompts[_permutation(len(self.prompts), f"{self.seed}-{epoch}")[place]]


@lru_cache(maxsize=2)  # a step touches two epochs at most
def _permutation(size: int, seed: str) -> list[int]:
    order = list(range(size))
    random.Random(f"prompts-{seed}").shuffle(order)
    return order


def share(prompts: Sequence[Prompt], dp_rank: int, dp_size: int) -> list[Prompt]:
    """A replica's contiguous share.

    Raises:
        ValueError: the prompts cannot be shared out equally.
    """
    size, rest = divmod(len(prompts), dp_size)
    if rest:
        raise ValueError(
            f"rollout.num_prompts {len(prompts)} cannot be shared by {dp_size} replicas: use a "
            f"multiple of {dp_size}"
        )
    return list(prompts[dp_rank * size : (dp_rank + 1) * size])
