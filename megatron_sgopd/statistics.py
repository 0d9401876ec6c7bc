"""Accuracy under sampling: avg@k, pass@k, bootstrap over problems, paired differences.

An evaluation is a list of records, one per problem, each with `num_samples` (n), `num_correct` (c)
and `greedy_is_correct` (or null). Everything here is arithmetic on those; accuracies are fractions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Record = Mapping[str, Any]
Floats = NDArray[np.float64]

_CHUNK = 1 << 22  # resampled values held at once: 32 MB of float64


@dataclass(frozen=True)
class Difference:
    """Mean over problems of arm - baseline, with its bootstrap interval."""

    mean: float
    ci95: tuple[float, float]

    @property
    def separated(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.ci95[0] > 0 or self.ci95[1] < 0


def avg_at_k(records: Sequence[Record]) -> float:
    """The mean over problems of the share of correct samples."""
    return float(problem_accuracies(records).mean())


def problem_accuracies(records: Sequence[Record]) -> Floats:
    """c / n per problem, [P]. ValueError where there is no record or a count is impossible."""
    num_samples, num_correct = _counts(records)
    return num_correct / num_samples


def pass_at_k(records: Sequence[Record], k: int) -> float:
    """The chance that one of k samples is right: 1 - C(n-c, k) / C(n, k), the mean over problems.

    The unbiased estimator of Chen et al. (arXiv 2107.03374). ValueError when k exceeds n anywhere.
    """
    return float(problem_pass_rates(records, k).mean())


def problem_pass_rates(records: Sequence[Record], k: int) -> Floats:
    """1 - C(n-c, k) / C(n, k) per problem, [P]."""
    num_samples, num_correct = _counts(records)
    if k < 1 or k > num_samples.min():
        raise ValueError(
            f"pass@k with k = {k}: there are {int(num_samples.min())} samples for some problem; "
            f"k must be between 1 and that"
        )
    # C(n-c, k) / C(n, k) = prod_{i<k} (n-c-i) / (n-i), which no large number enters.
    i = np.arange(k)[None]
    fails = np.maximum(num_samples[:, None] - num_correct[:, None] - i, 0)
    return 1.0 - np.prod(fails / (num_samples[:, None] - i), axis=1)


def bootstrap_ci95(
    values: Floats | Sequence[float], *, bootstrap_samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean, resampling problems (not samples) with replacement.

    Args:
        values: [P], one per problem.
        bootstrap_samples: bootstrap draws; the same seed gives the same interval.
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"values of shape {data.shape}; wanted one number per problem, at least 1")
    if bootstrap_samples < 1:
        raise ValueError(f"bootstrap_samples is {bootstrap_samples}; wanted at least 1")
    rng = np.random.default_rng(seed)
    means = np.empty(bootstrap_samples)
    rows = max(1, _CHUNK // data.size)
    for start in range(0, bootstrap_samples, rows):
        stop = min(start + rows, bootstrap_samples)
        picks = rng.integers(0, data.size, size=(stop - start, data.size))
        means[start:stop] = data[picks].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def paired_difference(
    arm: Sequence[Record],
    baseline: Sequence[Record],
    *,
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> Difference:
    """avg@k of `arm` less that of `baseline`, problem by problem (matched by `id`).

    Pairing takes the difficulty of the problems out of the interval. It speaks of these two trained
    models: what another seed of the training would give is not in it.

    Raises ValueError when the two were not evaluated on the same problems.
    """
    by_id = _by_id(baseline, "baseline")
    ids = list(_by_id(arm, "arm"))
    if odd := sorted(set(ids) ^ set(by_id)):
        raise ValueError(
            f"the two evaluations are not of the same problems: {odd[0]!r} is in one alone "
            f"({len(odd)} such); evaluate both on the same file"
        )
    partners = [by_id[i] for i in ids]
    for record, partner in zip(arm, partners, strict=True):
        if record.get("problem") != partner.get("problem"):
            raise ValueError(
                f"problem {record['id']!r} reads {record.get('problem')!r} in one evaluation and "
                f"{partner.get('problem')!r} in the other; evaluate both on the same file"
            )
    differences = problem_accuracies(arm) - problem_accuracies(partners)
    interval = bootstrap_ci95(differences, bootstrap_samples=bootstrap_samples, seed=seed)
    return Difference(float(differences.mean()), interval)


def greedy_accuracy(records: Sequence[Record]) -> float | None:
    """The share of right greedy answers; None when they were not sampled."""
    marks = [record.get("greedy_is_correct") for record in records]
    if not marks or any(mark is None for mark in marks):
        return None
    return float(np.mean([bool(mark) for mark in marks]))


def summarize(
    records: Sequence[Record], *, bootstrap_samples: int = 2000, seed: int = 0
) -> dict[str, Any]:
    """`avg_at_k`, its `ci95`, `pass_at_k`, `k` (samples per problem), `greedy`, `num_problems`."""
    accuracies = problem_accuracies(records)
    k = int(_counts(records)[0].min())
    low, high = bootstrap_ci95(accuracies, bootstrap_samples=bootstrap_samples, seed=seed)
    return {
        "avg_at_k": float(accuracies.mean()),
        "ci95": [low, high],
        "pass_at_k": pass_at_k(records, k),
        "k": k,
        "greedy": greedy_accuracy(records),
        "num_problems": len(records),
    }


def _counts(records: Sequence[Record]) -> tuple[Floats, Floats]:
    if not records:
        raise ValueError("no records: an evaluation needs at least one problem")
    num_samples = np.array([record["num_samples"] for record in records], dtype=np.float64)
    num_correct = np.array([record["num_correct"] for record in records], dtype=np.float64)
    for record, n, c in zip(records, num_samples, num_correct, strict=True):
        if n < 1 or not 0 <= c <= n:
            raise ValueError(
                f"problem {record.get('id')!r}: {c:g} correct of {n:g} samples; wanted at least "
                f"one sample and no more correct than sampled"
            )
    return num_samples, num_correct


def _by_id(records: Sequence[Record], name: str) -> dict[str, Record]:
    table = {str(record["id"]): record for record in records}
    if len(table) != len(records):
        raise ValueError(f"{name}: {len(records) - len(table)} problem ids occur more than once")
    return table
