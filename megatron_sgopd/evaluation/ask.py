"""The answers of what an engine holds to benchmarks: who asks for which, and what is kept of them.

The trainer's evaluations and `sgopd evaluate` (`job`) both ask through `answer`. Replicas share the
tasks; a task is one answer to one problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

from megatron_sgopd.distributed.groups import any_rank, broadcast_object, gather_objects
from megatron_sgopd.evaluation.benchmarks import Benchmark
from megatron_sgopd.evaluation.samples import GREEDY, Key, Row, join, records
from megatron_sgopd.rollouts.engine_jobs import Jobs
from megatron_sgopd.rollouts.sampler import Sampler, request_seed
from megatron_sgopd.types import Completion, Engine, EngineLost, Prompt, Request

EVALUATION_SEED = 42  # as in the paper's protocol: the same samples' seeds for every model
AT_ONCE = 512  # answers of an engine that gives them together: bounded memory, a bar that moves

Task = tuple[str, Prompt, int]  # (benchmark, problem, sample)
Keep = Callable[[str, Row], None]  # (benchmark, an answer or its verdict), as `samples` has them


def evaluate(
    sampler: Sampler,
    engine: Engine,
    benchmarks: Sequence[Benchmark],
    *,
    n: int,
    greedy: bool,
    jobs: Jobs,
    advance: Callable[[int], object] = lambda count: None,
) -> dict[str, dict[Key, Row]]:
    """Returns the verified answers by benchmark, on every rank (see `samples`). Collective.

    `advance` is called with counts of this replica's answers as they are verified.
    """
    kept: list[tuple[str, Row]] = []
    tasks = tasks_of(benchmarks, n, greedy)
    answer(sampler, engine, tasks, jobs, lambda *row: kept.append(row), advance=advance)
    groups = sampler.groups
    own = broadcast_object(kept, groups)
    everything = list(chain.from_iterable(gather_objects(own, groups.dp_group)))
    return {b.name: join(row for name, row in everything if name == b.name) for b in benchmarks}


def records_of(
    benchmarks: Iterable[Benchmark], rows: Mapping[str, Mapping[Key, Row]], n: int, greedy: bool
) -> list[dict[str, Any]]:
    """Returns one record a problem, in order, for `accuracy`."""
    return [
        record
        for b in benchmarks
        for record in records(b.problems, rows[b.name], n=n, greedy=greedy, benchmark=b.name)
    ]


def tasks_of(benchmarks: Iterable[Benchmark], n: int, greedy: bool) -> list[Task]:
    samples = [*([GREEDY] if greedy else []), *range(n)]
    return [(b.name, p, i) for b in benchmarks for p in b.prompts for i in samples]


def answer(
    sampler: Sampler,
    engine: Engine,
    tasks: Sequence[Task],
    jobs: Jobs,
    keep: Keep,
    *,
    advance: Callable[[int], object] = lambda count: None,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Asks for every task, once. Collective over all ranks.

    `keep` is called on the replica's first rank, with an answer as it comes and with its verdict.
    Seeds come from EVALUATION_SEED, the run's seed, the problem's id and the sample: two models
    evaluated under one seed draw the same uniforms, on any layout. Where `stopped` says so, between
    two answers or parts, the rest is left.
    """
    groups = sampler.groups
    share = tasks[groups.dp_rank :: groups.dp_size]
    largest = -(-len(tasks) // groups.dp_size)  # every replica runs as many jobs
    at_once = AT_ONCE if sampler.every_rank else max(1, largest)
    for start in range(0, largest, at_once):
        if any_rank(stopped(), groups):
            return
        part = _Part(sampler, engine, share[start : start + at_once], keep, advance, stopped)
        jobs.run(part.run)


class _Part:
    """One job. Run again after the end of an engine, it asks for what is left."""

    def __init__(
        self,
        sampler: Sampler,
        engine: Engine,
        tasks: Sequence[Task],
        keep: Keep,
        advance: Callable[[int], object],
        stopped: Callable[[], bool],
    ) -> None:
        self._sampler, self._engine, self._keep = sampler, engine, keep
        self._advance, self._stopped = advance, stopped
        self._left = dict(enumerate(tasks))
        self._lost: EngineLost | None = None

    def run(self) -> None:
        """Raises EngineLost when what came before it has its verdicts."""
        self._lost = None
        asked = list(self._left.items())
        tasks = [task for _, task in asked]
        arriving = self._arriving([i for i, _ in asked], tasks)
        prompts = [prompt for _, prompt, _ in tasks]
        for index, rollout in self._sampler.labelled(prompts, arriving, "student"):
            name, prompt, sample = tasks[index]
            verdict = {"id": prompt.id, "sample": sample, "is_correct": rollout.is_correct}
            self._keep(name, verdict)
            self._advance(1)
        if self._lost is not None:
            raise self._lost

    def _arriving(
        self, places: Sequence[int], tasks: Sequence[Task]
    ) -> Iterator[tuple[int, Completion]]:
        alone = not self._sampler.every_rank
        try:
            for index, completion in self._engine.stream([self._request(t) for t in tasks]):
                name, prompt, sample = tasks[index]
                self._keep(name, self._row(prompt, sample, completion))
                del self._left[places[index]]
                if alone:
                    self._engine.forget()  # what is kept is not asked for again
                yield index, completion
                if alone and self._stopped():
                    return
        except EngineLost as error:
            self._lost = error

    def _row(self, prompt: Prompt, sample: int, completion: Completion) -> Row:
        return {
            "id": prompt.id,
            "sample": sample,
            "completion": self._sampler.decode(completion.token_ids),
            "length": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }

    def _request(self, task: Task) -> Request:
        _, prompt, sample = task
        config = self._sampler.config
        e, sampled = config.evaluation, sample != GREEDY
        return Request(
            prompt_token_ids=prompt.token_ids,
            seed=request_seed(EVALUATION_SEED, config.seed, prompt.id, sample),
            max_new_tokens=e.max_new_tokens or config.rollout.max_new_tokens,
            temperature=e.temperature if sampled else 0.0,
            stop_token_ids=self._sampler.stop_token_ids,
            top_p=e.top_p if sampled else 1.0,
            top_k=(e.top_k or 0) if sampled else 0,
            min_p=e.min_p if sampled else 0.0,
        )
