"""docs/recipe_fields.md: as the schema says, a meaning for every field, every check in it."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from megatron_sgopd.config import checks, engines, evaluation, layout, reference, schema
from megatron_sgopd.config.load import KEYS

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "recipe_fields.md"
SENTENCES = re.compile(r"[A-Z].*\.", re.DOTALL)


def test_the_document_is_what_the_schema_says() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == reference.markdown(), (
        "write it anew: python -m megatron_sgopd.config.reference > docs/recipe_fields.md"
    )


def test_every_field_is_in_the_document_once() -> None:
    rows = re.findall(r"^\| `([\w.]+)` \|", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE)
    assert rows == sorted(KEYS, key=rows.index)


def test_every_field_and_section_has_a_meaning_in_whole_sentences() -> None:
    assert len(KEYS) > 150, "the fields were found"
    meanings = {key: text.meaning for key, text in reference.texts().items()}
    meanings |= {name: text.meaning for name, text in reference.sections()}
    assert [key for key, text in meanings.items() if not SENTENCES.fullmatch(text)] == []


@pytest.mark.parametrize(
    ("string", "text"),
    [
        ("One. Two.", ("One. Two.", "", "")),
        ("One.\n    Source: pub.", ("One.", "", "pub")),
        (
            "One. Restriction: at least\n  2, or null. Source: ours.",
            ("One.", "at least 2, or null", "ours"),
        ),
    ],
)
def test_a_text_is_taken_apart(string: str, text: tuple[str, str, str]) -> None:
    assert reference._parse(schema.Config, "seed", string) == reference.Text(*text)


@pytest.mark.parametrize(
    ("string", "message"),
    [(None, "Config.seed has no text"), ("One. Source: hearsay.", "not of the form")],
)
def test_a_missing_or_malformed_text_is_refused(string: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reference._parse(schema.Config, "seed", string)


def refused_keys(module: ModuleType) -> Iterator[str]:
    """Yields every key with which an error message of a module of checks begins."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if not isinstance(node, ast.Yield):
            continue
        first = node.value.values[0] if isinstance(node.value, ast.JoinedStr) else node.value
        words = str(first.value).split() if isinstance(first, ast.Constant) else []
        if words and words[0] in KEYS:
            yield words[0]


def test_what_the_checks_refuse_is_a_restriction_in_the_document() -> None:
    keys = {key for module in (checks, engines, evaluation, layout) for key in refused_keys(module)}
    assert len(keys) > 25, "the messages were found"
    assert sorted(key for key in keys if not reference.texts()[key].restriction) == []
