"""Brings a problem's text to a form without typesetting, and cuts it into words."""

from __future__ import annotations

import re
import unicodedata

_DELIMITERS = re.compile(r"(?<!\\)\\[()\[\]]|(?<!\\)\$+")
_SPACING = re.compile(
    r"(?<!\\)\\[,;:! ]|\\(?:left|right|displaystyle|limits|quad|qquad)(?![A-Za-z])"
)
_FRACTION = re.compile(r"\\[dt]frac(?![A-Za-z])")


def canonical(text: str) -> str:
    r"""A problem without what only its typesetting decides.

    White space, LaTeX spacing, math delimiters, \dfrac for \frac, two spellings of one Unicode
    character. Case and signs stay: f(a) + A is not f(A) - a.
    """
    text = unicodedata.normalize("NFC", text)
    text = _FRACTION.sub(r"\\frac", _SPACING.sub(" ", _DELIMITERS.sub(" ", text)))
    text = re.sub(r"\s+", " ", text).strip()
    return re.sub(r" ?([^\w\s]) ?", r"\1", text)


def words(text: str) -> list[str]:
    """The runs of letters and digits of a problem, in lower case; punctuation and signs are gone.

    Example: words(r"Find $\\dfrac{m}{n}$.") is ["find", "frac", "m", "n"].
    """
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", canonical(text)).casefold())
