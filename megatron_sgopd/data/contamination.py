"""Is a training problem one of a benchmark's? By n-grams of words, then by common subsequence.

A run of 13 words in common finds the candidates; a candidate counts when the longest common
subsequence of words is at least 0.6 of the shorter text (both numbers as in Qwen2.5's report,
arXiv 2412.15115). Without the second, every problem that ends in "where m and n are relatively
prime positive integers. Find m + n." would be one of AIME's; a short one still may, and costs the
training set that problem. Problems too short for an n-gram are found when the whole text is the
same. A paraphrase or a translation is not found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sgopd.data.canonical_text import canonical, words

NGRAM_WORDS = 13
MIN_OVERLAP = 0.6


@dataclass(frozen=True)
class BenchmarkProblem:
    id: str
    benchmark: str
    problem: str


@dataclass(frozen=True)
class Hit:
    """The benchmark problem that is nearest: `overlap` is the common share of the shorter text."""

    of: BenchmarkProblem
    overlap: float
    evidence: str  # the first n-gram in common, or "the whole text"


class Benchmarks:
    """The problems that no training set may hold.

    `ngram_words` is how many words in a row make a candidate, `min_overlap` the share (0 to 1) of
    the shorter text that must be common; 0 takes every candidate. Raises ValueError out of range.
    """

    def __init__(
        self,
        problems: Sequence[BenchmarkProblem],
        ngram_words: int = NGRAM_WORDS,
        min_overlap: float = MIN_OVERLAP,
    ) -> None:
        if ngram_words < 1:
            raise ValueError(f"an n-gram has at least 1 word, got {ngram_words}")
        if not 0 <= min_overlap <= 1:
            raise ValueError(f"the overlap is a share from 0 to 1, got {min_overlap}")
        self._size = ngram_words
        self._min_overlap = min_overlap
        self._problems = problems
        self._words = [words(problem.problem) for problem in problems]
        self._whole: dict[str, int] = {}
        self._ngrams: dict[tuple[str, ...], dict[int, None]] = {}  # -> indices, in order, once each
        for index, problem in enumerate(problems):
            self._whole.setdefault(_whole(problem.problem), index)
            for ngram in self._ngrams_of(self._words[index]):
                self._ngrams.setdefault(ngram, {})[index] = None

    def hit(self, problem: str) -> Hit | None:
        """The benchmark problem that `problem` is, or shares most with; None where there is none.

        Of equal ones the first.
        """
        whole = self._whole.get(_whole(problem))
        if whole is not None:
            return Hit(self._problems[whole], 1.0, "the whole text")
        text = words(problem)
        evidence: dict[int, tuple[str, ...]] = {}
        for ngram in self._ngrams_of(text):
            for index in self._ngrams.get(ngram, ()):
                evidence.setdefault(index, ngram)
        best: Hit | None = None
        for index in sorted(evidence):
            other = self._words[index]
            overlap = common_words(text, other) / min(len(text), len(other))
            if overlap >= self._min_overlap and (best is None or overlap > best.overlap):
                best = Hit(self._problems[index], overlap, " ".join(evidence[index]))
        return best

    def _ngrams_of(self, text: list[str]) -> list[tuple[str, ...]]:
        n = self._size
        return [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]


def _whole(problem: str) -> str:
    return canonical(problem).casefold()


def common_words(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, a row of the table at a time in the bits of one
    integer (Hyyrö 2004): microseconds where the table itself takes milliseconds.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    all_ones = (1 << len(a)) - 1
    row = all_ones
    for word in b:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & all_ones
    return len(a) - row.bit_count()
