"""The structure of answers: sets, tuples, intervals, lists, unions, matrices, assignments."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_sgopd.verifier.scalars import Leaf, scalars_equal
from megatron_sgopd.verifier.text import compact, is_one_group, split_top

_MAX_DEPTH = 8  # of structures inside structures
_MAX_ITEMS = 200  # of a set: matching is quadratic

_MATRIX = re.compile(
    r"\\begin\{((?:[pbB]|small)?matrix)\}(?P<body>.*)\\end\{\1\}\Z"
    r"|[\[(]?\\begin\{array\}(?:\{[lcr| ]*\})?(?P<array>.*)\\end\{array\}[\])]?\Z",
    re.DOTALL,
)
_ASSIGNMENT = re.compile(
    r"(?P<name>\\?[A-Za-z]{1,10}'?(?:_\{\w{1,9}\})?(?:\([a-z](?:,[a-z])?\))?|\\text\{[^{}]*\})"
    r"\s?(?:=|\\in(?![a-zA-Z]))\s?(?P<value>[^=]+)\Z"
)
_TEXT = re.compile(r"\\text\{([^{}]*)\}")
_RELATION = re.compile(r"[=<>]|\\(?:le|ge|ne)(?![a-zA-Z])")


@dataclass(frozen=True)
class _Group:
    r"""Items between brackets: "\{\}" a set, "" a bare list, "()" "[)" and so on the rest."""

    brackets: str
    items: list[str]

    @property
    def is_set(self) -> bool:
        return self.brackets == "\\{\\}"


def structures_equal(given: str, wanted: str, leaf: Leaf, depth: int = 0) -> bool:
    """Compare two cleaned answers by the package's rules; scalars that need it go to `leaf`."""
    if compact(given) == compact(wanted):
        return True
    if depth > _MAX_DEPTH:
        return leaf(compact(given), compact(wanted))
    stripped = _strip_assignments(given, wanted)
    if stripped is not None:
        return structures_equal(*stripped, leaf, depth + 1)
    given, wanted = _expand_plus_minus(given), _expand_plus_minus(wanted)
    unions = _union(given, "\\cup" in wanted), _union(wanted, "\\cup" in given)
    if len(unions[0]) > 1 and len(unions[1]) > 1:
        return _same_items(*unions, leaf, depth)
    first, second = _group(given), _group(wanted)
    if first is not None and second is not None:
        return _groups_equal(first, second, leaf, depth)
    if first is not None or second is not None:
        # {5} and 5; otherwise only a relation (1 < x < 2) or a union can equal a group.
        if first is not None and first.is_set and len(first.items) == 1:
            return structures_equal(first.items[0], wanted, leaf, depth + 1)
        if second is not None and second.is_set and len(second.items) == 1:
            return structures_equal(given, second.items[0], leaf, depth + 1)
        both = given + wanted
        return bool(_RELATION.search(both) or "\\c" in both) and leaf(
            compact(given), compact(wanted)
        )
    given_rows, wanted_rows = _matrix(given), _matrix(wanted)
    if given_rows is not None and wanted_rows is not None:
        return [len(row) for row in given_rows] == [len(row) for row in wanted_rows] and all(
            structures_equal(a, b, leaf, depth + 1)
            for rows in zip(given_rows, wanted_rows, strict=True)
            for a, b in zip(*rows, strict=True)
        )
    return scalars_equal(given, wanted, leaf)


def _strip_assignments(given: str, wanted: str) -> tuple[str, str] | None:
    """The pair without its `x =`: where both assign to one name, or one assigns and one is bare."""
    first, second = _ASSIGNMENT.match(given), _ASSIGNMENT.match(wanted)
    if first and second:
        same = compact(first["name"]) == compact(second["name"])
        return (first["value"], second["value"]) if same else None
    if first and not _RELATION.search(wanted):
        return first["value"], wanted
    if second and not _RELATION.search(given):
        return given, second["value"]
    return None


def _expand_plus_minus(text: str) -> str:
    parts = split_top(text, "\\pm")
    if len(parts) != 2 or not parts[1] or "\\mp" in text or len(split_top(text, ",;")) > 1:
        return text
    left, right = parts
    return f"{left}+{right},{left}-{right}" if left else f"{right},-{right}"


def _union(text: str, other_is_union: bool) -> list[str]:
    """The parts of a union; against one, `x < 1 or x > 2` (by now a list) is one too."""
    parts = split_top(text, "\\cup")
    if len(parts) == 1 and other_is_union and _RELATION.search(text):
        return split_top(text, ",")
    return parts


def _group(text: str) -> _Group | None:
    """The set, tuple, interval or bare list that `text` is; None for a scalar."""
    text = text.strip()
    worded = _TEXT.fullmatch(text)
    listed = split_top(worded[1] if worded else text, ",;")
    if len(listed) > 1:
        return _Group("", listed)
    if text in ("\\emptyset", "\\text{empty set}"):
        return _Group("\\{\\}", [])
    opening, closing = text[:1], text[-1:]
    if opening == "]" or closing == "[":  # ]1, 2[ is (1, 2)
        text = (
            ("(" if opening == "]" else opening) + text[1:-1] + (")" if closing == "[" else closing)
        )
        opening, closing = text[:1], text[-1:]
    if not is_one_group(text):
        return None
    if text.startswith("\\{") and text.endswith("\\}"):
        return _Group("\\{\\}", split_top(text[2:-2], ",;"))
    if text.startswith("\\langle") and text.endswith("\\rangle"):
        return _Group("()", split_top(text[len("\\langle") : -len("\\rangle")], ",;"))
    if opening in ("(", "[") and closing in (")", "]"):
        items = split_top(text[1:-1], ",;")
        return _Group(opening + closing, items) if len(items) > 1 else None
    return None


def _groups_equal(given: _Group, wanted: _Group, leaf: Leaf, depth: int) -> bool:
    if given.is_set != wanted.is_set and given.brackets and wanted.brackets:
        return False  # a set and a tuple
    if (not given.brackets and not wanted.brackets) or given.is_set or wanted.is_set:
        return _same_items(given.items, wanted.items, leaf, depth)
    if len(given.items) != len(wanted.items):
        return False
    # With two ends the brackets say open or closed; a bare list is (a, b).
    same_brackets = (given.brackets or "()") == (wanted.brackets or "()")
    if len(given.items) == 2 and not same_brackets:
        return False
    return all(
        structures_equal(a, b, leaf, depth + 1)
        for a, b in zip(given.items, wanted.items, strict=True)
    )


def _same_items(given: list[str], wanted: list[str], leaf: Leaf, depth: int) -> bool:
    """Tells whether two collections hold the same items in any order, repetitions aside."""
    left = list({compact(item): item for item in given}.values())
    right = list({compact(item): item for item in wanted}.values())
    if len(left) != len(right) or len(left) > _MAX_ITEMS:
        return False
    for item in left:
        for index, candidate in enumerate(right):
            if structures_equal(item, candidate, leaf, depth + 1):
                del right[index]
                break
        else:
            return False
    return True


def _matrix(text: str) -> list[list[str]] | None:
    match = _MATRIX.match(text)
    if match is None:
        return None
    body = match["body"] if match["body"] is not None else match["array"]
    rows = [row for row in body.split("\\\\") if row.strip()]
    return [[cell.strip() for cell in row.split("&")] for row in rows]
