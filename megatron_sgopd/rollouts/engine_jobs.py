"""Work that asks engines: where it runs, and how it survives the end of an engine.

An embedded engine decodes in the replica's ranks, so every rank runs the job. Engines behind HTTP
are asked by the replica's first rank alone, in a thread: the trainer may train meanwhile, and the
result is handed to the other ranks. All ranks call `begin`, `result` and `run` at the same points.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol, TypeVar

from megatron_sgopd.distributed.groups import Groups, any_rank, broadcast_object
from megatron_sgopd.types import Engine, EngineLost

Result = TypeVar("Result")


class Jobs(Protocol):
    def begin(self, job: Callable[[], Any]) -> None:
        """Starts a job whose `result` is asked for later; one at a time."""
        ...

    def result(self) -> Any: ...

    def set_result(self, result: Any) -> None:
        """Sets what the next `result` gives, in place of a job begun."""
        ...

    def wait_until_idle(self) -> None:
        """Returns when no engine is being asked."""
        ...

    def run(self, job: Callable[[], Result]) -> Result: ...


def make_jobs(
    engine: Engine | None,
    groups: Groups,
    engines: Callable[[], Sequence[Engine]],
    max_restarts: int,
) -> Jobs:
    """Chooses how jobs run, by the engine that most of them ask; `engines` lists all."""
    if engine is None or engine.every_rank_asks:
        return OnEveryRank()
    return OnFirstRank(groups, engines, max_restarts)


class OnEveryRank:
    """Runs jobs of an embedded engine: each begins when its result is asked for."""

    def __init__(self) -> None:
        self._job: Callable[[], Any] | None = None

    def begin(self, job: Callable[[], Any]) -> None:
        self._job = job

    def result(self) -> Any:
        assert self._job is not None, "begin comes first"
        job, self._job = self._job, None
        return job()

    def set_result(self, result: Any) -> None:
        self._job = lambda: result

    def wait_until_idle(self) -> None:
        pass

    def run(self, job: Callable[[], Result]) -> Result:
        return job()


class OnFirstRank:
    """Runs jobs of engines behind HTTP. `engines` are those that a job may ask."""

    def __init__(
        self, groups: Groups, engines: Callable[[], Sequence[Engine]], max_restarts: int
    ) -> None:
        self._groups, self._engines, self._max_restarts = groups, engines, max_restarts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sgopd-job")  # jobs in their order
        self._begun: tuple[Callable[[], Any], Future[Any] | None] | None = None

    def begin(self, job: Callable[[], Any]) -> None:
        assert self._begun is None, "one job at a time"
        self._begun = (job, self._submit(job))

    def result(self) -> Any:
        """The job's result on every rank of the replica.

        Raises:
            EngineLost: no engine could be brought back, or engines that are brought back end again
                without an answer; on every rank of the run.
        """
        assert self._begun is not None, "begin comes first"
        (job, future), self._begun = self._begun, None
        return self._finish(job, future)

    def set_result(self, result: Any) -> None:
        assert self._begun is None, "one job at a time"
        future = _done(result) if self._groups.is_replica_first_rank else None
        self._begun = (lambda: result, future)

    def wait_until_idle(self) -> None:
        if self._begun is not None and self._begun[1] is not None:
            wait([self._begun[1]])

    def run(self, job: Callable[[], Result]) -> Result:
        return self._finish(job, self._submit(job))

    def _submit(self, job: Callable[[], Any]) -> Future[Any] | None:
        return self._thread.submit(job) if self._groups.is_replica_first_rank else None

    def _finish(self, job: Callable[[], Any], future: Future[Any] | None) -> Any:
        answered = fruitless = 0
        while True:
            result, lost = None, None
            if future is not None:
                try:
                    result = future.result()
                except EngineLost as error:
                    lost = error
            if not any_rank(lost is not None, self._groups):
                break
            before, answered = answered, sum(engine.answered for engine in self._engines())
            fruitless = 0 if any_rank(answered > before, self._groups) else fruitless + 1
            if fruitless > self._max_restarts:
                raise EngineLost(
                    f"engines were brought back {self._max_restarts} times "
                    "(rollout.vllm.max_restarts) and ended again before the next answer"
                    + (f": {lost}" if lost else "")
                )
            for engine in self._engines():
                engine.recover()
            if lost is not None:  # what was answered is not asked again
                future = self._submit(job)
            elif future is not None:
                future = _done(result)
        for engine in self._engines():
            engine.forget()
        return broadcast_object(result, self._groups)


def _done(result: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(result)
    return future
