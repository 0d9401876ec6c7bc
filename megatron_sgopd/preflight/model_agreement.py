"""Do a recipe's models agree? What Hugging Face directories say, compared; findings come out.

Teacher and reference score the student's tokens, in the student's prompts, up to the student's end
of an answer. Where they mean other things by a token id, by a prompt or by an end, nothing fails:
the numbers are wrong, or the run drifts. Each finding says what differs, with both values, why that
matters, and what to set.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megatron_sgopd.config.schema import Config, DataConfig, RolloutConfig
from megatron_sgopd.data.problems import Problem
from megatron_sgopd.data.rendering import load_tokenizer, render, stop_token_ids

SAMPLE = Problem("sample", "What is 1 + 1?", "2")
ANY_LENGTH = 2**31
TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized")  # that move boundaries
MANTISSA_BITS = {"float64": 52, "float32": 23, "float16": 10, "bfloat16": 7}


@dataclass(frozen=True)
class Finding:
    level: Literal["ok", "warning", "error"]
    about: str
    what: str
    why: str = ""
    fix: str = ""

    def __str__(self) -> str:
        return ". ".join(part for part in (self.what, self.why, self.fix) if part)


@dataclass(frozen=True)
class Described:
    """Describes what a directory says of a model beside its weights."""

    role: str
    path: Path
    config: Mapping[str, Any]
    tokenizer: Any
    stops: tuple[int, ...]  # of tokenizer, config.json and generation_config.json

    @classmethod
    def read(cls, role: str, path: Path) -> Described:
        """Raises ValueError: a file that is missing or cannot be read."""
        file = path / "config.json"
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
        try:
            tokenizer = load_tokenizer(path)
        except ValueError as error:
            if role == "student":
                raise
            raise ValueError(
                f"the {role}'s token ids cannot be compared with the student's: {error}. If it has "
                f"the student's tokenizer, copy the student's tokenizer files to {path}"
            ) from error
        try:
            stops = stop_token_ids(tokenizer, path)
        except ValueError:
            if role == "student":
                raise
            stops = ()
        return cls(role, path, config, tokenizer, stops)

    @property
    def rows(self) -> int:
        return int(self.config["vocab_size"])

    def token(self, token_id: int) -> str:
        return f"{token_id} ({self.tokenizer.convert_ids_to_tokens(token_id)!r})"

    def tokens(self, token_ids: Any) -> str:
        return ", ".join(self.token(i) for i in sorted(token_ids)) or "none"


def model_findings(model: Described, rollout: RolloutConfig, dtype: str) -> Iterator[Finding]:
    """Checks one model against the recipe."""
    yield from _ids(model)
    yield from _positions(model, rollout)
    yield from _dtype(model, dtype)


def prompt_findings(student: Described, data: DataConfig) -> Iterator[Finding]:
    """Checks the student's prompts, as the recipe renders them."""
    try:
        prompt = _render(student, data)
    except ValueError as error:
        yield Finding("error", "chat template", str(error))
        return
    reads = {
        name
        for name in {*data.chat_template_kwargs, "enable_thinking"}
        if _with(student, data, name, True) != _with(student, data, name, False)
    }
    for name in sorted(data.chat_template_kwargs.keys() - reads):
        yield Finding(
            "warning",
            "chat template",
            f"data.chat_template_kwargs sets {name}, which the student's template does not read",
            "prompts are the same with and without it",
            "leave it out, or set data.chat_template to a template that reads it",
        )
    if "enable_thinking" in reads - data.chat_template_kwargs.keys():
        yield Finding(
            "warning",
            "chat template",
            "the template reads enable_thinking, and data.chat_template_kwargs does not set it",
            "templates of the Qwen3 kind then think, and answers are several times longer",
            "set data.chat_template_kwargs.enable_thinking to false (or to true)",
        )
    yield from _begin(student, prompt)


def pair_findings(student: Described, other: Described, config: Config) -> Iterator[Finding]:
    """Checks teacher or reference against the student."""
    yield _padding(student, other)
    yield _tokenizers(student, other)
    yield from _ends(student, other, config.rollout.stop_token_ids, config.distill.method)
    try:
        prompt = _render(student, config.data)
    except ValueError:
        return  # `prompt_findings` tells
    yield _templates(student, other, prompt, config.data)
    yield from _begin(other, prompt)


# -- sizes -----------------------------------------------------------------------------------------


def _ids(model: Described) -> Iterator[Finding]:
    highest = max(model.tokenizer.get_vocab().values())
    if highest >= model.rows:
        yield Finding(
            "error",
            "vocabulary",
            f"the {model.role}'s tokenizer has ids up to {model.token(highest)}, its config.json "
            f"says vocab_size {model.rows}",
            "an id without an embedding cannot be trained on",
            f"use the tokenizer that belongs to {model.path}, or resize its embeddings",
        )


