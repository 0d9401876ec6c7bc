r"""Maths answers as text: finding the last box, and one spelling for what can be spelt many ways.

Everything here is plain string work in time linear in the length of the answer; nothing is
evaluated. It runs in the trainer's own process, so every pattern must stay free of backtracking
over nested or adjacent repeats.
"""

from __future__ import annotations

import re
import unicodedata

MAX_ANSWER_CHARS = 4000  # a longer box is no answer; it also bounds all the work done here

MAX_COMPLETION_CHARS = 2_000_000  # a million tokens of ordinary text; longer is no completion

_BOX = "\\boxed"
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)
_AFTER_BOX = re.compile(r"\s{0,100}\{")

_UNICODE = {
    **dict.fromkeys("−–—‐‑‒﹣－", "-"),
    **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\u00ad", ""),
    **dict.fromkeys(
        "\u00a0\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f", " "
    ),
    **dict.fromkeys("°º˚", "^{\\circ}"),
    **dict.fromkeys("·⋅∙•", "\\cdot "),
    **dict.fromkeys("⁄∕", "/"),
    **dict.fromkeys("’ʼ′", "'"),
    "×": "\\times ",
    "÷": "/",
    "∗": "*",
    "∞": "\\infty ",
    "≤": "\\le ",
    "⩽": "\\le ",
    "≥": "\\ge ",
    "⩾": "\\ge ",
    "≠": "\\ne ",
    "≈": "\\approx ",
    "±": "\\pm ",
    "∓": "\\mp ",
    "∪": "\\cup ",
    "∩": "\\cap ",
    "∅": "\\emptyset ",
    "⌀": "\\emptyset ",
    "∈": "\\in ",
    "∖": "\\setminus ",
    "⟨": "\\langle ",
    "⟩": "\\rangle ",
    "√": "\\sqrt ",
    "ℝ": "\\mathbb{R}",
    "ℤ": "\\mathbb{Z}",
    "ℕ": "\\mathbb{N}",
    "ℚ": "\\mathbb{Q}",
    "ℂ": "\\mathbb{C}",
    "…": "\\ldots ",
    "℃": "^{\\circ}C",
    "℉": "^{\\circ}F",
    **{  # Greek letters by their Unicode names
        chr(code): f"\\{name.lower()} "
        for code, name in (
            (code, unicodedata.name(chr(code), "").rpartition(" ")[2].replace("LAMDA", "LAMBDA"))
            for code in range(0x3B1, 0x3CA)
        )
    },
    "Γ": "\\Gamma ",
    "Δ": "\\Delta ",
    "∆": "\\Delta ",
    "Θ": "\\Theta ",
    "Λ": "\\Lambda ",
    "Π": "\\Pi ",
    "Σ": "\\Sigma ",
    "Φ": "\\Phi ",
    "Ψ": "\\Psi ",
    "Ω": "\\Omega ",
    "ϕ": "\\phi ",
    "ϵ": "\\epsilon ",
}
for _name in ("VULGAR FRACTION", "SUPERSCRIPT", "SUBSCRIPT"):
    for _code in (*range(0xB2, 0xBF), *range(0x2070, 0x209D), *range(0x2150, 0x215F), 0x2189):
        _character = chr(_code)
        if not unicodedata.name(_character, "").startswith(_name):
            continue
        _plain = unicodedata.normalize("NFKC", _character).replace("\u2212", "-")
        if _name == "VULGAR FRACTION":
            _top, _, _bottom = _plain.partition("\u2044")
            if _bottom:
                _UNICODE[_character] = f"\\frac{{{_top}}}{{{_bottom}}}"
        else:
            _UNICODE[_character] = f"{'^' if _name == 'SUPERSCRIPT' else '_'}{{{_plain}}}"
_TRANSLATION = str.maketrans(_UNICODE)


