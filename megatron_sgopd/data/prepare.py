"""A data set's files -> problems fit to train or evaluate on, rejected rows with their reasons.

Enter: `Job`. Leaves: `Prepared`, whose three files `write` puts beside each other. The order of the
checks is the order of the reasons: a row is rejected for the first that applies. Everything but the
progress bars is a function of the inputs and options alone, not of the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from megatron_sgopd.data.canonical_text import canonical
from megatron_sgopd.data.contamination import (
    MIN_OVERLAP,
    NGRAM_WORDS,
    BenchmarkProblem,
    Benchmarks,
)
from megatron_sgopd.data.known_sets import SETS, Entry, PromptSet, TooEasy, read_entries
from megatron_sgopd.data.rows import REJECTS, BadRow, count_rows, files_of
from megatron_sgopd.verifier import Verdict, VerifierPool
from megatron_sgopd.versions import installed

MAX_PROBLEM_CHARS = 20_000
ORDINARY = ("duplicate", "contaminated")  # rejected even from a set without a fault
VERSIONS = ("megatron_sgopd", "math-verify", "latex2sympy2_extended", "sympy", "pyarrow")
_EXCERPT_CHARS = 200

Bar = Callable[[Iterable[Any], str, int], Iterable[Any]]  # (items, what is done, how many)


@dataclass(frozen=True)
class Job:
    """Describes what is to be done; every field but the last two can change the outcome."""

    prompt_set: PromptSet
    paths: Sequence[str]  # files, folders or hub names
    against: Sequence[str] = ()  # see `read_benchmarks`
    ngram_words: int = NGRAM_WORDS
    min_overlap: float = MIN_OVERLAP
    max_problem_chars: int = MAX_PROBLEM_CHARS
    verifier: str = "math_verify"
    timeout_s: float = 5.0
    memory_mb: int = 2048
    strict: bool = False  # stop at the first row with a fault
    num_workers: int = 2


@dataclass(frozen=True)
class Reject:
    """A row that is left out. `rows` counts the repeats that one line stands for."""

    where: str
    reason: str
    detail: str
    entry: Entry | None = None
    field: str | None = None
    rows: int = 1

    def record(self) -> dict[str, Any]:
        known: dict[str, Any] = {"where": self.where, "reason": self.reason, "detail": self.detail}
        if self.field is not None:
            known["field"] = self.field
        if self.rows > 1:
            known["rows"] = self.rows
        if self.entry is not None:
            # Not named problem and answer, so that nothing takes this file for a data set.
            known["id"] = self.entry.id
            known["problem_begins"] = self.entry.problem[:_EXCERPT_CHARS]
            known["answer_begins"] = self.entry.answer[:_EXCERPT_CHARS]
        return known


@dataclass
class Prepared:
    entries: list[Entry]
    rejects: list[Reject]
    read: int
    too_easy: int
    hits: dict[str, int]  # benchmark -> contaminated problems
    sources: list[dict[str, Any]]
    against: list[dict[str, Any]]

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> rows, most first."""
        counts: Counter[str] = Counter()
        for reject in self.rejects:
            counts[reject.reason] += reject.rows
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def prepare(job: Job, bar: Bar) -> Prepared:
    """Read, deduplicate, decontaminate, verify.

    Raises:
        ValueError: a file that cannot be read, a benchmark with a bad row, no rows at all, or with
            `strict` the first row with a fault.
    """
    files = _files(job)
    sources = [_source(label, file) for label, file in files]
    found, against = read_benchmarks(job.against)
    benchmarks = Benchmarks(found, job.ngram_words, job.min_overlap)
    total = sum(source["rows"] for source in sources)
    rows = chain.from_iterable(read_entries(job.prompt_set, f, label) for label, f in files)
    ledger = _Ledger(job)
    with VerifierPool(job.verifier, job.timeout_s, job.num_workers, job.memory_mb) as pool:
        for row in bar(rows, "reading", total):
            ledger.take(row)
        if not ledger.read:
            raise ValueError(f"{', '.join(job.paths)} holds no rows")
        entries = ledger.distinct(pool)
        entries, hits = _decontaminated(entries, benchmarks, ledger, bar)
        entries = _verified(entries, pool, ledger, bar)
    return Prepared(entries, ledger.rejects, ledger.read, ledger.too_easy, hits, sources, against)


