"""An evaluation's samples under another verifier, as an evaluation folder of its own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_sgopd.atomic_files import read_json_lines, write_json, write_json_lines
from megatron_sgopd.config.load import to_yaml
from megatron_sgopd.config.schema import Config
from megatron_sgopd.evaluation.folder import (
    conflicts,
    label,
    problems_path,
    read_records,
    read_settings,
    score,
)
from megatron_sgopd.evaluation.samples import merge_journals, read_samples
from megatron_sgopd.verifier import VerifierPool


def rescore_folder(folder: Path, out: Path, config: Config) -> dict[str, Any]:
    """Labels every sample of `folder` anew by `config.verifier`; the summary of `out`.

    Raises:
        ValueError: an evaluation that is not finished, a verifier that cannot be had, or an `out`
            with samples of another evaluation.
    """
    settings, v = read_settings(folder), config.verifier
    read_records(folder)  # finished, or says what is missing
    if (out / "settings.json").is_file():
        there = read_settings(out) | {"verifier": settings["verifier"]}
        if clash := conflicts(there, settings):
            raise ValueError(
                f"{out} holds other samples (there and now: {'; '.join(clash)}): give another --out"
            )
    scoring = {"k": config.evaluation.k, "bootstrap_samples": config.evaluation.bootstrap_samples}
    settings |= {"verifier": v.name, "scoring": {**settings["scoring"], **scoring}}
    with VerifierPool(v.name, v.timeout_s, v.num_workers, v.memory_mb) as verifier:
        for name in settings["benchmarks"]:
            problems = list(read_json_lines(problems_path(folder, name)))
            rows = read_samples(folder, name)
            with tqdm(total=len(rows), desc=name, unit="answer", file=sys.stderr) as bar:
                answers = {p["id"]: p["answer"] for p in problems}
                label(list(rows.values()), answers, verifier, bar.update)
            write_json_lines(problems_path(out, name), problems)
            merge_journals(out, name, problems, rows)
    (out / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    write_json(out / "settings.json", settings)
    return score(out)