def extract_boxed(text: str) -> tuple[str | None, str]:
    r"""Returns what stands in the last ``\boxed{…}`` of `text`, and why not when there is none.

    Only the last ``\boxed`` counts. One that is not followed by a brace (``\boxed 5``), or whose
    brace is never closed, is no box, and an earlier one does not stand in for it.

    Returns (content, "") or (None, reason) with reason "no_boxed", "unclosed" or "too_long": more
    than `MAX_ANSWER_CHARS` in the box or `MAX_COMPLETION_CHARS` in all.
    """
    if len(text) > MAX_COMPLETION_CHARS:
        return None, "too_long"
    start = text.rfind(_BOX)
    while start >= 0 and text[start + len(_BOX) : start + len(_BOX) + 1].isalpha():
        start = text.rfind(_BOX, 0, start)  # \boxedsomething is another command
    if start < 0:
        return None, "no_boxed"
    opening = _AFTER_BOX.match(text, start + len(_BOX))
    if opening is None:
        return None, "no_boxed"
    limit = opening.end() + MAX_ANSWER_CHARS + 1
    depth = 1
    for brace in _BRACES.finditer(text, opening.end(), limit):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
            if depth == 0:
                return text[opening.end() : brace.start()], ""
    return None, "unclosed" if len(text) <= limit else "too_long"


_TEXT_COMMANDS = (
    "text|mathrm|mathbf|mathit|mathsf|textbf|textit|textrm|textnormal|mbox|hbox|operatorname"
)
_REWRITES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<![\d.])(\d{1,9}) (\d{1,9})/(\d{1,9})(?!\d)", r"\1\\frac{\2}{\3}"),
        (r"\\(?:dfrac|tfrac|cfrac)(?![a-zA-Z])", r"\\frac"),
        (r"\\frac\{([^{}]{1,99})\}\s?(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s?(\d)\s?\{", r"\\frac{\1}{"),
        (r"\\frac\s?(\d)\s?(\d)", r"\\frac{\1}{\2}"),
        (r"\\sqrt\s?(\d|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}"),
        (r"\\sqrt\s?\(([^(){}]{1,99})\)", r"\\sqrt{\1}"),
        (r"\\sqrt\s?(\\[a-zA-Z]+) ?", r"\\sqrt{\1}"),
        (r"\\(?:left|right|middle)(?![a-zA-Z])\s?\.?", ""),
        (r"\\(?:big|Big|bigg|Bigg)[lrm]?(?![a-zA-Z])", ""),
        (r"\\(?:displaystyle|textstyle|limits|nolimits|bf|rm|it|boldsymbol)(?![a-zA-Z])", ""),
        (r"\\lbrace(?![a-zA-Z])", r"\\{"),
        (r"\\rbrace(?![a-zA-Z])", r"\\}"),
        (r"\\(?:leq|leqslant)(?![a-zA-Z])|<=", r"\\le "),
        (r"\\(?:geq|geqslant)(?![a-zA-Z])|>=", r"\\ge "),
        (r"\\neq(?![a-zA-Z])|!=", r"\\ne "),
        (r"\\lt(?![a-zA-Z])", "<"),
        (r"\\gt(?![a-zA-Z])", ">"),
        (r"\\(?:infin)(?![a-zA-Z])", r"\\infty "),
        (r"(?<![\\a-zA-Z])(?:infinity|infty|inf)(?![a-zA-Z])", r"\\infty "),
        (r"(?<![\\a-zA-Z])pi(?![a-zA-Z])", r"\\pi "),
        (r"\\varnothing(?![a-zA-Z])|\\\{\s?\\\}", r"\\emptyset "),
        (r"\^\s?(?:\\circ(?![a-zA-Z])|\{\s?\\circ\s?\})|\\degree(?![a-zA-Z])", r"^{\\circ}"),
        (r"\\(?:ldots|dots|cdots)(?![a-zA-Z])", r"\\ldots "),
        (r"\\(?:quad|qquad|,|;|:|>|!| |hspace\{[^{}]{0,9}\})|~", " "),
        (r"\\([%#])", r"\1"),
        (rf"\\(?:{_TEXT_COMMANDS})\s?\{{([^{{}}]*)\}}", r"\\text{\1}"),
        (r"\{\s?(?:\\rm|\\bf|\\it|\\sf)\s([^{}]*)\}", r"\\text{\1}"),
        (r"\\text\{\s{0,9},?\s{0,9}(?:and|or)\s{0,9}\}|,?\s(?:and|or)\s", ","),
        (r"(?<=\d)\s{0,9}\\text\{\s{0,9}(?:percent|per cent|pct)\s{0,9}\}", "%"),
        (r"(?<=\d)\s{0,9}(?:percent|per cent|pct)\b", "%"),
        (r"\\text\{\s{0,9}\}", ""),
        (r"\^(\w)", r"^{\1}"),
        (r"_(\w)", r"_{\1}"),
    )
)
# Thousands: 1,234 · 1{,}234 · 1\,234 · 1 234 · 1'234; never after a digit or a point.
_THOUSANDS_MARK = r"(?:\{,\}|\\,|\\ |\\!|,\\!|'| )"
_THOUSANDS = re.compile(rf"(?<![\d.,])\d{{1,3}}(?:{_THOUSANDS_MARK}\d{{3}})+(?!\d)")
_COMMA_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!\d|,\d)")
_WHOLE_COMMA_NUMBER = re.compile(r"[^\d,(\[{]*\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,])[^,]*\Z")
_END_OF_ROW = "\x01"
_MATH_MARKS = re.compile(r"\\\\(?:\[[^\]]{0,20}\])?|\\[()\[\]]|\\\$|\$")
_SPACE_AFTER_COMMAND = re.compile(r"(\\[a-zA-Z]+) (?=[a-zA-Z])")