def _padding(student: Described, other: Described) -> Finding:
    if student.rows == other.rows:
        return Finding(
            "ok", "vocabulary", f"{student.rows} rows, the {other.role}'s and the student's"
        )
    shared = min(student.rows, other.rows)
    return Finding(
        "ok",
        "vocabulary",
        f"the {other.role} has {other.rows} rows and the student {student.rows}: the softmax, and "
        f"what is sampled, end with the {shared} that both have",
    )


def _positions(model: Described, rollout: RolloutConfig) -> Iterator[Finding]:
    room = model.config.get("max_position_embeddings")
    needed = rollout.max_prompt_tokens + rollout.max_new_tokens
    if room is None or needed <= room:
        return
    is_sampled = model.role == "student"
    yield Finding(
        "error" if is_sampled else "warning",
        "length",
        f"rollout.max_prompt_tokens {rollout.max_prompt_tokens} and max_new_tokens "
        f"{rollout.max_new_tokens} exceed the model's {room} positions (max_position_embeddings of "
        f"the {model.role})",
        "no engine samples beyond them"
        if is_sampled
        else f"tokens beyond them are scored by a {model.role} that has never seen such places",
        f"lower rollout.max_new_tokens to {max(0, room - rollout.max_prompt_tokens)} or less",
    )


def _dtype(model: Described, wanted: str) -> Iterator[Finding]:
    stored = model.config.get("dtype") or model.config.get("torch_dtype")
    if MANTISSA_BITS.get(str(stored), 0) > MANTISSA_BITS[wanted]:
        yield Finding(
            "warning",
            "dtype",
            f"the {model.role}'s weights are {stored}, model.dtype is {wanted}",
            "they are rounded when they are loaded",
            "set model.dtype=float32, or leave it if that is meant",
        )


# -- tokenizers ------------------------------------------------------------------------------------


def tokenizer_parts(tokenizer: Any) -> dict[str, Any]:
    """Returns what decides which ids a text becomes; truncation, padding and decoding do not."""
    parts: dict[str, Any] = {"vocabulary": tokenizer.get_vocab()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return parts
    whole = json.loads(backend.to_str())
    model = whole["model"]
    vocabulary = model.pop("vocab")
    parts["scores"] = vocabulary if isinstance(vocabulary, list) else None  # of Unigram
    parts["merges"] = model.pop("merges", None)
    parts["model"] = model
    parts["added tokens"] = {
        token["content"]: [token[flag] for flag in TOKEN_FLAGS] for token in whole["added_tokens"]
    }
    return parts | {name: whole[name] for name in ("normalizer", "pre_tokenizer")}


def fingerprint(parts: Mapping[str, Any]) -> str:
    """Twelve hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _tokenizers(student: Described, other: Described) -> Finding:
    student_parts = tokenizer_parts(student.tokenizer)
    other_parts = tokenizer_parts(other.tokenizer)
    different = [name for name in student_parts if student_parts[name] != other_parts.get(name)]
    if not different:
        return Finding(
            "ok", "tokenizer", f"the {other.role}'s is the student's ({fingerprint(student_parts)})"
        )
    extra = _extra_tokens(student_parts, other_parts, different)
    if extra:
        count, some = len(extra), ", ".join(f"{t!r}" for t in sorted(extra)[:4])
        return Finding(
            "warning",
            "tokenizer",
            f"{count} added token(s) are the student's or the {other.role}'s alone ({some}); all "
            "others have the same ids",
            "one model was never trained on their rows, and the other's log-probs count there",
            "keep them out of prompts and answers (thinking and tools off)",
        )
    shown = "; ".join(
        _difference(name, student_parts[name], other_parts.get(name)) for name in different[:3]
    )
    return Finding(
        "error",
        "tokenizer",
        f"student {fingerprint(student_parts)} and {other.role} {fingerprint(other_parts)} have "
        f"different tokenizers: {shown}",
        "a token id means another text to each, so that log-probs cannot be compared",
        f"set model.{other.role}.hf_path to a model with the student's tokenizer",
    )


def _extra_tokens(
    student: Mapping[str, Any], other: Mapping[str, Any], different: list[str]
) -> set[str]:
    """Added tokens that one side alone has, where that is all the difference; else none."""
    if not set(different) <= {"vocabulary", "added tokens"} or "added tokens" not in student:
        return set()
    for name in different:
        shared = student[name].keys() & other[name].keys()
        if any(student[name][token] != other[name][token] for token in shared):
            return set()
    if len(set(student["vocabulary"].values()) | set(other["vocabulary"].values())) < len(
        student["vocabulary"].keys() | other["vocabulary"].keys()
    ):
        return set()  # one id, two tokens
    extra = student["vocabulary"].keys() ^ other["vocabulary"].keys()
    added = student["added tokens"].keys() ^ other["added tokens"].keys()
    return set(extra) if extra == added else set()


def _difference(name: str, first: Any, second: Any) -> str:
    """An example of a part that differs: the student's first."""
    if isinstance(first, dict) and isinstance(second, dict):
        keys = [k for k in sorted(first.keys() | second.keys()) if first.get(k) != second.get(k)]
        key = keys[0]
        return (
            f"{name}, {key!r}: {first.get(key, 'missing')!r} against {second.get(key, 'missing')!r}"
        )
    if isinstance(first, list) and isinstance(second, list):
        at = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
        if at is None:
            return f"{name}: {len(first)} against {len(second)}"
        return f"{name}, number {at}: {first[at]!r} against {second[at]!r}"
    return f"{name}: {json.dumps(first)[:100]} against {json.dumps(second)[:100]}"


# -- ends ------------------------------------------------------------------------------------------


def _ends(
    student: Described, other: Described, chosen: list[int] | None, method: str
) -> Iterator[Finding]:
    """The student samples until the run's stop ids; the teacher was taught its own."""
    run, ends = set(chosen or student.stops), set(other.stops)
    if not ends or method == "sft":
        return
    end = other.tokenizer.eos_token_id
    end = end if end is not None else min(ends)
    what = (
        f"answers end with {student.tokens(run)}; the {other.role} ends its own with "
        f"{other.token(end)} (all its EOS ids: {other.tokens(ends)})"
    )
    if end not in run:
        yield Finding(
            "error" if other.role == "teacher" and not chosen else "warning",
            "end of answer",
            what,
            f"the {other.role} puts its mass on an end that does not stop the student: answers "
            "grow to the length limit and repeat (a base student with an instruct teacher)",
            f"set rollout.stop_token_ids={sorted(run | ends)}; a base student is better taught "
            "the format by method sft first",
        )
    elif (own := student.tokenizer.eos_token_id) in run - ends:
        yield Finding(
            "warning",
            "end of answer",
            what,
            f"the student's end {student.token(own)} is none to the {other.role}, which gives it "
            "little mass: the student unlearns to end with it",
            f"set rollout.stop_token_ids={sorted(ends)}, or use a {other.role} that ends alike",
        )
    elif unstopped := ends - run:
        yield Finding(
            "warning",
            "end of answer",
            what,
            f"{other.tokens(unstopped)} would end the {other.role}'s answer, not the student's",
            f"set rollout.stop_token_ids={sorted(run | ends)}",
        )
    else:
        yield Finding("ok", "end of answer", what)


# -- prompts ---------------------------------------------------------------------------------------


def _render(model: Described, data: DataConfig) -> str:
    """The sample problem by the recipe's template, or the model's own, as its ids decode."""
    (prompt,) = render([SAMPLE], model.tokenizer, data, ANY_LENGTH)
    return str(model.tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False))


