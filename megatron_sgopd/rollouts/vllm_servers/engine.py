"""Rollouts and weights through vLLM servers: see `types.Engine`.

A replica's first rank sends its share of the requests to all engines, the least busy first; the
engines belong to the replicas in turn, and an engine's owner starts it, pushes the weights and
starts it again when it dies. Every rank calls `push_weights`, `recover` and `close`, at the same
points; `stream` runs on first ranks alone and takes part in no collective.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.distributed.groups import Groups, any_rank
from megatron_sgopd.rollouts.vllm_servers.client import EngineDown, VllmClient
from megatron_sgopd.rollouts.vllm_servers.server import VllmServer
from megatron_sgopd.rollouts.vllm_servers.weight_buckets import buckets
from megatron_sgopd.rollouts.vllm_servers.weight_sender import WeightSender
from megatron_sgopd.types import Completion, EngineLost, Request, WeightStream

MAX_FAILURES = 3  # in a row, of a server that says it is healthy
WATCHES = 8  # of a server's health, in the time after which it counts as hung
logger = logging.getLogger(__name__)


@dataclass
class Remote:
    """One engine as this rank sees it; `server` and `sender` are its owner's."""

    index: int
    client: VllmClient
    server: VllmServer | None = None
    sender: WeightSender | None = None
    busy: int = 0  # this rank's requests there
    alive: bool = True
    failures: int = 0  # requests in a row that it did not answer


