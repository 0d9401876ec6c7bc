"""The layouts that must give the numbers of one rank, as data.

`python -m tests.support.matrix` measures them and prints the table of the log.

Every row is a StepCase's fields. Models: a student of 5 layers (which 2 and 4 stages cannot share
equally), a teacher of other width and depth with the other kind of head. Rollouts: 8, ragged.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tests.support import step_cases
from tests.support.pool import Pool
from tests.support.step_cases import StepCase
from tests.support.tiny import make_hf_dir

VOCAB = 37
# What the seeds exercise in the short form; the long form takes every combination.
ESTIMATORS = ("sampled", "full_vocab")
AGGREGATIONS = ("seq_mean_token_mean", "token_mean")
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Row:
    name: str
    world: int
    fields: tuple[tuple[str, Any], ...]

    def case(self, models: dict[bool, StepCase], tied: bool, **problem: Any) -> StepCase:
        return replace(models[tied], **dict(self.fields), **problem)


def row(
    name: str,
    world: int,
    *,
    tp: int = 1,
    pp: int = 1,
    vpp: int | None = None,
    cp: int = 1,
    sp: bool = False,
    packed: int | None = None,
    distopt: bool = False,
    overlap: bool = False,
    teacher: tuple[int, int] | None = None,
    offload: bool = False,
    budget_mb: float | None = None,
    forward_only_first: bool = False,
    **parallel: Any,
) -> Row:
    """`teacher`: (TP, PP) of teacher and reference."""
    layout = {
        "pipeline_model_parallel_size": pp,
        "virtual_pipeline_model_parallel_size": vpp,
        "context_parallel_size": cp,
        "sequence_parallel": sp,
        "micro_batch_tokens": packed,
        "use_distributed_optimizer": distopt,
        "overlap_grad_reduce": overlap,
        "overlap_param_gather": overlap and distopt,
        "hidden_states_budget_mb": budget_mb,
        **parallel,
    }
    frozen: dict[str, Any] = {"offload": offload}
    if teacher is not None:
        frozen["tensor_model_parallel_size"], frozen["pipeline_model_parallel_size"] = teacher
    fields = {
        "tp": tp,
        "parallel": tuple(layout.items()),
        "frozen": tuple(frozen.items()),
        "offload_optimizer": offload,
        "forward_only_first": forward_only_first,
    }
    return Row(name, world, tuple(fields.items()))


ROWS = [
    row("one rank", 1),
    row("packed", 1, packed=70),
    row("full recompute", 1, recompute_granularity="full"),
    row("full recompute by blocks", 1, recompute_granularity="full", recompute_method="block"),
    row(
        "selective recompute, packed",
        1,
        packed=70,
        recompute_granularity="selective",
        recompute_modules=["core_attn", "mlp"],
    ),
    row("offload, no room for hidden states, packed", 1, packed=70, offload=True, budget_mb=0.0),
    row("TP2", 2, tp=2),
    row("TP2, offload, packed", 2, tp=2, packed=70, offload=True, budget_mb=0.01),
    row("TP2 + SP", 2, tp=2, sp=True),
    row("TP2 + SP, packed", 2, tp=2, sp=True, packed=70),
    row("TP2 + SP, full recompute", 2, tp=2, sp=True, recompute_granularity="full"),
    row("PP2", 2, pp=2),
    row("PP2, packed", 2, pp=2, packed=70),
    row("PP2 x VPP2", 2, pp=2, vpp=2),
    row(
        "PP2 x VPP2, packed, full recompute",
        2,
        pp=2,
        vpp=2,
        packed=70,
        recompute_granularity="full",
    ),
    row("DP2", 2),
    row("DP2, packed", 2, packed=70),
    row("DP2, overlapped", 2, overlap=True),
    row("DP2, distributed optimizer", 2, distopt=True),
    row("DP2, distributed optimizer, offload", 2, distopt=True, offload=True),
    row("DP2, distributed optimizer, overlapped", 2, distopt=True, overlap=True),
    # The head's gradient is written by the loss itself, and forward-only passes write none.
    row("forward-only passes between", 1, forward_only_first=True),
    row("TP2 + SP, forward-only passes between", 2, tp=2, sp=True, forward_only_first=True),
    row("PP2, forward-only passes between", 2, pp=2, forward_only_first=True),
    row(
        "DP2, distributed optimizer, overlapped, forward-only passes between",
        2,
        distopt=True,
        overlap=True,
        forward_only_first=True,
    ),
    row(
        "TP2 x PP2 + SP, overlapped, forward-only passes between",
        4,
        tp=2,
        pp=2,
        sp=True,
        overlap=True,
        forward_only_first=True,
    ),
    row(
        "DP2 x TP2 + SP, distributed optimizer, overlapped",
        4,
        tp=2,
        sp=True,
        distopt=True,
        overlap=True,
    ),
    row("CP2", 2, cp=2),
    row("CP2, packed", 2, cp=2, packed=70),
    row("CP2, packed, distributed optimizer", 2, cp=2, packed=70, distopt=True),
    row("TP2, teacher TP1", 2, tp=2, teacher=(1, 1)),
    row("TP2, teacher PP2, packed", 2, tp=2, packed=70, teacher=(1, 2)),
    row("PP2, teacher TP2", 2, pp=2, teacher=(2, 1)),
    row("PP2 x VPP2, teacher TP2", 2, pp=2, vpp=2, teacher=(2, 1)),
    row("PP2 x VPP2, teacher PP2 alone", 2, pp=2, vpp=2, teacher=(1, 2)),
    row("CP2, teacher TP2, packed", 2, cp=2, packed=70, teacher=(2, 1)),
    row("DP2 x TP2", 4, tp=2),
    row("DP2 x TP2 + SP, distributed optimizer", 4, tp=2, sp=True, distopt=True),
    row("DP2 x PP2, distributed optimizer, overlapped", 4, pp=2, distopt=True, overlap=True),
    row(
        "DP2 x PP2 x VPP2, the same, packed", 4, pp=2, vpp=2, packed=70, distopt=True, overlap=True
    ),
    row("DP2 x CP2, packed, distributed optimizer", 4, cp=2, packed=80, distopt=True),
    row("TP2 x PP2", 4, tp=2, pp=2),
    row("TP2 x PP2 + SP, packed", 4, tp=2, pp=2, sp=True, packed=70),
    row("TP2 x PP2 x VPP2 + SP", 4, tp=2, pp=2, vpp=2, sp=True),
    row("TP2 x CP2 + SP, packed", 4, tp=2, cp=2, sp=True, packed=80),
    row("PP2 x CP2, packed", 4, pp=2, cp=2, packed=80),
    row("PP2 x VPP2 x CP2", 4, pp=2, vpp=2, cp=2),
    row("PP4", 4, pp=4),
    row("CP4", 4, cp=4),
    row("TP2 x PP2, teacher TP2 PP1", 4, tp=2, pp=2, teacher=(2, 1)),
    row(
        "TP2 x PP2 + SP, teacher TP1 PP1, packed", 4, tp=2, pp=2, sp=True, packed=70, teacher=(1, 1)
    ),
    row("TP2 x PP2, teacher TP1 PP4", 4, tp=2, pp=2, teacher=(1, 4)),
]


def make_models(folder: Path) -> dict[bool, StepCase]:
    """tied? -> a case of that student."""
    cases = {}
    for tied in (False, True):
        paths = {
            "student": make_hf_dir(
                folder / f"student-{tied}", 11, layers=5, vocab=VOCAB, tied=tied
            ),
            "teacher": make_hf_dir(
                folder / f"teacher-{tied}", 12, layers=4, hidden=96, vocab=VOCAB, tied=not tied
            ),
            "reference": make_hf_dir(
                folder / f"reference-{tied}", 13, layers=5, vocab=VOCAB, tied=tied
            ),
        }
        cases[tied] = StepCase(**{k: str(v) for k, v in paths.items()}, vocab=VOCAB)
    return cases


def problems(index: int, *, long: bool) -> Iterator[tuple[bool, dict[str, Any]]]:
    """(tied, problem) of a row: both estimators, aggregations and heads over the three seeds."""
    every = itertools.product((False, True), ESTIMATORS, AGGREGATIONS, SEEDS)
    if long:
        for tied, estimator, aggregation, seed in every:
            yield tied, {"estimator": estimator, "aggregation": aggregation, "seed": seed}
        return
    for seed in SEEDS:
        turn = seed + index
        problem = {
            "estimator": ESTIMATORS[seed % 2],
            "aggregation": AGGREGATIONS[turn // 2 % 2],
            "seed": seed,
        }
        yield turn % 2 == 1, problem


def main() -> None:
    parser = argparse.ArgumentParser(description="Prints the equality matrix as a Markdown table.")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    chosen = parser.parse_args().only
    print("| ranks | layout | loss | worst gradient | weights after a step / lr | gradient norm |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        for world, rows in itertools.groupby(enumerate(ROWS), lambda entry: entry[1].world):
            pool = Pool(world)
            for index, each in rows:
                if chosen in each.name:
                    print(_line(pool, each, index, models), flush=True)
            pool.close()


def _line(pool: Pool, each: Row, index: int, models: dict[bool, StepCase]) -> str:
    got: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    for tied, problem in problems(index, long=False):
        case = each.case(models, tied, **problem)
        expected = step_cases.expected(case)
        got += pool.run(step_cases.gradient_errors, case, expected)
        steps += pool.run(step_cases.step_errors, case, expected)
    loss = max(g["loss"] for g in got)
    gradient = max(max(g["gradients"].values()) for g in got)
    weights, norm = (max(s[k] for s in steps) for k in ("weights", "grad_norm"))
    return (
        f"| {each.world} | {each.name} | {loss:.1e} | {gradient:.1e} | {weights:.1e} | {norm:.1e} |"
    )


if __name__ == "__main__":
    main()
