"""Writes docs/recipe_fields.md, the reference of every recipe field, from the schema.

    python -m megatron_sgopd.config.reference > docs/recipe_fields.md

The text of a field is the string below it in its dataclass, read from the source file: the meaning,
then "Restriction: …" and "Source: …" where there are any. Types and defaults are the dataclass's,
ranges those of the tables in `checks`.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from megatron_sgopd.config.checks import ABOVE_ZERO, AT_LEAST_ONE, NOT_NEGATIVE
from megatron_sgopd.config.load import KEYS, MISSING, flatten
from megatron_sgopd.config.schema import Config

TEXT = re.compile(
    r"(?P<meaning>.+?)(?: Restriction: (?P<restriction>.+?\.))?(?: Source: (?P<source>\w+)\.)?"
)
SOURCES = ("pub", "secondary", "ours")
RANGES = {
    "at least 1": AT_LEAST_ONE,
    "at least 0": NOT_NEGATIVE,
    "above 0": ABOVE_ZERO,
}
HEAD = """\
# Recipe fields

Every field that a recipe may set. A recipe is one YAML file of these sections; on the command \
line a field is set as `key=value`, such as `optimizer.lr=1e-6`. This page is generated from the \
schema: change a text in `megatron_sgopd/config/schema.py` or `schema_rollouts.py`, then write \
the page anew with `python -m megatron_sgopd.config.reference > docs/recipe_fields.md`.

- **Default.** *required* means that every recipe must set the field. What `null` means stands in \
the meaning.
- **Source** says where the default of a field of the method comes from: **pub** is published or \
in official code, **secondary** is one account of somebody who read the paper's body, **ours** is \
our choice. The column is empty for every other field. `docs/method.md` has the evidence.
- **Restriction** says which values are allowed; all others are refused with an error message. A \
range holds for values other than null. Every number must be finite.
"""
TABLE_HEAD = (
    "| field | type or allowed values | default | source | meaning |\n|---|---|---|---|---|\n"
)


@dataclass(frozen=True)
class Text:
    """Describes what the schema says of one field or section."""

    meaning: str
    restriction: str = ""
    source: str = ""


def main() -> None:
    """Prints the reference."""
    sys.stdout.write(markdown())


def markdown() -> str:
    """Writes the whole reference as one Markdown text."""
    defaults = flatten(Config())
    parts = [HEAD]
    for section, text in sections():
        parts.append(f"\n## {section or 'Top level'}\n{text.meaning}\n\n{TABLE_HEAD}")
        keys = [key for key in KEYS if key.rpartition(".")[0] == section]
        parts += [_row(key, defaults[key]) for key in keys]
    return "".join(parts)


def sections() -> Iterator[tuple[str, Text]]:
    """Lists (dotted name, text) of every section that has fields of its own, in schema order."""
    yield "", Text("The run as a whole.")
    yield from _sections(Config, "")


def _sections(cls: type, prefix: str) -> Iterator[tuple[str, Text]]:
    hints, texts = get_type_hints(cls), field_texts(cls)
    for field in fields(cls):
        hint = hints[field.name]
        if isinstance(hint, type) and is_dataclass(hint):
            yield f"{prefix}{field.name}", texts[field.name]
            yield from _sections(hint, f"{prefix}{field.name}.")


@cache
def texts() -> dict[str, Text]:
    """Reads {dotted key: text} of every field that is no section.

    Raises:
        ValueError: a field without a text, or with one that is not of the form.
    """
    return {key: _owner_texts(key)[key.rpartition(".")[2]] for key in KEYS}


def _owner_texts(key: str) -> dict[str, Text]:
    owner: Any = Config
    for name in key.split(".")[:-1]:
        owner = get_type_hints(owner)[name]
    return field_texts(owner)


@cache
def field_texts(cls: type) -> dict[str, Text]:
    """Reads {field name: text} of a dataclass from the strings below its fields.

    Raises:
        ValueError: a field without a text, or with one that is not of the form.
    """
    file = Path(str(sys.modules[cls.__module__].__file__))
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (body,) = (n.body for n in tree.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
    strings: dict[str, str | None] = {}
    for statement, below in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            strings[statement.target.id] = _string(below)
    return {field.name: _parse(cls, field.name, strings.get(field.name)) for field in fields(cls)}


def _string(statement: ast.stmt) -> str | None:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return str(value.value) if isinstance(value, ast.Constant) else None


def _parse(cls: type, name: str, string: str | None) -> Text:
    if string is None:
        raise ValueError(f"{cls.__name__}.{name} has no text: write its meaning in a string below")
    match = TEXT.fullmatch(" ".join(string.split()))
    if match is None or match["source"] not in (None, *SOURCES):
        raise ValueError(
            f"the text of {cls.__name__}.{name} is not of the form 'Meaning. Restriction: …. "
            f"Source: {'|'.join(SOURCES)}.': {string!r}"
        )
    restriction = (match["restriction"] or "").removesuffix(".")
    return Text(match["meaning"], restriction, match["source"] or "")


def restriction_of(key: str) -> str:
    """Names what is refused of a field: its range, then what its text says; "" for nothing."""
    ranges = [words for words, keys in RANGES.items() if key in keys]
    return "; ".join(filter(None, [*ranges, texts()[key].restriction]))


def _row(key: str, default: Any) -> str:
    text, restriction = texts()[key], restriction_of(key)
    meaning = text.meaning + (f" **Restriction:** {restriction}." if restriction else "")
    cells = [f"`{key}`", _type(KEYS[key]), _default(default), text.source, meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _type(hint: Any) -> str:
    """Names a type in words, a Literal by its values."""
    inner = get_args(hint)
    if get_origin(hint) is Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if NoneType in inner:
        return " or ".join([*(_type(each) for each in inner if each is not NoneType), "null"])
    if float in inner:  # float | str
        return " or ".join(_type(each) for each in inner)
    return {bool: "true or false"}.get(hint) or (hint.__name__ if not inner else str(hint))


def _default(value: Any) -> str:
    return "*required*" if value == MISSING else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    main()
