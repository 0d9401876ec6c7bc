"""Writes and reads evaluation folders, scores them, and compares two of them.

A folder has `settings.json` (what its samples depend on), `problems/NAME.jsonl`,
`samples/NAME.jsonl` (see `samples`) and `summary.json`. Scores need nothing else: no engine, no
model, no benchmark file. `sgopd evaluate` leaves one, and a training run one for each of its full
evaluations, `RUN_DIR/evaluation/{start,final}`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_sgopd.atomic_files import (
    begin_folder,
    finish_folder,
    read_json_lines,
    write_json,
    write_json_lines,
)
from megatron_sgopd.config.evaluation import samples_per_problem
from megatron_sgopd.config.schema import Config
from megatron_sgopd.evaluation.accuracy import (
    Record,
    by_benchmark,
    greedy_marks,
    mean_over_benchmarks,
    paired_difference,
    problem_accuracies,
    problem_pass_rates,
    summarize_benchmarks,
)
from megatron_sgopd.evaluation.benchmarks import Benchmark
from megatron_sgopd.evaluation.samples import (
    GREEDY,
    Key,
    Row,
    merge_journals,
    read_samples,
    records,
)
from megatron_sgopd.verifier import VerifierPool

Settings = dict[str, Any]
SAID = ("engine", "engine_version", "dtype", "seed")  # of which a comparison says that they differ
IDENTITY = ("name", "model", "verifier", *SAID, "sampling")  # of the settings, kept in the summary


def read_settings(folder: Path) -> Settings:
    """Raises ValueError where the folder holds no evaluation."""
    path = folder / "settings.json"
    try:
        settings: Settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(
            f"{folder} holds no evaluation (no settings.json): give a folder that `sgopd evaluate` "
            "left, or the folder of a training run that evaluated its student at the end"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    return settings


def evaluation_folder(folder: Path) -> Path:
    """Returns the folder itself, or of a training run that of its last evaluation."""
    final = folder / "evaluation" / "final"
    of_a_run = not (folder / "settings.json").is_file() and (final / "settings.json").is_file()
    return final if of_a_run else folder


def make_settings(
    config: Config,
    *,
    model: Mapping[str, str],
    stop_token_ids: Sequence[int],
    benchmarks: Sequence[Benchmark],
    engine_version: str | None,
) -> Settings:
    """Collects what the answers of an evaluation depend on.

    Args:
        model: `path` and `content`, something that changes with the weights.
    """
    e, data = config.evaluation, config.data
    return {
        "name": config.name,
        "model": dict(model),
        "engine": config.rollout.engine,
        "engine_version": engine_version,
        "dtype": config.model.dtype,
        "seed": config.seed,
        "verifier": config.verifier.name,
        "sampling": {
            "temperature": e.temperature,
            "top_p": e.top_p,
            "top_k": e.top_k,
            "min_p": e.min_p,
            "max_new_tokens": e.max_new_tokens,
            "stop_token_ids": list(stop_token_ids),
        },
        "prompting": {
            "chat_template": data.chat_template,
            "chat_template_kwargs": data.chat_template_kwargs,
            "system_prompt": data.system_prompt,
            "prompt_suffix": data.prompt_suffix,
        },
        "scoring": {
            "n": samples_per_problem(e),
            "k": e.k,
            "greedy": e.greedy,
            "bootstrap_samples": e.bootstrap_samples,
        },
        "benchmarks": {b.name: {"file": b.file, **b.identity()} for b in benchmarks},
    }


def write_evaluation(
    folder: Path,
    settings: Settings,
    benchmarks: Sequence[Benchmark],
    rows: Mapping[str, Mapping[Key, Row]],
) -> dict[str, Any]:
    """Writes a finished evaluation, its folder whole or not at all; returns its summary.

    Args:
        rows: verified answers by benchmark.
    """
    temporary = begin_folder(folder)
    write_json(temporary / "settings.json", settings)
    for benchmark in benchmarks:
        write_json_lines(problems_path(temporary, benchmark.name), benchmark.problems)
        merge_journals(temporary, benchmark.name, benchmark.problems, rows[benchmark.name])
    summary = score(temporary)
    finish_folder(folder)
    return summary


def resumable(settings: Settings) -> dict[str, Any]:
    """Returns what samples depend on: all of it must be the same to go on with an evaluation."""
    kept = {key: settings[key] for key in ("engine", "dtype", "seed", "verifier")}
    model = {"the model's content": settings["model"]["content"]}
    sets = settings.get("others", {}) | settings["benchmarks"]
    prompts = {f"the prompts of {name}": b["prompts"] for name, b in sets.items()}
    return {**model, **kept, **_under(settings, "sampling", "prompting"), **prompts}


def conflicts(there: Settings, now: Settings) -> list[str]:
    """Why samples made under `there` are not those of `now`, a phrase each.

    Benchmarks may come and go: each has its own samples.
    """
    before, after = resumable(there), resumable(now)
    lacking = {key for key in before.keys() ^ after.keys() if key.startswith("the prompts of ")}
    return changes(*({k: v for k, v in s.items() if k not in lacking} for s in (before, after)))


def comparable(settings: Settings) -> dict[str, Any]:
    """Returns what the evaluations of two models must share to be compared."""
    kept = {"verifier": settings["verifier"]}
    kept |= {key: settings["scoring"][key] for key in ("n", "k")}
    kept |= _under(settings, "sampling", "prompting")
    del kept["sampling.stop_token_ids"]  # the models' own
    sets = settings["benchmarks"]
    return {**kept, **{f"the problems of {name}": b["problems"] for name, b in sets.items()}}


def _under(settings: Settings, *sections: str) -> dict[str, Any]:
    return {f"{s}.{key}": value for s in sections for key, value in settings[s].items()}


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns what differs, a phrase each."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        if key not in before or key not in now:
            found.append(f"{key}: {'the second' if key in now else 'the first'} alone has them")
        elif before[key] != now[key]:
            found.append(f"{key}: {before[key]!r} and {now[key]!r}")
    return found


def problems_path(folder: Path, benchmark: str) -> Path:
    return folder / "problems" / f"{benchmark}.jsonl"


def label(
    rows: Sequence[Row],
    answers: Mapping[str, str],
    verifier: VerifierPool,
    advance: Callable[[int], object] = lambda count: None,
) -> None:
    """Sets `is_correct` of each row; what was cut off by the length limit is wrong."""
    pairs = ((row["completion"], answers[row["id"]]) for row in rows)
    for index, verdict in verifier.verify_iter(pairs):
        row = rows[index]
        row["is_correct"] = verdict.is_correct and row["finish_reason"] == "stop"
        advance(1)


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of a finished evaluation, of all its benchmarks.

    Raises:
        ValueError: the folder holds none, or one that is not finished.
    """
    settings = read_settings(folder)
    n, greedy = settings["scoring"]["n"], settings["scoring"]["greedy"]
    out = []
    for name in settings["benchmarks"]:
        problems = list(read_json_lines(problems_path(folder, name)))
        rows = read_samples(folder, name)
        wanted = [(p["id"], i) for p in problems for i in wanted_samples(n, greedy)]
        there = sum("is_correct" in rows.get(key, {}) for key in wanted)
        if there < len(wanted) or not problems:
            raise ValueError(
                f"{folder} is not finished ({name}: {there} of {len(wanted)} answers): run its "
                "`sgopd evaluate` again, which goes on where it stopped"
            )
        out += records(problems, rows, n=n, greedy=greedy, benchmark=name)
    return out


