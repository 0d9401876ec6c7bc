"""The verifier's process: `main` of this module, started as `python -c … FD PARENT_PID`.

Started by `VerifierPool` in place of a fork of the trainer, which has threads, gloo and perhaps
CUDA. This process is single-threaded, imports the verifier once, forks a worker for each answer
that runs at a time, and ends a worker that overruns its limit with SIGKILL, which a C call that
holds the interpreter's lock cannot put off. It never looks into a completion itself.

Protocol, lines over the socket FD. In: one JSON object of settings, then "ID [completion, answer]".
Out: "ready" or "error MESSAGE" (JSON), then "ID [is_correct, extracted, reason, detail]".
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import resource
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from megatron_sgopd.distributed.failure import die_with_parent
from megatron_sgopd.verifier.verdict import Verdict, compare

Check = Callable[[str, str], Verdict]

_ANSWERS_PER_WORKER = 2000  # then it is replaced: SymPy's and the grammar's caches only grow
_EXTRACTED_CHARS = 4000  # what a verdict carries back at most
_MORE, _LAST = b"+", b"-"  # first byte of a worker's reply: it goes on, or ends after this one


@dataclass
class _Worker:
    pid: int
    connection: socket.socket
    task: bytes | None = None  # the id it works on
    deadline: float = 0.0  # time.monotonic()
    reply: bytes = b""


class LineReader:
    """Complete lines out of a stream of pieces, each byte looked at once."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def feed(self, data: bytes) -> Iterator[bytes]:
        *lines, rest = data.split(b"\n")
        for line in lines:
            yield b"".join(self._pieces) + line
            self._pieces = []
        if rest:
            self._pieces.append(rest)