def _with(model: Described, data: DataConfig, name: str, value: bool) -> str:
    kwargs = {**data.chat_template_kwargs, name: value}
    return _render(model, replace(data, chat_template_kwargs=kwargs))


def _templates(student: Described, other: Described, prompt: str, data: DataConfig) -> Finding:
    why = f"the {other.role} scores prompts that it was not trained on"
    fix = (
        f"set data.chat_template to the {other.role}'s template, or use a {other.role} trained on "
        "the run's"
    )
    if other.tokenizer.chat_template is None:
        what = f"the {other.role}'s tokenizer has none; the run's prompts look like {_tail(prompt)}"
        return Finding("warning", "chat template", what, why, f"use a {other.role} trained on such")
    try:
        other_prompt = _render(other, replace(data, chat_template=None))
    except ValueError as error:
        return Finding("warning", "chat template", str(error), why, fix)
    if other_prompt == prompt:
        return Finding("ok", "chat template", f"both give {_tail(prompt)}")
    at = next(
        (i for i, (a, b) in enumerate(zip(prompt, other_prompt, strict=False)) if a != b),
        min(len(prompt), len(other_prompt)),
    )
    return Finding(
        "warning",
        "chat template",
        f"the run's prompts and the {other.role}'s own differ from character {at} on: "
        f"{prompt[at : at + 60]!r} against {other_prompt[at : at + 60]!r}",
        why,
        fix,
    )


def _tail(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else "…" + prompt[-80:])


def _begin(model: Described, prompt: str) -> Iterator[Finding]:
    """Tells whether the model expects a BOS that the prompts lack."""
    bos = model.tokenizer.bos_token
    if bos is None or prompt.startswith(bos):
        return
    if model.tokenizer("1")["input_ids"][:1] == [model.tokenizer.bos_token_id]:
        yield Finding(
            "warning",
            "beginning",
            f"the {model.role}'s tokenizer begins every text with {bos!r}, the run's prompts begin "
            f"with {prompt[:30]!r}",
            "without it the first tokens attend to nothing that the model knows",
            "begin data.chat_template with {{ bos_token }}",
        )