def _files(job: Job) -> list[tuple[str, Path]]:
    """(label, file) of the sources, each label once: a place in them must mean one row."""
    files = [pair for path in job.paths for pair in files_of(path, job.prompt_set.split)]
    resolved = Counter(file.resolve() for _, file in files)
    twice = [file for _, file in files if resolved[file.resolve()] > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    labels = Counter(label for label, _ in files)
    return [(label if labels[label] == 1 else str(file), file) for label, file in files]


def read_benchmarks(
    against: Sequence[str],
) -> tuple[list[BenchmarkProblem], list[dict[str, Any]]]:
    """The problems of benchmarks, and where they are from.

    Each is a file prepared before, a set of the table (from the hub), or SET=FILE_OR_FOLDER.

    Raises:
        ValueError: none of these, or any bad row: a benchmark problem that is not read would be
            one that is not looked for.
    """
    problems: list[BenchmarkProblem] = []
    sources: list[dict[str, Any]] = []
    for given in against:
        name, _, path = given.partition("=")
        if name in SETS and (path or not Path(given).exists()):
            prompt_set = replace(SETS[name], min_difficulty=None)
            path = path or prompt_set.hub or ""
        elif Path(given).is_file():
            prompt_set, path = replace(SETS["prepared"], name=Path(given).stem), given
        else:
            raise ValueError(
                f"benchmark {given} is neither a file nor a set: give a prepared .jsonl, one of "
                f"{', '.join(SETS)}, or SET=FILE_OR_FOLDER"
            )
        before = len(problems)
        for label, file in files_of(path, prompt_set.split):
            sources.append(_source(label, file))
            for row in read_entries(prompt_set, file, label):
                if isinstance(row, BadRow):
                    raise row
                if isinstance(row, Entry):
                    problems.append(BenchmarkProblem(row.id, row.source, row.problem))
        if len(problems) == before:
            raise ValueError(f"benchmark {given} holds no rows")
    return problems, sources


def _source(label: str, file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"file": label, "sha256": digest, "rows": count_rows(file)}


def _options(job: Job) -> dict[str, Any]:
    kept = asdict(job)
    for name in ("paths", "against", "num_workers"):  # in the sources; without influence
        del kept[name]
    return kept


@dataclass
class _Answer:
    """One of the answers that a problem is given with."""

    entry: Entry  # the first row
    rows: int = 1
    repeat: str = ""  # where the second one stands


class _Ledger:
    """The rows that are still in, each problem once, and those that were rejected."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.read = self.too_easy = 0
        self.rejects: list[Reject] = []
        self._groups: dict[str, dict[str, _Answer]] = {}  # canonical problem -> answer

    def reject(self, reject: Reject) -> None:
        if self.job.strict and reject.reason not in ORDINARY:
            raise ValueError(f"{reject.where}: {reject.detail} ({reject.reason}; --strict)")
        self.rejects.append(reject)

    def take(self, row: Entry | BadRow | TooEasy) -> None:
        self.read += 1
        if isinstance(row, TooEasy):
            self.too_easy += 1
        elif isinstance(row, BadRow):
            self.reject(Reject(row.where, row.reason, row.message, field=row.field))
        elif len(row.problem) > self.job.max_problem_chars:
            field = self.job.prompt_set.problem
            most = self.job.max_problem_chars
            detail = f"field {field!r} has {len(row.problem)} characters, at most {most} are taken"
            short = replace(row, problem=row.problem[:_EXCERPT_CHARS])
            self.reject(Reject(row.where, "too_long", detail, short, field))
        else:
            answers = self._groups.setdefault(canonical(row.problem), {})
            answer = answers.get(row.answer)
            if answer is None:
                answers[row.answer] = _Answer(row)
            else:
                answer.rows += 1
                answer.repeat = answer.repeat or row.where

    def distinct(self, pool: VerifierPool) -> list[Entry]:
        """Each problem once, in the order of their first rows.

        Answers spelled differently are compared by the verifier. Where they differ no row stays:
        nothing here can tell which is right.
        """
        others = [
            (other.entry, first.entry)
            for first, *rest in (list(answers.values()) for answers in self._groups.values())
            for other in rest
        ]
        verdicts = pool.verify_many([(_boxed(a.answer), b.answer) for a, b in others])
        differing = {
            entry.where
            for (entry, _), verdict in zip(others, verdicts, strict=True)
            if not verdict.is_correct
        }
        kept: list[Entry] = []
        ids: dict[str, str] = {}
        for answers in self._groups.values():
            first, *rest = answers.values()
            if any(other.entry.where in differing for other in rest):
                self._reject_conflict([first, *rest])
                continue
            self._reject_repeats(first, rest)
            entry = first.entry
            if entry.id in ids:
                detail = f"id {entry.id!r} is also that of {ids[entry.id]}, another problem"
                field = self.job.prompt_set.id
                self.reject(Reject(entry.where, "duplicate_id", detail, entry, field))
                continue
            ids[entry.id] = entry.where
            kept.append(entry)
        return kept

    def _reject_conflict(self, answers: list[_Answer]) -> None:
        said = ", ".join(f"{a.entry.answer[:40]!r} at {a.entry.where}" for a in answers[:8])
        for answer in answers:
            detail = f"one problem with different answers: {said}"
            entry, field = answer.entry, self.job.prompt_set.answer
            self.reject(Reject(entry.where, "conflict", detail, entry, field, answer.rows))

    def _reject_repeats(self, first: _Answer, rest: list[_Answer]) -> None:
        detail = f"the problem and answer of {first.entry.where}"
        if first.rows > 1:
            rows = first.rows - 1
            self.reject(Reject(first.repeat, "duplicate", detail, first.entry, rows=rows))
        for other in rest:
            self.reject(
                Reject(other.entry.where, "duplicate", detail, other.entry, rows=other.rows)
            )


def _boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def _decontaminated(
    entries: list[Entry], benchmarks: Benchmarks, ledger: _Ledger, bar: Bar
) -> tuple[list[Entry], dict[str, int]]:
    """Returns those that are no benchmark's, and how many are, by benchmark."""
    clean: list[Entry] = []
    hits: Counter[str] = Counter()
    for entry in bar(entries, "decontaminating", len(entries)):
        hit = benchmarks.hit(entry.problem)
        if hit is None:
            clean.append(entry)
            continue
        hits[hit.of.benchmark] += 1
        detail = (
            f"{hit.of.id} of {hit.of.benchmark}: {hit.overlap:.2f} of the words in common, "
            f"with {hit.evidence!r}"
        )
        ledger.reject(Reject(entry.where, "contaminated", detail, entry))
    return clean, dict(sorted(hits.items()))


def _verified(entries: list[Entry], pool: VerifierPool, ledger: _Ledger, bar: Bar) -> list[Entry]:
    """Returns those whose answer, in a box, the verifier takes for itself."""
    pairs = ((_boxed(entry.answer), entry.answer) for entry in entries)
    verdicts: dict[int, Verdict] = dict(bar(pool.verify_iter(pairs), "verifying", len(entries)))
    verified: list[Entry] = []
    for index, entry in enumerate(entries):
        if verdicts[index].is_correct:
            verified.append(entry)
            continue
        detail = f"the answer does not verify against itself: {verdicts[index].reason}"
        field = ledger.job.prompt_set.answer
        ledger.reject(Reject(entry.where, "unverified", detail, entry, field))
    return verified


# -- files -----------------------------------------------------------------------------------------


def outputs(out: Path) -> tuple[Path, Path, Path]:
    """OUT.jsonl, OUT.rejects.jsonl, OUT.manifest.json. Raises ValueError for another ending."""
    if out.suffix != ".jsonl":
        raise ValueError(f"the output is {out}, a name that ends in .jsonl is wanted")
    return out, out.with_suffix(REJECTS), out.with_suffix(".manifest.json")


def write(prepared: Prepared, job: Job, out: Path, *, overwrite: bool) -> str:
    """The three files, each whole or not at all, `out` last; returns the sha256 of `out`.

    Without a problem left only the rejects are written.

    Raises:
        ValueError: a file is there with another content and `overwrite` is not given, or no
            problem is left.
    """
    target, rejects, manifest = outputs(out)
    content = _jsonl(entry.record() for entry in prepared.entries)
    rejected = _jsonl(reject.record() for reject in prepared.rejects)
    digest = hashlib.sha256(content).hexdigest()
    about = {
        "sha256": digest,
        "rejects_sha256": hashlib.sha256(rejected).hexdigest(),
        "counts": {
            "read": prepared.read,
            "kept": len(prepared.entries),
            "below_min_difficulty": prepared.too_easy,
            "rejected": prepared.reasons,
            "contaminated_by": prepared.hits,
        },
        "sources": prepared.sources,
        "against": prepared.against,
        "options": _options(job),
        "versions": {name: installed(name) for name in VERSIONS},
    }
    described = (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()
    contents = {rejects: rejected, manifest: described, target: content}
    if not prepared.entries:
        contents = {rejects: rejected}
    other = [p for p, data in contents.items() if p.exists() and p.read_bytes() != data]
    if other and not overwrite:
        raise ValueError(
            f"{other[0]} is there with another content: choose another output, or --overwrite"
        )
    _write_all(contents)
    if not prepared.entries:
        first = next(iter(prepared.rejects), None)
        why = f": {first.where}: {first.detail}; all are in {rejects}" if first else ""
        raise ValueError(f"none of {prepared.read} rows is left{why}")
    return digest


def _jsonl(records: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records).encode()


def _write_all(contents: dict[Path, bytes]) -> None:
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}.tmp") for path in contents}
    try:
        for path, data in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary[path].write_bytes(data)
        for path in contents:
            temporary[path].replace(path)
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)
