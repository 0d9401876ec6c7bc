"""Scalars: plain numbers, units, percents and words; what is none of these goes to a `Leaf`."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

from megatron_sgopd.verifier.text import clean, compact, is_one_group

Leaf = Callable[[str, str], bool]  # (given, wanted) scalars, compact -> equal

_NUMBER = re.compile(
    r"(?P<sign>[+-]?)(?:"
    r"(?P<whole>\d{1,400})?\\frac\{(?P<neg>-?)(?P<top>\d{1,400})\}\{(?P<bottom>\d{1,400})\}"
    r"|(?P<a>\d{1,400})/(?P<b>\d{1,400})"
    r"|(?P<head>\d{0,99})\.(?P<fixed>\d{0,99})\\overline\{(?P<period>\d{1,99})\}"
    r"|(?P<decimal>\d{1,400}(?:\.\d{0,400})?|\.\d{1,400})"
    r"(?:(?:\\times|\\cdot|\*)10\^\{(?P<exp>[+-]?\d{1,3})\}|[eE](?P<e>[+-]?\d{1,3}))?"
    r")\Z"
)


class Number(NamedTuple):
    """A plain number as written."""

    value: Fraction
    is_decimal: bool = False  # written with a decimal point
    last_place: Fraction | None = None  # value of its last digit, for six significant ones or more


def parse_number(text: str) -> Number | None:
    r"""The plain number that `text` (compact) is, else None; nothing is evaluated.

    Takes integers, decimals, a/b, \frac{a}{b}, mixed numbers, repeating decimals (0.1\overline{6})
    and powers of ten. Example: parse_number(r"1\frac{1}{2}").value is Fraction(3, 2).
    """
    match = _NUMBER.match(text)
    if match is None:
        return None
    sign = -1 if match["sign"] == "-" else 1
    if match["decimal"] is not None:
        written = match["decimal"]
        scale = Fraction(10) ** int(match["exp"] or match["e"] or 0)
        places = len(written.partition(".")[2])
        is_exact = "." not in written or len(written.replace(".", "").lstrip("0")) < 6
        last_place = None if is_exact else scale / 10**places
        return Number(sign * Fraction(written.rstrip(".")) * scale, "." in written, last_place)
    if match["period"] is not None:
        fixed, period = match["fixed"], match["period"]
        tail = Fraction(int(period), 10 ** len(period) - 1) / 10 ** len(fixed)
        return Number(sign * (Fraction(f"{match['head'] or 0}.{fixed or 0}") + tail))
    whole = int(match["whole"] or 0)
    top, bottom = int(match["a"] or match["top"]), int(match["b"] or match["bottom"])
    if bottom == 0 or (whole and match["neg"]):
        return None
    return Number(sign * (whole + Fraction(-top if match["neg"] else top, bottom)))


def numbers_equal(a: Number, b: Number) -> bool:
    """Equal, or one is a decimal of at least six digits that the other, a fraction, rounds to."""
    if a.value == b.value:
        return True
    if a.is_decimal == b.is_decimal:
        return False
    last_place = a.last_place or b.last_place
    return last_place is not None and abs(a.value - b.value) <= last_place / 2


# --- units and percent ---------------------------------------------------------------------------

_UNIT_NAMES = {
    "cm": "centimeter centimetre cms",
    "mm": "millimeter millimetre mms",
    "km": "kilometer kilometre kms",
    "m": "meter metre",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard",
    "mi": "mile",
    "g": "gram gramme gm",
    "mg": "milligram",
    "kg": "kilogram kgs kilo",
    "lb": "pound lbs",
    "oz": "ounce",
    "s": "second sec secs",
    "min": "minute mins",
    "h": "hour hr hrs",
    "day": "days",
    "week": "weeks wk",
    "month": "months",
    "year": "years yr yrs",
    "L": "liter litre l",
    "mL": "milliliter millilitre ml",
    "deg": "degree degrees ^{\\circ}",
    "rad": "radian",
    "dollar": "dollars \\$ usd",
    "cent": "cents",
    "euro": "euros €",
    "gbp": "£",
    "N": "newton",
    "J": "joule",
    "W": "watt",
    "V": "volt",
    "A": "ampere amp",
    "Hz": "hertz",
    "K": "kelvin",
    "mol": "mole",
    "mph": "",
    "unit": "units",
    "gal": "gallon",
    "kW": "kilowatt",
    "kPa": "",
    "Pa": "pascal",
}
_UNIT_OF = {alias: unit for unit, names in _UNIT_NAMES.items() for alias in (unit, *names.split())}
_BARE_UNITS = "|".join(
    sorted((re.escape(u) for u in _UNIT_OF if u.isalpha() and len(u) > 1), key=len, reverse=True)
)
_UNIT = (
    r"(?: ?(?:\\text\{[^{}]{1,60}\}"
    rf"|(?<=[ /\d}}^])(?:{_BARE_UNITS})(?![a-zA-Z(])"
    r"|(?<= )[mshgLNJWVAK](?![a-zA-Z({])|(?<= )[a-zA-Z]{4,20}(?![a-zA-Z({])"
    r"|(?<=/)[mshgL](?![a-zA-Z({])"
    r"|\^\{\\circ\}|(?<=\})[CF](?![a-zA-Z]))"
    r"(?:\^\{-?\d\})?/?)"
)
_VALUE_THEN_UNIT = re.compile(rf"(?P<value>.*?[\w}})])(?P<unit>{_UNIT}{{1,6}})\Z")
_UNIT_WORD = re.compile(r"\\text\{([^{}]*)\}")


def _canonical_unit(unit: str) -> str:
    words = _UNIT_WORD.sub(r" \1 ", unit.replace("^{\\circ}", " deg ")).replace("/", " / ")
    out: list[str] = []
    power = ""
    for word in re.findall(r"[a-zA-Z]+|\^\{?-?\d\}?|/|\\?\$|€|£", words):
        lower = word.lower()
        if lower in ("square", "sq", "cubic", "cu"):
            power = "2" if lower.startswith("sq") else "3"
        elif word.startswith("^"):
            power_of_last = re.sub(r"[^-\d]", "", word)
            if out:
                out[-1] += power_of_last
        elif lower in ("per", "an", "a", "of"):
            out += ["/"] if lower == "per" else []
        else:
            singular = lower[:-1] if len(lower) > 3 and lower.endswith("s") else lower
            name = _UNIT_OF.get(word) or _UNIT_OF.get(lower) or _UNIT_OF.get(singular) or singular
            out.append(name + power)
            power = ""
    return " ".join(out)


def split_unit(text: str) -> tuple[str, str]:
    r"""(value, canonical unit) of a cleaned scalar; the unit "" without one, "%" for percent.

    Example: split_unit(r"5\text{ square meters}") is ("5", "m2").
    """
    text = text.strip()
    for sign in ("\\$", "€", "£"):
        if text.startswith(sign):
            return text[len(sign) :].strip(), _UNIT_OF[sign]
        if text.startswith("-" + sign):
            return "-" + text[len(sign) + 1 :].strip(), _UNIT_OF[sign]
        if text.endswith(sign):
            return text[: -len(sign)].strip(), _UNIT_OF[sign]
    if text.endswith("%"):
        return text[:-1].strip(), "%"
    if "{" not in text and " " not in text and not text[-1:].isalpha():
        return text, ""
    match = _VALUE_THEN_UNIT.match(text)
    if match is None or match["value"].lstrip().startswith("\\text"):
        return text, ""
    return match["value"].strip(), _canonical_unit(match["unit"])


# --- words and scalars ---------------------------------------------------------------------------

_WORDS = re.compile(r"\\text\{([^{}]*)\}|([a-zA-Z][a-zA-Z ]+)")
_PRODUCT = re.compile(r"[a-z]{1,6}")  # ab and ba may be products; longer ones are words
_DIGIT = re.compile(r"\d")
_CHOICE = re.compile(r"\(?\s?([a-zA-Z])\s?\)")


def _words(text: str) -> str | None:
    r"""The words of a purely textual answer, folded: \text{No.} and (A) give "no" and "a"."""
    match = _WORDS.fullmatch(text)
    if match is not None:
        content = match[1] if match[1] is not None else match[2]
        choice = _CHOICE.fullmatch(content.strip())
        return " ".join((choice[1] if choice else content).strip(" .!()").casefold().split())
    choice = _CHOICE.fullmatch(text)
    return choice[1].casefold() if choice else None


def scalars_equal(given: str, wanted: str, leaf: Leaf) -> bool:
    """Compare two cleaned scalars: text, percents, units, plain numbers, else `leaf`."""
    words = _words(given), _words(wanted)
    if words[0] is not None or words[1] is not None:
        left = words[0] if words[0] is not None else compact(given).casefold()
        right = words[1] if words[1] is not None else compact(wanted).casefold()
        if left.replace(" ", "") == right.replace(" ", ""):
            return True
        if "\\text" in given + wanted or not (_PRODUCT.fullmatch(left + right)):
            if not (_DIGIT.search(left) and _DIGIT.search(right)):
                return False
            given, wanted = clean(left), clean(right)
    (a, a_unit), (b, b_unit) = split_unit(given), split_unit(wanted)
    a, b = compact(a), compact(b)
    if a_unit and b_unit and a_unit != b_unit:
        return False
    if "%" in (a_unit, b_unit) and a_unit != b_unit:
        return _percent_equal(a, a_unit, b, leaf)
    return _values_equal(a, b, leaf)


def _percent_equal(a: str, a_unit: str, b: str, leaf: Leaf) -> bool:
    """One of the two is a percentage: `a` when `a_unit` is "%", otherwise `b`, the reference."""
    if a_unit != "%":
        return _values_equal(a, _hundredth(b), leaf) or _values_equal(a, b, leaf)
    if _values_equal(_hundredth(a), b, leaf):
        return True
    bare = parse_number(b)
    return bare is not None and bare.value > 1 and _values_equal(a, b, leaf)


def _hundredth(text: str) -> str:
    number = parse_number(text)
    if number is None:
        return f"\\frac{{{text}}}{{100}}"
    value = number.value / 100
    return f"{'-' if value < 0 else ''}\\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _values_equal(a: str, b: str, leaf: Leaf) -> bool:
    while a[:1] == "(" and a[-1:] == ")" and is_one_group(a):
        a = a[1:-1]
    while b[:1] == "(" and b[-1:] == ")" and is_one_group(b):
        b = b[1:-1]
    if a == b:
        return True
    left, right = parse_number(a), parse_number(b)
    if left is not None and right is not None:
        return numbers_equal(left, right)
    return leaf(a, b)