class VllmEngine:
    """`remotes`: all engines, in the same order on every first rank; [] on the other ranks."""

    name = "vllm"
    every_rank_asks = False

    def __init__(
        self,
        remotes: Sequence[Remote],
        groups: Groups,
        *,
        version: str,
        awaits_weights: bool = True,
        dtype: torch.dtype,
        bucket_bytes: int,
        max_concurrency: int,
        max_restarts: int,
        patience_s: float,
        health_timeout_s: float = 120.0,
        colocated: bool = False,
        stop_asked: Callable[[], bool] = lambda: False,
    ) -> None:
        self.version, self.policy_version = version, -1
        self.awaits_weights = awaits_weights
        self.answered = 0  # requests so far
        self._remotes, self._groups, self._patience_s = remotes, groups, patience_s
        self._weights: Callable[[], WeightStream] | None = None  # what it was given last
        self._colocated, self._asleep, self._stop_asked = colocated, False, stop_asked
        self._dtype, self._bucket_bytes = dtype, bucket_bytes
        self._max_restarts = max_restarts
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(max_concurrency, thread_name_prefix="sgopd-requests")
        self._answers: dict[Request, Completion] = {}  # of a job that an engine's end cut short
        self._restarts, self._resent = 0, 0
        self._reason = ""  # why an engine was given up last
        self._closed = threading.Event()
        for remote in remotes:
            if remote.server is not None:
                threading.Thread(
                    target=self._watch, args=(remote, health_timeout_s), daemon=True
                ).start()

    # -- generation: first ranks alone -------------------------------------------------------------

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """(index, completion) as they finish. What is answered is kept until `forget`.

        Raises:
            EngineLost: no engine is left; ask again after `recover`, and get the rest.
        """
        waiting = {}
        for index, request in enumerate(requests):
            if request in self._answers:
                yield index, self._answers[request]
            else:
                waiting[self._threads.submit(self._ask, request)] = index
        lost: EngineLost | None = None
        for future in as_completed(waiting):
            try:
                completion = future.result()
            except EngineLost as error:
                lost = error  # the others may yet be answered
                continue
            except BaseException:
                for other in waiting:
                    other.cancel()
                raise
            index = waiting.pop(future)  # its answer is not kept here too
            self._answers[requests[index]] = completion
            self.answered += 1
            yield index, completion
        if lost is not None:
            raise lost

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of the requests."""
        done = dict(self.stream(requests))
        return [done[i] for i in range(len(requests))]

    def forget(self) -> None:
        """Drops the answers that were kept in case a job had to be done again."""
        self._answers.clear()

    def _ask(self, request: Request) -> Completion:
        while True:
            remote = self._take()
            try:
                completion = remote.client.complete(request)
                remote.failures = 0
                return completion
            except EngineDown as error:
                healthy = remote.client.is_ready()  # a connection may break and the server be well
                with self._lock:
                    remote.failures += 1
                    self._resent += 1
                    if remote.alive and not (healthy and remote.failures < MAX_FAILURES):
                        self._give_up(remote, error)
            finally:
                with self._lock:
                    remote.busy -= 1

    def _take(self) -> Remote:
        """The living engine with the fewest of this rank's requests."""
        with self._lock:
            alive = [r for r in self._remotes if r.alive]
            if not alive:
                urls = ", ".join(r.client.url for r in self._remotes)
                raise EngineLost(f"no vLLM engine is left ({urls}); {self._reason}")
            # Ranks begin at different engines, so that one request each does not meet at one.
            count, first = len(self._remotes), self._groups.dp_rank
            remote = min(alive, key=lambda r: (r.busy, (r.index - first) % count))
            remote.busy += 1
            return remote

    def _watch(self, remote: Remote, timeout_s: float) -> None:
        """Ends a server of ours that hangs: its requests would wait for `request_timeout_s`."""
        seen = time.monotonic()
        while not self._closed.wait(timeout_s / WATCHES):
            # Dead ones are being started again.
            if not remote.alive or remote.client.is_responding(timeout_s):
                seen = time.monotonic()
            elif time.monotonic() - seen > timeout_s and remote.server is not None:
                logger.warning(
                    "%s has not answered for %.0f s: it is ended", remote.client.url, timeout_s
                )
                remote.server.stop()

    # -- weights: every rank -----------------------------------------------------------------------

    def push_weights(self, weights: Callable[[], WeightStream], policy_version: int) -> None:
        """Gives every engine the weights; `weights()` may be asked for more than once.

        Raises:
            EngineLost: an engine could not be brought back in `max_restarts` tries.
            EngineRefused: an engine does not take these weights, with its reason.
        """
        self._weights = weights
        self.wake_up()
        self._push(policy_version, {r.index for r in self._owned})
        self.policy_version = policy_version

    def recover(self) -> None:
        """Starts dead engines again and gives them the current weights. Raises EngineLost."""
        self._push(self.policy_version, set())

    def _push(self, policy_version: int, stale: set[int]) -> None:
        """Pushes to the engines in `stale`, and to those that have to be started again."""
        dead: list[str] = []
        for attempt in range(self._max_restarts + 1):
            stale |= self._revive(attempt)
            if self._weights is not None:
                self._push_once(policy_version, stale)
            dead = [r.client.url for r in self._owned if not r.alive]
            if not any_rank(bool(dead), self._groups):
                break
        else:
            raise EngineLost(
                f"{', '.join(dead) or 'a vLLM engine'} could not be brought back in "
                f"{self._max_restarts} restarts (rollout.vllm.max_restarts); {self._reason}"
            )
        for remote in self._remotes:
            remote.alive = True

    def _push_once(self, policy_version: int, stale: set[int]) -> None:
        """One pass of the stream; engines that took it leave `stale`. Collective in a replica."""
        if not any_rank(bool(stale), self._groups, of_replica=True):
            return
        assert self._weights is not None, "asked before"
        targets = [r for r in self._owned if r.index in stale and r.alive]

        def each(act: Callable[[WeightSender], None]) -> None:
            for remote in list(targets):
                assert remote.sender is not None, "its owner's"
                try:
                    act(remote.sender)
                except EngineDown as error:
                    self._give_up(remote, error)
                    remote.sender.close()
                    targets.remove(remote)

        stream = self._weights()
        if not self._groups.is_replica_first_rank:
            for _ in stream:  # the other ranks are in the stream's collectives
                pass
            return
        device = targets[0].sender.device if targets and targets[0].sender else torch.device("cpu")
        each(lambda sender: sender.begin())
        for bucket in buckets(stream, self._bucket_bytes, self._dtype, device):
            each(lambda sender, bucket=bucket: sender.send(bucket))  # type: ignore[misc]
            del bucket  # else the next one is made beside it
        each(lambda sender: sender.finish(policy_version))
        stale -= {remote.index for remote in targets}

    def _revive(self, attempt: int) -> set[int]:
        """Starts again what has died; the engines that have to be given their weights."""
        revived = set()
        for remote in self._owned:
            if remote.alive and remote.client.is_ready():
                continue
            remote.alive = False
            if attempt == self._max_restarts:
                continue
            assert remote.sender is not None, "its owner's"
            remote.sender.close()
            try:
                if remote.server is not None:
                    logger.warning("the engine at %s is started again", remote.client.url)
                    remote.server.start()
                    remote.server.wait_ready(remote.client.is_ready)
                else:  # not ours to start; whoever runs it may
                    logger.warning("waiting for the engine at %s", remote.client.url)
                    _wait(remote.client.is_ready, self._patience_s, self._stop_asked)
            except (RuntimeError, ConfigError) as error:
                self._give_up(remote, error)
                continue
            remote.alive, remote.failures = True, 0
            self._restarts += 1
            revived.add(remote.index)
        return revived

    def _give_up(self, remote: Remote, error: Exception) -> None:
        """Gives an engine up until it is brought back, and keeps the reason in case it
        cannot be.
        """
        logger.warning("%s", error)
        remote.alive, self._reason = False, str(error)

    @property
    def _owned(self) -> list[Remote]:
        return [r for r in self._remotes if r.sender is not None]

    def sleep(self) -> None:
        """Colocated engines give up the devices' memory while the trainer trains."""
        if self._colocated and not self._asleep:
            self._ask_each(lambda client: client.sleep(keep_weights=self._weights is None))
            self._asleep = True

    def wake_up(self) -> None:
        """Gets the engines ready before anything is asked of them again. Collective over
        all ranks.
        """
        if self._asleep:
            self._ask_each(lambda client: client.wake_up())
            self._asleep = False
            any_rank(False, self._groups)  # another replica may ask this one's engine

    def probe(self, ask: Callable[[VllmClient], Any]) -> list[tuple[str, Any]]:
        """(URL, what `ask` says) of every engine this rank owns. Collective over all ranks.

        Raises:
            EngineLost: one breaks off each time it is asked.
        """
        for _ in range(self._max_restarts + 1):
            answers = self._ask_each(ask)
            if not any_rank(len(answers) < len(self._owned), self._groups):
                return answers
            self.recover()
        raise EngineLost(f"a vLLM engine does not answer after a push; {self._reason}")

    def _ask_each(self, act: Callable[[VllmClient], Any]) -> list[tuple[str, Any]]:
        """(URL, what it says) of the engines this rank owns; those that do not answer are left to
        `recover` or the next push."""
        answers = []
        for remote in self._owned:
            try:
                answers.append((remote.client.url, act(remote.client)))
            except EngineDown as error:
                self._give_up(remote, error)
        return answers

    def incidents(self) -> dict[str, float]:
        """Engines that came back, and requests sent again, so far in the run. Collective."""
        device = self._groups.device
        counts = torch.tensor([self._restarts, self._resent], dtype=torch.float32, device=device)
        dist.all_reduce(counts)
        return {"engine/restarts": float(counts[0]), "engine/requests_resent": float(counts[1])}

    def close(self) -> None:
        """Ends the servers that this rank started."""
        self._closed.set()
        self._threads.shutdown(wait=False, cancel_futures=True)
        for remote in self._remotes:
            if remote.sender is not None:
                remote.sender.close()
            if remote.server is not None:
                remote.server.stop()
            remote.client.close()


def _wait(is_ready: Callable[[], bool], patience_s: float, stop_asked: Callable[[], bool]) -> None:
    """Raises RuntimeError; a run that is to stop does not wait for an engine first."""
    deadline = time.monotonic() + patience_s
    while not is_ready():
        if stop_asked():
            raise RuntimeError("it does not answer, and the run has been asked to stop")
        if time.monotonic() > deadline:
            raise RuntimeError(f"it did not answer within {patience_s:.0f} s")
        time.sleep(0.5)