def wanted_samples(n: int, greedy: bool) -> list[int]:
    return [*([GREEDY] if greedy else []), *range(n)]


def score(folder: Path) -> dict[str, Any]:
    """Writes summary.json of a finished evaluation, and returns it."""
    settings = read_settings(folder)
    scoring = settings["scoring"]
    summary = {
        **{key: settings[key] for key in IDENTITY},
        **summarize_benchmarks(
            read_records(folder),
            scoring["k"],
            bootstrap_samples=scoring["bootstrap_samples"],
            seed=settings["seed"],
        ),
    }
    write_json(folder / "summary.json", summary)
    return summary


def compare(first: Path, second: Path) -> dict[str, Any]:
    """The first less the second, paired by problem: of each benchmark, and of their mean.

    Raises:
        ValueError: an evaluation that is not finished, or what the two do not share.
    """
    first, second = evaluation_folder(first), evaluation_folder(second)
    one, other = read_settings(first), read_settings(second)
    if clash := changes(comparable(one), comparable(other)):
        raise ValueError(
            f"{first} and {second} cannot be compared ({'; '.join(clash)}): evaluate both models "
            "under the same settings on the same problems"
        )
    first_records, second_records = read_records(first), read_records(second)
    scoring = one["scoring"]
    of: dict[str, Callable[[Sequence[Record]], Any]] = {
        "avg_at_k": problem_accuracies,
        "pass_at_k": lambda records: problem_pass_rates(records, scoring["k"]),
    }
    if scoring["greedy"] and other["scoring"]["greedy"]:
        of["greedy"] = greedy_marks
    sets = by_benchmark(second_records)

    def differences(a: Sequence[Record], b: Sequence[Record]) -> dict[str, Any]:
        return {
            name: _difference(a, b, values, scoring["bootstrap_samples"], one["seed"])
            for name, values in of.items()
        }

    return {
        "first": {"folder": str(first), "name": one["name"], "model": one["model"]},
        "second": {"folder": str(second), "name": other["name"], "model": other["model"]},
        "k": scoring["k"],
        "num_samples": scoring["n"],
        "notes": changes(*({key: s[key] for key in SAID} for s in (one, other))),
        **differences(first_records, second_records),
        "benchmarks": {
            name: differences(group, sets[name])
            for name, group in by_benchmark(first_records).items()
        },
    }


def _difference(
    a: Sequence[Record],
    b: Sequence[Record],
    of: Callable[[Sequence[Record]], Any],
    bootstrap_samples: int,
    seed: int,
) -> dict[str, Any]:
    found = paired_difference(a, b, of=of, bootstrap_samples=bootstrap_samples, seed=seed)
    first, second = (mean_over_benchmarks(records, of) for records in (a, b))
    return {
        "first": first,
        "second": second,
        "difference": found.mean,
        "ci95": list(found.ci95),
        "separated": found.separated,
    }