def _strip_math_mark(mark: re.Match[str]) -> str:
    if mark[0].startswith("\\\\"):
        return _END_OF_ROW  # its spacing dropped; kept from the rules for "\\," and its like
    return "\\$" if mark[0] == "\\$" else ""


def _join_thousands(text: str) -> str:
    text = _THOUSANDS.sub(lambda number: re.sub(r"\D", "", number[0]), text)
    # A comma between digits is a thousands separator when the answer is one number, or when the
    # list's own separators are set apart by a space: (1,000, 2,000). Otherwise it separates.
    if _WHOLE_COMMA_NUMBER.match(text) or re.search(r",\s", text):
        text = _COMMA_THOUSANDS.sub(lambda number: number[0].replace(",", ""), text)
    return text


def clean(text: str) -> str:
    r"""`text` in one spelling, single spaces kept (units and words need them).

    Raises nothing; `text` should be at most `MAX_ANSWER_CHARS` long.
    Example: clean(r"$\dfrac12 \leq x$") is r"\frac{1}{2} \le x".
    """
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text.translate(_TRANSLATION))
        text = text.translate(_TRANSLATION)  # NFKC turns full-width forms into some of these
        text = "".join(
            str(unicodedata.decimal(character)) if character.isdecimal() else character
            for character in text
        )
    text = _MATH_MARKS.sub(_strip_math_mark, text)
    text = _join_thousands(re.sub(r"\s+", " ", text).strip())
    for pattern, replacement in _REWRITES:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\s+", " ", text.replace(_END_OF_ROW, "\\\\")).strip()
    return text.rstrip(".,; ") if not text.endswith("\\") else text


def compact(text: str) -> str:
    r"""`text` without the spaces that mean nothing: the form in which identical answers are equal.

    Example: compact(r"2 \pi r + 1") is r"2\pi r+1".
    """
    marked = _SPACE_AFTER_COMMAND.sub("\\1\0", text)
    return marked.replace(" ", "").replace("\0", " ")


def split_top(text: str, separator: str) -> list[str]:
    r"""`text` split at each `separator` that stands in no bracket of any kind.

    `separator` is one character or a command such as ``\cup``. Unbalanced brackets split nothing
    beyond them.
    """
    parts: list[str] = []
    depth = 0
    start = 0
    command = separator.startswith("\\")
    for token in _TOKENS.finditer(text):
        piece = token[0]
        if piece in _OPENING:
            depth += 1
        elif piece in _CLOSING:
            depth -= 1
        if depth == 0 and (piece == separator if command else piece in separator):
            parts.append(text[start : token.start()].strip())
            start = token.end()
    parts.append(text[start:].strip())
    return parts


_TOKENS = re.compile(r"\\[a-zA-Z]+|\\.|.", re.DOTALL)
_OPENING = frozenset(("{", "(", "[", "\\{", "\\langle", "\\begin"))
_CLOSING = frozenset(("}", ")", "]", "\\}", "\\rangle", "\\end"))


def is_one_group(text: str) -> bool:
    """Tells whether `text` begins with the bracket that it ends with: (1,2] and not (1)(2)."""
    depth = 0
    end = 0
    for token in _TOKENS.finditer(text):
        if end and token[0] != " ":
            return False
        depth += (token[0] in _OPENING) - (token[0] in _CLOSING)
        if depth <= 0:
            end = token.end()
    return depth == 0 and end > 0
