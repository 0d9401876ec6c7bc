"""Accuracy under sampling: avg@k, pass@k, bootstrap over problems, paired differences.

An evaluation is a list of records, one per problem, each with `num_samples` (n), `num_correct` (c)
and `greedy_is_correct` (or null). Everything here is arithmetic on those; accuracies are fractions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
        """Tells whether the interval leaves zero out."""
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
    *values: Floats | Sequence[float], bootstrap_samples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The percentile interval of the mean, resampling problems (not samples) with replacement.

    Args:
        values: [P], one per problem; of several sets, the mean of their means, each resampled
            within itself.
        bootstrap_samples: bootstrap draws; the same seed gives the same interval.
    """
    rng = np.random.default_rng(seed)
    means = np.mean([_bootstrap_means(v, bootstrap_samples, rng) for v in values], axis=0)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _bootstrap_means(
    values: Floats | Sequence[float], bootstrap_samples: int, rng: np.random.Generator
) -> Floats:
    """The means of [bootstrap_samples] resampled sets."""
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or data.size == 0:
        raise ValueError(f"values of shape {data.shape}; wanted one number per problem, at least 1")
    if bootstrap_samples < 1:
        raise ValueError(f"bootstrap_samples is {bootstrap_samples}; wanted at least 1")
    means = np.empty(bootstrap_samples)
    rows = max(1, _CHUNK // data.size)
    for start in range(0, bootstrap_samples, rows):
        stop = min(start + rows, bootstrap_samples)
        picks = rng.integers(0, data.size, size=(stop - start, data.size))
        means[start:stop] = data[picks].mean(axis=1)
    return means


def paired_difference(
    arm: Sequence[Record],
    baseline: Sequence[Record],
    *,
    of: Callable[[Sequence[Record]], Floats] = problem_accuracies,
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> Difference:
    """avg@k of `arm` less that of `baseline`, problem by problem (matched by benchmark and `id`).

    Pairing takes the difficulty of the problems out of the interval. It speaks of these two trained
    models: what another seed of the training would give is not in it. Of several benchmarks: the
    mean of their differences. `of` gives another value per problem than the share of right samples.

    Raises ValueError when the two were not evaluated on the same problems.
    """
    by_key = _by_key(baseline, "baseline")
    keys = list(_by_key(arm, "arm"))
    if unshared := sorted(set(keys) ^ set(by_key)):
        raise ValueError(
            f"the two evaluations are not of the same problems: {unshared[0][1]!r} is in one alone "
            f"({len(unshared)} such); evaluate both on the same file"
        )
    for record in arm:
        partner = by_key[_key(record)]
        if record.get("problem") != partner.get("problem"):
            raise ValueError(
                f"problem {record['id']!r} reads {record.get('problem')!r} in one evaluation and "
                f"{partner.get('problem')!r} in the other; evaluate both on the same file"
            )
    differences = [
        of(group) - of([by_key[_key(record)] for record in group])
        for group in by_benchmark(arm).values()
    ]
    interval = bootstrap_ci95(*differences, bootstrap_samples=bootstrap_samples, seed=seed)
    return Difference(_mean_of_means(differences), interval)


def by_benchmark(records: Sequence[Record]) -> dict[str, list[Record]]:
    """The records of each benchmark, in their order; "" where none is named."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record.get("benchmark", ""), []).append(record)
    return groups


def mean_over_benchmarks(
    records: Sequence[Record], of: Callable[[Sequence[Record]], Floats]
) -> float:
    """The mean of the benchmarks' means of `of`."""
    return _mean_of_means([of(group) for group in by_benchmark(records).values()])


def greedy_accuracy(records: Sequence[Record]) -> float | None:
    """The share of right greedy answers; None when they were not sampled."""
    if not records or any(record.get("greedy_is_correct") is None for record in records):
        return None
    return float(greedy_marks(records).mean())


def greedy_marks(records: Sequence[Record]) -> Floats:
    """1 where the greedy answer is right, else 0, [P]."""
    return np.array([bool(record["greedy_is_correct"]) for record in records], dtype=np.float64)


def summarize(
    records: Sequence[Record],
    k: int | None = None,
    *,
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Returns what an evaluation comes to; of several benchmarks their mean, each of one weight.

    `avg_at_k` over all samples with its `ci95`, `pass_at_k` with its `pass_ci95` (the unbiased
    estimator, for `k` up to the samples per problem, which it is by default), `num_samples` per
    problem, `greedy` with its `greedy_ci95`, `mean_length` in tokens and the share `truncated` of
    samples, `num_problems`.
    """
    num_samples = int(_counts(records)[0].min())
    k = k or num_samples
    groups = list(by_benchmark(records).values())

    def interval(values: Sequence[Floats]) -> list[float]:
        return list(bootstrap_ci95(*values, bootstrap_samples=bootstrap_samples, seed=seed))

    accuracies = [problem_accuracies(group) for group in groups]
    passes = [problem_pass_rates(group, k) for group in groups]
    greedy = None if greedy_accuracy(records) is None else [greedy_marks(group) for group in groups]
    return {
        "avg_at_k": _mean_of_means(accuracies),
        "ci95": interval(accuracies),
        "pass_at_k": _mean_of_means(passes),
        "pass_ci95": interval(passes),
        "k": k,
        "num_samples": num_samples,
        "greedy": None if greedy is None else _mean_of_means(greedy),
        "greedy_ci95": None if greedy is None else interval(greedy),
        "mean_length": _mean_of(groups, lambda record: record.get("lengths")),
        "truncated": _mean_of(groups, _truncated_share),
        "num_problems": len(records),
    }


def summarize_benchmarks(
    records: Sequence[Record],
    k: int | None = None,
    *,
    bootstrap_samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """`summarize` of all; and of each under `benchmarks`, where they have names."""
    options = {"bootstrap_samples": bootstrap_samples, "seed": seed}
    each = {name: summarize(g, k, **options) for name, g in by_benchmark(records).items() if name}
    return {**summarize(records, k, **options), "benchmarks": each}


def _mean_of_means(groups: Sequence[Floats]) -> float:
    return float(np.mean([group.mean() for group in groups]))


def _mean_of(
    groups: Sequence[Sequence[Record]], values: Callable[[Record], Sequence[float] | None]
) -> float | None:
    """The mean over benchmarks of what their samples have; None where some record lacks it."""
    means = []
    for group in groups:
        found = [values(record) for record in group]
        if any(value is None for value in found):
            return None
        means.append(np.concatenate([np.asarray(v, np.float64) for v in found if v is not None]))
    return _mean_of_means(means)


def _truncated_share(record: Record) -> list[float] | None:
    truncated = record.get("truncated")
    return None if truncated is None else [truncated / record["num_samples"]]


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


def _key(record: Record) -> tuple[str, str]:
    return str(record.get("benchmark", "")), str(record["id"])


def _by_key(records: Sequence[Record], name: str) -> dict[tuple[str, str], Record]:
    table = {_key(record): record for record in records}
    if len(table) != len(records):
        raise ValueError(f"{name}: {len(records) - len(table)} problem ids occur more than once")
    return table
