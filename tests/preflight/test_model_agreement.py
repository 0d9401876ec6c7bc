"""Pairs of models that disagree in one thing: it is found, with both values and the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from megatron_sgopd.config.schema import Config
from megatron_sgopd.preflight.model_agreement import (
    Described,
    Finding,
    fingerprint,
    model_findings,
    pair_findings,
    prompt_findings,
    tokenizer_parts,
)
from tests.support.model_dirs import CHATML, TEXT_END, THINKING, tokenizer, write_dir

RECIPE = {"rollout.max_prompt_tokens": 128, "rollout.max_new_tokens": 384, "model.dtype": "float32"}
BYTES = 256 + 2  # tokens before ChatML's
END, TURN_END_ID = BYTES, BYTES + 2


def recipe(**settings: Any) -> Config:
    """Keys with __ for the dots."""
    config = Config(name="agreement")
    for key, value in {**RECIPE, **{k.replace("__", "."): v for k, v in settings.items()}}.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config


@pytest.fixture
def findings(tmp_path: Path) -> Callable[..., list[Finding]]:
    """Of a student and a teacher, each given by what is unusual about it."""

    def of(
        student: dict[str, Any] | None = None,
        teacher: dict[str, Any] | None = None,
        role: str = "teacher",
        **settings: Any,
    ) -> list[Finding]:
        config = recipe(**settings)
        ours = Described.read("student", write_dir(tmp_path / "student", **student or {}))
        theirs = Described.read(role, write_dir(tmp_path / role, **teacher or {}))
        return [
            *model_findings(ours, config.rollout, config.model.dtype),
            *prompt_findings(ours, config.data),
            *model_findings(theirs, config.rollout, config.model.dtype),
            *pair_findings(ours, theirs, config),
        ]

    return of


def wrong(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(f.level, f.about) for f in findings if f.level != "ok"]


def only(findings: list[Finding], level: str, about: str, *texts: str) -> None:
    """One thing is wrong, and the finding has these texts, why it matters and what to do."""
    assert wrong(findings) == [(level, about)]
    (finding,) = [f for f in findings if f.level == level]
    for text in texts:
        assert text in str(finding)
    assert finding.why and finding.fix


def test_a_pair_that_agrees(findings: Any) -> None:
    found = findings()
    assert wrong(found) == []
    assert {f.about for f in found} == {
        "vocabulary", "tokenizer", "end of answer", "chat template",
    }  # fmt: skip
    (prompt,) = [f.what for f in found if f.about == "chat template"]
    assert r"What is 1 + 1?<|im_end|>\n<|im_start|>assistant\n" in prompt


# -- sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), [(272, 320), (320, 272)])
def test_other_padding_is_told_and_no_fault(findings: Any, ours: int, theirs: int) -> None:
    found = findings({"vocab_size": ours}, {"vocab_size": theirs})
    assert wrong(found) == []
    (told,) = [f.what for f in found if f.about == "vocabulary"]
    assert f"teacher has {theirs} rows and the student {ours}" in told
    assert "the 272 that both have" in told


def test_ids_without_a_row(findings: Any) -> None:
    only(
        findings(None, {"vocab_size": 260}),
        "error",
        "vocabulary",
        f"teacher's tokenizer has ids up to {TURN_END_ID} ('<|im_end|>')",
        "vocab_size 260",
    )


def test_too_few_positions(findings: Any) -> None:
    only(
        findings({"max_position_embeddings": 511}),
        "error",
        "length",
        "max_prompt_tokens 128 and max_new_tokens 384 exceed the model's 511 positions",
        "rollout.max_new_tokens to 383",
    )


def test_a_teacher_of_few_positions_is_a_warning(findings: Any) -> None:
    only(findings(None, {"max_position_embeddings": 500}), "warning", "length", "of the teacher")


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_weights_that_would_be_rounded(findings: Any, name: str) -> None:
    half = {"dtype": "bfloat16"}
    other = {"dtype": None, name: "float32"}
    found = findings(half, other, model__dtype="bfloat16")
    only(found, "warning", "dtype", "teacher's weights are float32, model.dtype is bfloat16")


def test_weights_that_are_widened_are_not(findings: Any) -> None:
    assert wrong(findings({"dtype": "bfloat16"}, {"dtype": "float16"})) == []


# -- tokenizers ------------------------------------------------------------------------------------


def test_padding_and_truncation_are_no_difference(findings: Any) -> None:
    made = tokenizer()
    made.enable_padding(length=9, pad_id=END, pad_token=TEXT_END)
    made.enable_truncation(7)
    assert wrong(findings(None, {"made": made})) == []


OTHER = {
    "merges": ({"merges": [("a", "b"), ("b", "c")]}, "vocabulary, 'abc': 257 against 'missing'"),
    "order of merges": (
        {"merges": [("a", "b"), ("ab", "c"), ("x", "y")]},
        "vocabulary, '<|endoftext|>': 258 against 259",
    ),
    "normalizer": ({"lower": True}, 'normalizer: null against {"type": "Lowercase"}'),
}


@pytest.mark.parametrize("case", OTHER)
def test_another_tokenizer(findings: Any, case: str) -> None:
    options, example = OTHER[case]
    found = findings(None, {"made": tokenizer(**options)})
    assert ("error", "tokenizer") in wrong(found)
    (told,) = [str(f) for f in found if f.about == "tokenizer"]
    assert example in told
    assert fingerprint(tokenizer_parts(Wrapped(tokenizer()))) in told
    assert fingerprint(tokenizer_parts(Wrapped(tokenizer(**options)))) in told


class Wrapped:
    def __init__(self, backend: Any) -> None:
        self.backend_tokenizer, self.get_vocab = backend, backend.get_vocab


def test_merges_of_the_same_tokens_in_another_order(findings: Any) -> None:
    """Same vocabulary, other tokens for the same text."""
    first = [("a", "b"), ("b", "c")]
    made = json.loads(tokenizer(first).to_str())
    made["model"]["merges"].reverse()
    found = findings({"made": tokenizer(first)}, {"made": Tokenizer.from_str(json.dumps(made))})
    only(found, "error", "tokenizer", "merges, number 0: ['a', 'b'] against ['b', 'c']")


def test_added_tokens_of_one_side_are_a_warning(findings: Any) -> None:
    found = findings(None, {"made": tokenizer(added=("<think>", "</think>"))})
    only(found, "warning", "tokenizer", "2 added token(s)", "'</think>', '<think>'", "thinking")


def test_an_added_token_in_the_place_of_another_is_an_error(findings: Any) -> None:
    found = findings(
        {"made": tokenizer(added=("<tool>",))}, {"made": tokenizer(added=("<think>",))}
    )
    only(found, "error", "tokenizer", "'<think>': 'missing' against 261")


def test_a_teacher_without_a_tokenizer(tmp_path: Path) -> None:
    path = write_dir(tmp_path / "teacher")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    with pytest.raises(ValueError, match=r"teacher's token ids cannot be compared.*copy the"):
        Described.read("teacher", path)


# -- ends ------------------------------------------------------------------------------------------

BASE = {"eos": TEXT_END, "also_ends": ()}


def test_a_base_student_with_an_instruct_teacher(findings: Any) -> None:
    only(
        findings(BASE),
        "error",
        "end of answer",
        f"answers end with {END} ('<|endoftext|>')",
        f"teacher ends its own with {TURN_END_ID} ('<|im_end|>')",
        "grow to the length limit",
        f"set rollout.stop_token_ids=[{END}, {TURN_END_ID}]",
    )


def test_what_that_finding_says_to_set_mends_it(findings: Any) -> None:
    assert wrong(findings(BASE, rollout__stop_token_ids=[END, TURN_END_ID])) == []


def test_stop_ids_that_were_chosen_are_not_refused(findings: Any) -> None:
    found = findings(rollout__stop_token_ids=[END])
    only(found, "warning", "end of answer", f"answers end with {END}")


def test_an_instruct_student_with_a_base_teacher(findings: Any) -> None:
    found = findings(None, BASE)
    only(
        found,
        "warning",
        "end of answer",
        f"student's end {TURN_END_ID} ('<|im_end|>') is none to the teacher",
        f"stop_token_ids=[{END}]",
    )


def test_a_second_end_of_the_teacher_alone(findings: Any) -> None:
    found = findings({"also_ends": ()})
    only(found, "warning", "end of answer", f"{END} ('<|endoftext|>') would end the teacher's")


def test_ends_do_not_stop_a_run_for_its_reference(findings: Any) -> None:
    assert wrong(findings(BASE, role="reference")) == [("warning", "end of answer")]


# -- prompts ---------------------------------------------------------------------------------------


def test_no_template_at_all(findings: Any) -> None:
    found = findings({"template": None})
    assert wrong(found) == [("error", "chat template")]
    assert "set data.chat_template" in str(found[0])


def test_a_template_of_the_recipe_stands_in(findings: Any) -> None:
    assert wrong(findings({"template": None}, data__chat_template=CHATML)) == []


def test_templates_that_render_alike_are_no_difference(findings: Any) -> None:
    other = CHATML.replace("{% for", "{# the same #}{% for")
    assert wrong(findings(None, {"template": other})) == []


def test_templates_that_render_differently(findings: Any) -> None:
    other = CHATML.replace("assistant\\n", "bot\\n").replace("assistant\n", "bot\n")
    found = findings(None, {"template": other})
    only(found, "warning", "chat template", r"'assistant\n' against 'bot\n'", "data.chat_template")


def test_a_teacher_without_template(findings: Any) -> None:
    only(findings(None, {"template": None}), "warning", "chat template", "tokenizer has none")


def test_thinking_that_the_recipe_does_not_set(findings: Any) -> None:
    thinks = {"template": THINKING}
    only(findings(thinks, thinks), "warning", "chat template", "kwargs does not set it")


def test_thinking_set_off_for_both(findings: Any) -> None:
    thinks = {"template": THINKING}
    off = {"enable_thinking": False}
    found = findings(thinks, thinks, data__chat_template_kwargs=off)
    assert wrong(found) == []
    assert any("<think></think>" in f.what for f in found)


def test_thinking_that_the_template_does_not_read(findings: Any) -> None:
    found = findings(data__chat_template_kwargs={"enable_thinking": False})
    only(found, "warning", "chat template", "sets enable_thinking, which", "does not read")


def test_a_teacher_that_expects_a_beginning(findings: Any) -> None:
    found = findings(None, {"begins_with": TEXT_END})
    only(found, "warning", "beginning", "begins every text with '<|endoftext|>'", "bos_token")


def test_a_beginning_that_the_template_gives(findings: Any) -> None:
    """Both begin with it: the student by the template, the teacher by itself too."""
    begins = {"begins_with": TEXT_END, "template": "{{ bos_token }}" + CHATML}
    assert wrong(findings(begins, begins)) == []
