r"""The verifier's judgement: pairs of each kind, what counts as the box, and nothing evaluated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from megatron_sgopd.verifier import Verdict, verify
from megatron_sgopd.verifier.text import (
    MAX_ANSWER_CHARS,
    MAX_COMPLETION_CHARS,
    clean,
    extract_boxed,
)
from megatron_sgopd.verifier.verdict import QUICK_CHARS, decide_quickly

# kind -> (content of the box, reference answer) that are equal, and that differ
PAIRS: dict[str, tuple[list[tuple[str, str]], list[tuple[str, str]]]] = {
    "fractions": (
        [
            (r"\frac{2}{4}", r"\frac12"),
            (r"\dfrac{3}{4}", "3/4"),
            (r"\frac{-1}{2}", r"-\frac{1}{2}"),
            (r"1\frac{1}{2}", r"\frac{3}{2}"),
            (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
        ],
        [
            (r"\frac{1}{2}", r"\frac{2}{1}"),
            (r"\frac{1}{3}", r"\frac{1}{4}"),
            (r"\frac{1}{2}", r"-\frac{1}{2}"),
            (r"\frac{1}{0}", "1"),
            (r"2\frac{1}{2}", "1"),
        ],
    ),
    "decimals": (
        [
            ("0.50", r"\frac{1}{2}"),
            (".5", "0.5"),
            ("0.333333", r"\frac{1}{3}"),
            ("3.14159265", r"\pi"),
            (r"1.2 \times 10^3", "1200"),
            (r"0.1\overline{6}", r"\frac{1}{6}"),
        ],
        [
            ("0.33", r"\frac{1}{3}"),
            ("3.14", r"\pi"),
            ("0.1", "0.01"),
            ("1.5e-7", "2.5e-7"),
            (r"10^{-20}", r"2 \cdot 10^{-20}"),
            ("0.3333334", "0.3333333"),
        ],
    ),
    "percents": (
        [
            (r"50\%", "0.5"),
            (r"12.5\%", r"\frac{1}{8}"),
            ("50", r"50\%"),
            (r"50\%", "50"),
            ("50 percent", r"50\%"),
        ],
        [
            (r"50\%", "5"),
            (r"50\%", "0.05"),
            (r"0.5\%", "0.5"),
            (r"50\%", r"51\%"),
            (r"1\%", "1"),
        ],
    ),
    "intervals": (
        [
            ("(1, 2]", r"\left(1,2\right]"),
            (r"(-\infty, \frac{1}{2})", r"(-\infty, 0.5)"),
            (r"(3,4) \cup (1,2)", r"(1,2)\cup(3,4)"),
            ("]1, 2[", "(1, 2)"),
            (r"x \ge 3", r"[3, \infty)"),
            (r"x < 1 \text{ or } x > 2", r"(-\infty,1)\cup(2,\infty)"),
        ],
        [
            ("[1, 2)", "[1, 2]"),
            ("(1, 2)", "[1, 2]"),
            (r"(-\infty, 3)", r"(3, \infty)"),
            (r"(1,2)\cup(3,4)", "(1,4)"),
            ("x > 3", r"[3, \infty)"),
            ("[0, 1]", "[0, 2]"),
        ],
    ),
    "sets": (
        [
            (r"\{1, 2\}", r"\{2, 1\}"),
            (r"\{\frac{1}{2}, \sqrt{8}\}", r"\left\{2\sqrt{2}, 0.5\right\}"),
            ("1 and 2", r"\{2, 1\}"),
            (r"\emptyset", r"\{\}"),
            (r"\{(1,2), (3,4)\}", r"\{(3,4), (1,2)\}"),
            (r"x = \pm 3", "3, -3"),
        ],
        [
            (r"\{1, 2\}", r"\{1, 3\}"),
            (r"\{1, 2\}", r"\{1, 2, 3\}"),
            (r"\{1, 2\}", "(1, 2)"),
            (r"\{(1,2), (3,4)\}", r"\{(2,1), (3,4)\}"),
            (r"\emptyset", r"\{0\}"),
            ("5", "5, -5"),
        ],
    ),
    "tuples": (
        [
            ("(1, 2)", "(1,2)"),
            (r"(\sqrt{4}, \frac{6}{2}, 0)", "(2, 3, 0)"),
            ("1, 2", "(1, 2)"),
            (r"\langle 1, 2, 3 \rangle", "(1, 2, 3)"),
            ("x = 1, y = 2", "(1, 2)"),
        ],
        [
            ("(2, 1)", "(1, 2)"),
            ("(1, 2, 3)", "(1, 3, 2)"),
            ("(1, 2)", "(1, 2, 0)"),
            ("2, 1", "(1, 2)"),
            ("(12)", "(1, 2)"),
        ],
    ),
    "matrices": (
        [
            (
                r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
                r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
            ),
            (
                r"\begin{pmatrix} \frac{1}{2} \\ 0 \end{pmatrix}",
                r"\begin{pmatrix} 0.5 \\ 0 \end{pmatrix}",
            ),
            (
                r"\left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right]",
                r"\begin{pmatrix} 1 & 2 \\[2pt] 3 & 4 \end{pmatrix}",
            ),
            (
                r"\begin{pmatrix} \sqrt{8} & 1 \end{pmatrix}",
                r"\begin{pmatrix} 2\sqrt{2} & 1 \end{pmatrix}",
            ),
        ],
        [
            (
                r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
                r"\begin{pmatrix} 1 & 3 \\ 2 & 4 \end{pmatrix}",
            ),
            (r"\begin{pmatrix} 1 & 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
            (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix} 1 \\ 2 \\ 0 \end{pmatrix}"),
            (r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", "10"),
        ],
    ),
    "units": (
        [
            (r"5\text{ cm}", "5"),
            ("5 cm", r"5\,\mathrm{cm}"),
            (r"5\text{ square meters}", r"5\text{ m}^2"),
            (r"90^\circ", "90"),
            (r"\$5", r"5 \text{ dollars}"),
            (r"60 \text{ km/h}", "60 km/h"),
        ],
        [
            (r"5\text{ cm}", r"5\text{ m}"),
            (r"5\text{ cm}^2", r"5\text{ cm}^3"),
            (r"6\text{ cm}", "5"),
            (r"30^\circ", r"31^\circ"),
            ("6 apples", "5 apples"),
            ("5 apples", "5 oranges"),
        ],
    ),
    "text": (
        [
            (r"\text{Yes}", "yes"),
            (r"\textbf{(C)}", "C"),
            (r"\text{no solution}", r"\text{No solution.}"),
            (r"\mathrm{even}", r"\text{even}"),
            (r"\text{5}", "5"),
        ],
        [
            (r"\text{Yes}", r"\text{No}"),
            (r"\text{(A)}", r"\text{(B)}"),
            (r"\text{odd}", "even"),
            (r"\text{five}", "5"),
            (r"\text{Monday}", r"\text{Tuesday}"),
        ],
    ),
    "thousands": (
        [
            ("1,000", "1000"),
            (r"1{,}000{,}000", "1,000,000"),
            (r"12\,345", "12345"),
            (r"\$1,234.50", "1234.5"),
            ("(1,000, 2,000)", "(1000, 2000)"),
        ],
        [
            ("1,000", "1"),
            ("1,000", "1.000"),
            ("12,34", "1234"),
            ("1,000", "10,000"),
            ("1,2,3", "123"),
        ],
    ),
    "Unicode": (
        [
            ("−5", "-5"),
            ("½", "0.5"),
            ("1½", r"\frac{3}{2}"),
            ("2π", r"2\pi"),
            ("90°", "90"),
            ("√2", r"\sqrt{2}"),
            ("x²", "x^2"),
            ("（１，２）", "(1, 2)"),
            ("x ≤ 2", r"x \leq 2"),
        ],
        [
            ("−5", "5"),
            ("½", "2"),
            ("1½", "0.5"),
            ("2π", r"3\pi"),
            ("√3", r"\sqrt{2}"),
            ("x³", "x^2"),
            ("∞", r"-\infty"),
            ("x ≥ 2", r"x \leq 2"),
        ],
    ),
    "expressions": (
        [
            (r"(x+1)^2", "x^2+2x+1"),
            (r"\sqrt{12}", r"2\sqrt{3}"),
            ("2^{10}", "1024"),
            ("x = 5", "5"),
            ("y = 2x + 3", "2x - y + 3 = 0"),
        ],
        [
            (r"(x-1)^2", "x^2+2x+1"),
            (r"\ln 2", r"\log 2"),
            ("x - y", "y - x"),
            ("x = 5", "y = 5"),
            ("2x", "x^2"),
        ],
    ),
}
TABLE = [
    pytest.param(rf"So the answer is $\boxed{{{given}}}$.", answer, expected, id=f"{kind}-{given}")
    for kind, columns in PAIRS.items()
    for expected, pairs in zip((True, False), columns, strict=True)
    for given, answer in pairs
]
BOXES = [
    # several boxes: the last counts
    (r"first \boxed{1}, no: \boxed{2}", "2", "equal"),
    (r"\boxed{1} and \boxed{2}", "1,2", "different"),
    (r"first \boxed{2}, no: \boxed{1}", "2", "different"),
    (r"\boxed{3 + \boxed{2}}", "2", "equal"),
    (r"\boxed{2} \boxed{2", "2", "unclosed"),
    (r"\boxed{2}, that is \boxed{}", "2", "empty"),
    (r"\boxed{2}, that is \boxed 3", "2", "no_boxed"),
    (r"\boxed{2} \boxedtext{3}", "2", "equal"),
    # unboxed
    ("The answer is 2.", "2", "no_boxed"),
    ("$2$", "2", "no_boxed"),
    (r"\fbox{2}", "2", "no_boxed"),
    (r"\boxed 2", "2", "no_boxed"),
    ("The final answer is $2$. I hope it is correct.", "2", "no_boxed"),
    ("boxed{2}", "2", "no_boxed"),
    ("", "2", "no_boxed"),
    # empty
    (r"\boxed{}", "2", "empty"),
    (r"2 \boxed{ }", "2", "empty"),
    (r"2 \boxed{\,}", "2", "empty"),
    (r"\boxed{\text{}}", "2", "empty"),
    (r"\boxed{$$}", "2", "empty"),
    # braces
    (r"\boxed{\{2\}}", r"\{2\}", "equal"),
    (r"\boxed {2}", "2", "equal"),
    (r"\boxed{\frac{1}{\sqrt{4}}} and }", r"\frac12", "equal"),
]


@pytest.mark.parametrize(("completion", "answer", "expected"), TABLE)
def test_pair(completion: str, answer: str, expected: bool) -> None:
    verdict = verify(completion, answer)
    assert verdict.is_correct is expected, verdict
    assert (verdict.reason == "equal") is expected


def test_table_is_balanced() -> None:
    for kind, (equal, different) in PAIRS.items():
        assert len(equal) >= 4 and len(different) >= 4, kind
    assert len(TABLE) >= 60


@pytest.mark.parametrize(("completion", "answer", "reason"), BOXES)
def test_only_the_last_box_counts(completion: str, answer: str, reason: str) -> None:
    verdict = verify(completion, answer)
    assert (verdict.is_correct, verdict.reason) == (reason == "equal", reason)


def test_quick_rules_agree_with_the_full_comparison() -> None:
    decided = 0
    for parameters in TABLE:
        completion, answer, expected = parameters.values
        quick = decide_quickly(str(extract_boxed(str(completion))[0]), str(answer))
        if quick is not None:
            decided += 1
            assert quick.is_correct is expected, parameters.id
    assert decided > len(TABLE) / 2


@pytest.mark.parametrize("reference", ["5", r"\boxed{5}", r"We get $\boxed{4}$, then \boxed{5}."])
def test_reference_bare_or_boxed(reference: str) -> None:
    assert verify(r"\boxed{5}", reference) == Verdict(True, "5", "equal")
    assert verify(r"\boxed{4}", reference) == Verdict(False, "4", "different")


def test_unparsable_reference_is_compared_as_a_string() -> None:
    assert verify(r"\boxed{$foo ( \, bar$}", "foo(bar").reason == "equal"
    assert verify(r"\boxed{5}", "foo (bar").is_correct is False
    assert verify(r"\boxed{5}", " ") == Verdict(False, "5", "no_reference")


def test_lengths_are_bounded() -> None:
    at_most = "1" * MAX_ANSWER_CHARS
    assert verify(rf"\boxed{{{at_most}}}", at_most).is_correct
    assert verify(rf"\boxed{{{at_most}1}}", at_most + "1").reason == "too_long"
    assert verify("x" * MAX_COMPLETION_CHARS + r"\boxed{5}", "5").reason == "too_long"
    assert verify(r"\boxed{" + "{" * 10**5 + "5" + "}" * 10**5 + "}", "5").reason == "too_long"


REPEATED = ("{", "(", "\\", "\\{1,", "1,000", r"\text{a}/", r"\text{ } ", "^", "½", "ﷺ", "1'", "x=")
REPEATED_COMMANDS = (r"\frac1", r"\sqrt", r"\pm", " or ", "1 ", " cm", r"\\[", r"{\rm ")


@pytest.mark.parametrize("piece", REPEATED + REPEATED_COMMANDS)
def test_quick_rules_are_quick_on_any_text(piece: str) -> None:
    """They run in the trainer's own process, where nothing could stop them."""
    text = "5" + (piece * QUICK_CHARS)[: QUICK_CHARS - 2] + "!"
    start = time.process_time()
    decide_quickly(text, r"5\text{ cm}")
    clean(piece * (MAX_ANSWER_CHARS // len(piece)))
    assert time.process_time() - start < 0.5


HOSTILE = [
    "__import__('os').system('touch {marker}')",
    r"\text{{__import__('os').system('touch {marker}')}}",
    r"\operatorname{{exec}}(open('{marker}','w'))",
    "[x for x in (open('{marker}','w'),)]",
    r"\mathrm{{__import__}}('os').system('touch {marker}')",
    "open('{marker}','w')",
    "x_{{open('{marker}','w')}}",
    'f\'{{open("{marker}","w")}}\'',
    "1+2*3",
    "(1+2)**2",
    "0.5 + 2.25x",
    "1.5E3 + x",
]


def test_nothing_is_evaluated(tmp_path: os.PathLike[str]) -> None:
    """No text becomes Python code: the interpreter's own audit of compile() sees none of it."""
    marker = os.path.join(tmp_path, "marker")
    program = """
import json, sys
from megatron_sgopd.verifier import verify
verify(r"\\boxed{(x+1)^2}", "x^2+2x+1"), verify(r"\\boxed{\\sqrt{2}}", "1.5")  # imports done
compiled, started = [], []
def hook(event, arguments):
    if event == "compile":
        compiled.append(str(arguments[0])[:40])
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn"):
        started.append(event)
sys.addaudithook(hook)
eval("40 + 2")  # the hook sees what it should
for text in sys.stdin.read().split("\\0"):
    for answer in ("7", "x+1", r"\\text{yes}", "(1, 2)", text):
        verify("\\\\boxed{" + text + "}", answer)
print(json.dumps([compiled, started]))
"""
    texts = [text.format(marker=marker) for text in HOSTILE]
    result = subprocess.run(
        [sys.executable, "-c", program],
        input="\0".join(texts),
        text=True,
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    compiled, started = json.loads(result.stdout)
    assert compiled[0] == "b'40 + 2'"
    assert started == []
    # SymPy builds its monomials' arithmetic from source, of its own names and a count alone.
    others = [source for source in compiled[1:] if not source.startswith("b'def monomial_")]
    assert others == []
    assert not os.path.exists(marker)
