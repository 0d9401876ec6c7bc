"""The trainer's end of the verifier: a pool of worker processes that answers cannot harm."""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_sgopd.verifier.text import extract_boxed
from megatron_sgopd.verifier.verdict import Verdict, decide_quickly
from megatron_sgopd.verifier.worker import LineReader

logger = logging.getLogger(__name__)

_CACHE_ENTRIES = 65536
_CACHE_CHARS = 512  # longer pairs are not cached: the cache stays below 100 MB
_LOAD_PATIENCE_S = 300.0  # to import a verifier, torch included, on a busy machine
_GRACE_S = 30.0  # beyond the limit per answer before a silent server is taken for dead
_MAX_DEATHS = 3  # of the server in a row, with no verdict between


class VerifierPool:
    """Verifies completions in `num_workers` processes, each answer under a hard limit.

    An answer that takes longer than `timeout_s` (wall clock, from when a worker takes it up) or
    needs more than `memory_mb` beyond the verifier's own needs is wrong; it costs only its worker,
    which is killed and replaced. What plain rules or the cache can decide never reaches a worker.

    `name` is "math_verify", or the dotted path of a function (completion, answer) -> bool or
    `Verdict`, imported in the workers alone, never here; its verdicts are not cached.

    Nothing is started before it is needed; `start` begins earlier, in the background. The processes
    end with this one, however it ends. Use from one thread at a time; each process has its own
    pool. Raises ValueError for a setting out of range or a dotted path that cannot be imported.
    """

    def __init__(
        self,
        name: str = "math_verify",
        timeout_s: float = 5.0,
        num_workers: int = 2,
        memory_mb: int = 2048,
    ) -> None:
        for key, value, least in (
            ("timeout_s", timeout_s, 0.01),
            ("num_workers", num_workers, 1),
            ("memory_mb", memory_mb, 64),
        ):
            if not value >= least:
                raise ValueError(f"verifier.{key} is {value}; it must be at least {least}")
        if name != "math_verify" and "." not in name.strip("."):
            raise ValueError(
                f'verifier.name is {name!r}; it must be "math_verify" or the dotted path '
                "package.module.function of a function (completion, answer) -> bool or Verdict"
            )
        self.name = name
        self.timeout_s = timeout_s
        self.num_workers = num_workers
        self.memory_mb = memory_mb
        self._cache: OrderedDict[tuple[str, str], Verdict] = OrderedDict()
        self._server: _Server | None = None
        self._last_task = 0
        self._in_use = False
        self._warned = False
        self._deaths = 0
        if name != "math_verify":
            self._wait_ready(self._started())

    def start(self) -> None:
        """Begin to start the processes and return at once; without it the first need does so."""
        self._started()

    def _started(self) -> _Server:
        if self._server is None:
            # A verifier of one's own may lie on this process's path, or in the current directory.
            paths = [*(str(Path(entry).absolute()) for entry in sys.path), os.getcwd()]
            self._server = _Server(
                {
                    "name": self.name,
                    "timeout_s": self.timeout_s,
                    "num_workers": self.num_workers,
                    "memory_mb": self.memory_mb,
                    "sys_path": paths,
                }
            )
        return self._server

    def _wait_ready(self, server: _Server) -> None:
        try:
            server.wait_ready()
        except OSError as error:
            raise ValueError(
                f"verifier.name is {self.name!r}: its import ended or hung the process that tried "
                f"(exit code {server.stop()}); its messages are above"
            ) from error
        except BaseException:
            self.close()
            raise

    @property
    def server_pid(self) -> int | None:
        """The process that keeps the workers; None while none has been needed."""
        return None if self._server is None else self._server.pid

    def verify_many(
        self,
        pairs: Sequence[tuple[str, str]],
        progress: Callable[[int, int], object] | None = None,
    ) -> list[Verdict]:
        """Verdicts on (completion, answer) pairs, in their order.

        `progress` is called with (finished, total) after each.
        """
        verdicts: list[Verdict | None] = [None] * len(pairs)
        for finished, (index, verdict) in enumerate(self.verify_iter(pairs), start=1):
            verdicts[index] = verdict
            if progress is not None:
                progress(finished, len(pairs))
        return [verdict for verdict in verdicts if verdict is not None]

    def verify_iter(
        self, pairs: Iterable[tuple[str, str]]
    ) -> Generator[tuple[int, Verdict], None, None]:
        """(index, verdict) of each (completion, answer) pair, as they finish.

        `pairs` is read as it is needed: a few pairs ahead of the workers.
        """
        if self._in_use:
            raise RuntimeError(
                "this VerifierPool is already verifying; finish that iteration first"
            )
        self._in_use = True
        try:
            yield from self._verify(pairs)
        finally:
            self._in_use = False

    def close(self) -> None:
        """End the processes. The pool may be used again: they are then started anew."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def __enter__(self) -> VerifierPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _verify(self, pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[int, Verdict]]:
        window = 4 * self.num_workers  # tasks at the server: workers stay busy, sockets stay empty
        tasks: dict[int, _Task] = {}
        task_of: dict[tuple[str, str], _Task] = {}
        for index, (completion, answer) in enumerate(pairs):
            key = (completion, answer)
            if self.name == "math_verify":
                extracted, reason = extract_boxed(completion)
                if extracted is None:
                    yield index, Verdict(False, None, reason)
                    continue
                key = (extracted, answer)
                verdict = self._recall(key)
                if verdict is not None:
                    yield index, verdict
                    continue
                if key in task_of:  # the same answer is being looked at
                    task_of[key].indices.append(index)
                    continue
            self._last_task += 1
            task = _Task(self._last_task, key, [index])
            tasks[task.id] = task
            if self.name == "math_verify":
                task_of[key] = task
            self._send(task, tasks)
            while len(tasks) >= window:
                yield from self._receive(tasks, task_of)
        while tasks:
            yield from self._receive(tasks, task_of)

    def _recall(self, key: tuple[str, str]) -> Verdict | None:
        verdict = self._cache.get(key)
        if verdict is not None:
            self._cache.move_to_end(key)
            return verdict
        verdict = decide_quickly(*key)
        if verdict is not None:
            self._remember(key, verdict)
        return verdict

    def _remember(self, key: tuple[str, str], verdict: Verdict) -> None:
        if len(key[0]) + len(key[1]) > _CACHE_CHARS:
            return
        self._cache[key] = verdict
        if len(self._cache) > _CACHE_ENTRIES:
            self._cache.popitem(last=False)

    def _send(self, task: _Task, tasks: dict[int, _Task]) -> None:
        try:
            self._started().send(task.line)
        except OSError:
            self._revive(tasks)
        except BaseException:  # interrupted in the middle of a line: the stream is of no more use
            self.close()
            raise

    def _receive(
        self, tasks: dict[int, _Task], task_of: dict[tuple[str, str], _Task]
    ) -> Iterator[tuple[int, Verdict]]:
        assert self._server is not None, "verdicts are awaited from a running server"
        try:
            received = self._server.receive()
        except OSError:
            self._revive(tasks)
            return
        self._deaths = 0 if received else self._deaths
        for task_id, (is_correct, extracted, reason, detail) in received:
            task = tasks.pop(task_id, None)
            if task is None:
                continue  # of an iteration that was given up
            if self.name == "math_verify":
                del task_of[task.key]
                extracted = task.key[0]
            verdict = Verdict(is_correct, extracted, reason)
            if reason in ("equal", "different", "unparsable"):
                if self.name == "math_verify":
                    self._remember(task.key, verdict)
            elif detail and not self._warned:
                self._warned = True
                logger.warning("verifier %s: an answer ended in %s: %s", self.name, reason, detail)
            for index in task.indices:
                yield index, verdict

    def _revive(self, tasks: dict[int, _Task]) -> None:
        """Start the server anew after it died, and give it the open tasks again."""
        while True:
            assert self._server is not None, "a server that died was there"
            exit_code = self._server.stop()
            self._server = None
            self._deaths += 1
            if self._deaths > _MAX_DEATHS:
                raise RuntimeError(
                    f"the verifier's process ended {self._deaths} times in a row (last exit code "
                    f"{exit_code}) with no verdict between; its messages are above"
                )
            logger.warning("the verifier's process ended (%s); it is started again", exit_code)
            try:
                server = self._started()
                for task in tasks.values():
                    server.send(task.line)
            except OSError:
                continue
            return


@dataclass
class _Task:
    id: int
    key: tuple[str, str]  # (content of the box, or the whole completion; reference answer)
    indices: list[int]  # of the pairs that wait for it

    @property
    def line(self) -> bytes:
        return f"{self.id} {json.dumps(self.key)}\n".encode()


class _Server:
    """The process that runs `worker.main`, and the socket to it.

    `send` and `receive` raise OSError when it has died or has been silent beyond reason, and
    `receive` raises ValueError when the verifier cannot be imported.
    """

    def __init__(self, settings: dict[str, object]) -> None:
        self._socket, other = socket.socketpair()
        # -c and not -m: this way neither the caller's __main__ nor a directory that happens to be
        # current comes into it. fork + exec by subprocess runs no Python between the two.
        program = (
            f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); "
            "from megatron_sgopd.verifier.worker import main; main()"
        )
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", program, str(other.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                pass_fds=[other.fileno()],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self._timeout_s = float(str(settings["timeout_s"]))
        self._reader = LineReader()
        self._ready = False
        self._stop = weakref.finalize(self, _end_process, self._socket, self._process, os.getpid())
        self._socket.settimeout(_LOAD_PATIENCE_S)
        with suppress(OSError):  # dead already: the first `receive` says so
            self.send(json.dumps(settings).encode() + b"\n")

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, line: bytes) -> None:
        self._socket.sendall(line)

    def wait_ready(self) -> None:
        """Waits until the verifier is imported. Raises ValueError when it cannot be."""
        while not self._ready:
            early = self.receive()
            assert not early, "a verdict came before its task"

    def receive(self) -> list[tuple[int, tuple[bool, str | None, str, str]]]:
        """The next verdicts: (task id, (is_correct, extracted, reason, detail)); may be none."""
        data = self._socket.recv(1 << 20)
        if not data:
            raise ConnectionResetError("the verifier's process ended")
        received = []
        for line in self._reader.feed(data):
            head, _, body = line.partition(b" ")
            if head == b"ready":
                self._ready = True
                self._socket.settimeout(self._timeout_s + _GRACE_S)
            elif head == b"error":
                raise ValueError(json.loads(body))
            else:
                received.append((int(head), tuple(json.loads(body))))
        return received

    def stop(self) -> int | None:
        """End the process and its workers; returns its exit code."""
        self._stop()
        return self._process.returncode


def _end_process(connection: socket.socket, process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:
        connection.close()  # a fork of the owner: neither the stream nor the process is ours
        return
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)  # ends it for copies in forks of this process too
    connection.close()  # at which the server kills its workers and leaves
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
