"""Problem texts compared: canonical forms, words, and overlap with benchmarks."""

from __future__ import annotations

import random

import pytest

from megatron_sgopd.data.canonical_text import canonical, words
from megatron_sgopd.data.contamination import BenchmarkProblem, Benchmarks, common_words
from tests.support.set_files import AIME

ENDING = (
    "can be written as $\\frac{m}{n}$, where $m$ and $n$ are relatively prime positive integers. "
    "Find $m+n$."
)
CARDS = (
    "Jen enters a lottery by picking four distinct numbers from one to ten. Four numbers are drawn "
    "at random. She wins a prize if at least two of hers were drawn, and wins the grand prize if "
    "all four were. The probability of her winning the grand prize given that she won a prize "
) + ENDING
SHORT = "Compute $\\sin 60^\\circ$."


def benchmarks(**options: float) -> Benchmarks:
    problems = [
        BenchmarkProblem("aime24-60", "aime24", AIME),
        BenchmarkProblem("aime25-3", "aime25", CARDS),
        BenchmarkProblem("math500-1", "math500", SHORT),
    ]
    return Benchmarks(problems, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("Find $x$.", "Find \\(x\\)."),
        ("Find $$x$$.", "Find\n\\[ x \\]."),
        ("$\\dfrac{1}{2} + 1$", "$\\frac12$".replace("12", "{1}{2}+1")),
        ("$\\left( a,\\, b \\right)$", "$(a, b)$"),
        ("caf\u00e9?", "cafe\u0301?"),
        (" a  b\r\n", "a b"),
    ],
)
def test_typesetting_does_not_matter(a: str, b: str) -> None:
    assert canonical(a) == canonical(b)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("$1+2$", "$1-2$"),
        ("$f(a) + A$", "$f(A) + a$"),
        ("$x^2$", "$x2$"),
        ("12 apples", "1 2 apples"),
        ("costs \\$5", "costs 5"),
        ("$\\alpha x$", "$\\alphax$"),
        ("x² = 4", "x2 = 4"),
    ],
)
def test_mathematics_does(a: str, b: str) -> None:
    assert canonical(a) != canonical(b)


def test_words() -> None:
    assert words(r"Find $\dfrac{m_1}{n}$, \(N\geq 10\).") == [
        *("find", "frac", "m", "1", "n", "n", "geq", "10")
    ]


def test_common_words_is_the_longest_common_subsequence() -> None:
    def reference(a: list[str], b: list[str]) -> int:
        table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                table[i + 1][j + 1] = (
                    table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
                )
        return table[-1][-1]

    draw = random.Random(3)
    for size in (0, 1, 5, 40, 130):
        for _ in range(20):
            a = draw.choices("abcdef", k=size)
            b = draw.choices("abcdefg", k=draw.randrange(size + 20))
            assert common_words(a, b) == reference(a, b)


def test_the_same_problem_typeset_otherwise_is_found() -> None:
    hit = benchmarks().hit(AIME.replace("$9$", "\\(9\\)").replace("  ", " ").upper())
    assert hit is not None
    assert (hit.of.id, hit.overlap, hit.evidence) == ("aime24-60", 1.0, "the whole text")


def test_a_problem_with_other_numbers_or_words_around_it_is_found() -> None:
    for text in (
        AIME.replace("4 hours", "5 hours"),
        "Warm-up. " + AIME + " Give it as an integer, and explain every single step.",
    ):
        hit = benchmarks().hit(text)
        assert hit is not None and hit.of.id == "aime24-60" and hit.overlap > 0.9
        assert len(hit.evidence.split()) == 13
        assert hit.evidence in " ".join(words(AIME))


def test_overlap_is_of_the_shorter_text_and_the_bound_is_met_exactly() -> None:
    kept = words(AIME)[:15]
    text = " ".join([*kept, *(f"new{i}" for i in range(10))])  # 15 of 25 words: 0.6
    hit = benchmarks().hit(text)
    assert hit is not None and hit.overlap == 0.6
    assert benchmarks(min_overlap=0.61).hit(text) is None
    assert benchmarks().hit(text + " more") is None


def test_the_endings_that_all_such_problems_share_do_not_make_a_hit() -> None:
    other = (
        "Let a triangle with sides 13, 14 and 15 be cut by the bisector at its largest angle; "
        "suppose further its incircle touches every side. Their areas' ratio, simplified, "
    ) + ENDING
    assert benchmarks().hit(other) is None
    by_ngram_alone = benchmarks(min_overlap=0).hit(other)
    assert by_ngram_alone is not None and by_ngram_alone.of.id == "aime25-3"


def test_a_paraphrase_is_not_found() -> None:
    assert benchmarks().hit("Aya walks 9 km at s km/h and rests t minutes; 4 hours in all.") is None


def test_short_problems_are_found_whole_only() -> None:
    hit = benchmarks().hit("compute  $\\sin 60^\\circ$.")
    assert hit is not None and hit.of.id == "math500-1"
    assert benchmarks().hit("Compute $\\sin 60^\\circ$ and $\\cos 30^\\circ$.") is None
    assert benchmarks().hit("Compute $\\sin -60^\\circ$.") is None  # the words are the same


def test_the_nearest_problem_is_reported() -> None:
    near = AIME.replace("Aya", "Bea")
    problems = [BenchmarkProblem("far", "x", AIME), BenchmarkProblem("near", "x", near)]
    hit = Benchmarks(problems).hit(near + " Go.")
    assert hit is not None and hit.of.id == "near"


def test_ngram_size_is_an_option() -> None:
    text = " ".join(words(AIME)[:8])
    assert benchmarks().hit(text) is None
    assert benchmarks(ngram_words=8).hit(text) is not None
    assert benchmarks(ngram_words=9).hit(text) is None


@pytest.mark.parametrize("options", [{"ngram_words": 0}, {"min_overlap": 1.5}])
def test_settings_out_of_range(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="got"):
        benchmarks(**options)
