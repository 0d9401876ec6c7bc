"""Renders problems by the student's chat template and tokenizes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_sgopd.config.schema import DataConfig
from megatron_sgopd.data.problems import Problem
from megatron_sgopd.types import Prompt

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
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