class Server:
    """Hands answers to workers, ends those that overrun, and passes the verdicts on."""

    def __init__(self, client: socket.socket, check: Check, settings: dict[str, float]) -> None:
        self.client = client
        self.check = check
        self.timeout_s = settings["timeout_s"]
        self.num_workers = int(settings["num_workers"])
        self.memory_bytes = int(settings["memory_mb"]) * 2**20
        self.waiting: deque[bytes] = deque()  # lines as they came
        self.outgoing = bytearray()  # verdicts the pool has not taken yet
        self.workers: list[_Worker] = []
        self.selector = selectors.DefaultSelector()
        self.selector.register(client, selectors.EVENT_READ)

    def run(self, parent_pid: int, reader: LineReader) -> None:
        """Serve until the pool closes its end or its process is gone; leaves no worker behind."""
        self.client.setblocking(False)
        try:
            while os.getppid() == parent_pid:
                self._give_out()
                for key, events in self.selector.select(self._patience()):
                    if key.fileobj is not self.client:
                        self._hear(key.data)
                        continue
                    if events & selectors.EVENT_WRITE:
                        self._flush()
                    if events & selectors.EVENT_READ:
                        data = self.client.recv(1 << 20)
                        if not data:
                            return
                        self.waiting.extend(reader.feed(data))
                now = time.monotonic()
                for worker in [w for w in self.workers if w.task and w.deadline <= now]:
                    self._lose(worker, "timeout")
        except (BrokenPipeError, ConnectionResetError):
            return  # the pool closed its end with verdicts on their way
        finally:
            for worker in list(self.workers):
                self._end(worker)

    def _patience(self) -> float:
        deadlines = [worker.deadline for worker in self.workers if worker.task]
        # At most a second, so that a parent that is gone is noticed though its socket lives on
        # in a process that it forked.
        return max(0.0, min([1.0, *(deadline - time.monotonic() for deadline in deadlines)]))

    def _give_out(self) -> None:
        while self.waiting:
            worker = next((worker for worker in self.workers if not worker.task), None)
            if worker is None:
                if len(self.workers) >= self.num_workers:
                    return
                worker = self._fork()
            line = self.waiting[0]
            try:
                worker.connection.sendall(line + b"\n")
            except OSError:  # it died idle: another one gets the answer
                self._end(worker)
                continue
            self.waiting.popleft()
            worker.task = line.partition(b" ")[0]
            worker.deadline = time.monotonic() + self.timeout_s

    def _hear(self, worker: _Worker) -> None:
        if worker not in self.workers:
            return
        try:
            data = worker.connection.recv(1 << 16)
        except OSError:
            data = b""
        if not data:
            self._lose(worker, "crashed")
            return
        worker.reply += data
        if not worker.reply.endswith(b"\n"):
            return
        reply, worker.reply = worker.reply, b""
        assert worker.task is not None, "a worker replied without a task"
        self._tell(worker.task + b" " + reply[1:])
        worker.task = None
        if reply[:1] == _LAST:
            self._end(worker)

    def _lose(self, worker: _Worker, reason: str) -> None:
        task = worker.task
        status = self._end(worker)
        if task is not None:
            detail = (
                f"exit status {os.waitstatus_to_exitcode(status)}" if reason == "crashed" else ""
            )
            verdict = json.dumps([False, None, reason, detail])
            self._tell(task + b" " + verdict.encode() + b"\n")

    def _tell(self, line: bytes) -> None:
        self.outgoing += line
        self._flush()

    def _flush(self) -> None:
        """Send what the pool will take now: waiting for it would let a worker overrun."""
        with suppress(BlockingIOError):
            del self.outgoing[: self.client.send(self.outgoing)]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if self.outgoing else 0)
        self.selector.modify(self.client, events)

    def _end(self, worker: _Worker) -> int:
        self.workers.remove(worker)
        self.selector.unregister(worker.connection)
        worker.connection.close()
        with suppress(ProcessLookupError):
            os.kill(worker.pid, signal.SIGKILL)
        return os.waitpid(worker.pid, 0)[1]

    def _fork(self) -> _Worker:
        ours, other = socket.socketpair()
        server_pid = os.getpid()
        pid = os.fork()
        if pid == 0:
            try:
                ours.close()
                self.client.close()
                self.selector.close()
                for worker in self.workers:
                    worker.connection.close()
                _limit(server_pid, self.memory_bytes)
                _work(other, self.check, self.memory_bytes // 2)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        other.close()
        worker = _Worker(pid, ours)
        self.workers.append(worker)
        self.selector.register(ours, selectors.EVENT_READ, worker)
        return worker


def _limit(server_pid: int, memory_bytes: int) -> None:
    """Die with the server; take no more memory than allowed; leave no core file."""
    die_with_parent()
    if sys.platform == "linux":
        if os.getppid() != server_pid:
            os._exit(0)
        with open("/proc/self/statm") as statm:  # what the verifier itself has mapped by now
            memory_bytes += int(statm.read().split()[0]) * resource.getpagesize()
    with suppress(ValueError, OSError):  # a lower hard limit stands; macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _work(connection: socket.socket, check: Check, spare_bytes: int) -> None:
    """A worker's life: answers in, verdicts out, one at a time, until it has grown by so much."""
    born = _peak_bytes()
    stream = connection.makefile("rb")
    for count, line in enumerate(stream, start=1):
        last = count >= _ANSWERS_PER_WORKER
        detail = ""
        try:
            completion, answer = json.loads(line.partition(b" ")[2])
            verdict = check(completion, answer)
        except MemoryError:
            verdict, last = Verdict(False, None, "memory"), True
        except Exception:
            verdict, detail = Verdict(False, None, "error"), traceback.format_exc(limit=-4)
        # A worker that has grown is not given another answer: what is left could be too little.
        last = last or _peak_bytes() - born > spare_bytes
        extracted = None if verdict.extracted is None else verdict.extracted[:_EXTRACTED_CHARS]
        reply = json.dumps([verdict.is_correct, extracted, verdict.reason, detail])
        connection.sendall((_LAST if last else _MORE) + reply.encode() + b"\n")
        if last:
            os._exit(0)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def load_verifier(name: str) -> Check:
    """The verifier called `name`, imported. Raises ValueError that names it."""
    if name == "math_verify":
        _warm_up()
        return compare
    module_name, _, function_name = name.rpartition(".")
    wanted = (
        'verifier.name must be "math_verify" or the dotted path package.module.function of a '
        "function (completion, answer) -> bool or Verdict"
    )
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except Exception as error:
        raise ValueError(f"{wanted}; {name!r}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise ValueError(f"{wanted}; {name!r} is a {type(function).__name__}")

    def check(completion: str, answer: str) -> Verdict:
        result = function(completion, answer)
        if isinstance(result, Verdict):
            return result
        if isinstance(result, bool):
            return Verdict(result, None, "equal" if result else "different")
        raise TypeError(f"{name} returned {type(result).__name__}; wanted bool or Verdict")

    return check


def _warm_up() -> None:
    """Import SymPy and fill the grammar's tables once, for the workers forked later."""
    for given, wanted in (
        (r"\frac{\sqrt{3}}{3}", r"\frac{1}{\sqrt{3}}"),
        (r"(x+1)^2", r"x^2+2x+1"),
        (r"1 < x \le 2", r"(1,2]"),
        (r"3\pi", "9.4247779"),
    ):
        compare(given, wanted)


def main() -> None:
    client = socket.socket(fileno=int(sys.argv[1]))
    parent_pid = int(sys.argv[2])
    # A signal to the whole job (Ctrl-C, Slurm's warning) is the trainer's to answer: this process
    # lives exactly as long as the trainer does.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    os.dup2(2, 1)  # a verifier that prints must not write into the trainer's output
    reader = LineReader()
    lines: list[bytes] = []
    while not lines:
        data = client.recv(1 << 20)
        if not data:
            return
        lines += reader.feed(data)
    settings = json.loads(lines[0])
    sys.path[:] = settings["sys_path"]
    try:
        check = load_verifier(settings["name"])
    except ValueError as error:
        client.sendall(b"error " + json.dumps(str(error)).encode() + b"\n")
        return
    gc.freeze()  # keep the collector from touching, and so copying, the pages workers share
    client.sendall(b"ready\n")
    server = Server(client, check, settings)
    server.waiting.extend(lines[1:])
    server.run(parent_pid, reader)
