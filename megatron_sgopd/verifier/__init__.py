r"""Is a completion's boxed answer the reference answer? By rule, then math-verify and SymPy.

`text` brings both answers to one spelling; `rules` and `scalars` compare structure, numbers, units,
percents and words; what is left, pairs of scalars that are not plain numbers, goes to math-verify's
LaTeX grammar and SymPy (`verdict`). math-verify's own extraction is not used: it accepts unboxed
answers and hands arithmetic to Python's eval. `VerifierPool` runs all this in worker processes
(`worker`) with hard limits on time and memory.

The rules, beyond equal values being equal:

* Only the last ``\boxed{…}`` counts. Without one, or with an empty, unclosed or brace-less one
  (``\boxed 5``), the answer is wrong.
* A decimal of six or more significant digits equals the number it is the rounding of; a shorter one
  its exact value alone (0.33 is not 1/3).
* ``50\%`` equals 0.5. The sign may be left out where the reference has it (``50``), and added where
  the reference is a bare number above 1.
* A unit may be left out on either side; two different units differ, and none is converted.
* ``\{…\}`` is a set (no order), ``(…)`` a tuple or open interval, ``[…]`` a closed one. A bare list
  ``1, 2`` equals a list or set in any order and a tuple in the same order; no set is a tuple.
* ``1,000`` is a thousand where it is the whole answer, or where other commas are followed by a
  space (``(1,000, 2,000)``); elsewhere commas separate.
* ``x = 5`` equals ``5``; ``x = 5`` and ``y = 5`` differ.
* Words are compared without case; single letters outside ``\text{}`` with it.
* A reference that cannot be parsed is compared as a normalised string.
"""

from megatron_sgopd.verifier.pool import VerifierPool
from megatron_sgopd.verifier.verdict import Verdict, verify

__all__ = ["Verdict", "VerifierPool", "verify"]
