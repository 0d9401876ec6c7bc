"""Starts the ranks of a run under torchrun and sees them through to their end.

The parent imports no torch. It turns signals into a request to stop (RUN_DIR/STOP, which the ranks
look for after every step), and after a failure prints the first failing rank's error last.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

from megatron_sgopd.failure import report

PR_SET_PDEATHSIG = 1
# torchrun's own account of a failure, which would bury the rank's: the agent's log lines and the
# ChildFailedError with its traceback.
AGENT_NOISE = re.compile(
    r"^([EWI]\d{4} .*torch/distributed/(elastic|run)|E\d{4} .*|W\d{4} .*torch/distributed.*)"
)


def run_ranks(num_processes: int, arguments: list[str], run_dir: Path) -> int:
    """Runs `python -m megatron_sgopd ARGUMENTS` on that many local ranks; the exit code.

    0: finished, or stopped on request with a checkpoint; 1: failed.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={num_processes}",
        "-m",
        "megatron_sgopd",
        *arguments,
    ]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment.setdefault("OMP_NUM_THREADS", "1")
    # gloo on one machine: an address that resolves whatever the host is called
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    child = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        preexec_fn=_die_with_parent,
    )
    stopper = _Stopper(child, run_dir)
    assert child.stderr is not None, "stderr is piped"
    noise: list[bytes] = []
    reader = threading.Thread(target=_pass_on, args=(child.stderr, noise))
    reader.start()
    code = child.wait()
    reader.join(10)
    stopper.forget()
    if code == 0:
        return 0
    _end_group(child.pid)
    text = report(run_dir)
    if text is None:
        text = _died_silently(b"".join(noise).decode(errors="replace"))
    (run_dir / "status").write_text("failed\n", encoding="utf-8") if run_dir.is_dir() else None
    print(f"\n{text}", file=sys.stderr, flush=True)
    return 1


def _die_with_parent() -> None:
    """In the child: SIGTERM when the parent is gone, even by SIGKILL; torchrun ends its ranks."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _pass_on(stream: IO[bytes], noise: list[bytes]) -> None:
    """Copies the ranks' stderr, carriage returns and all; keeps torchrun's own epilogue back."""
    rest = b""
    in_epilogue = False
    while chunk := os.read(stream.fileno(), 65536):
        rest += chunk
        *lines, rest = re.split(rb"(?<=[\n\r])", rest)
        for line in lines:
            text = line.decode(errors="replace")
            if text.startswith("Traceback") or AGENT_NOISE.match(text):
                # The ranks' own tracebacks carry a "[rank N]" prefix: this is the agent's.
                in_epilogue = True
            if in_epilogue or AGENT_NOISE.match(text):
                noise.append(line)
            else:
                os.write(2, line)
        if rest and not in_epilogue and not rest.startswith((b"Trace", b"E1", b"W1", b"E0", b"W0")):
            os.write(2, rest)  # a progress bar's unfinished line
            rest = b""
    if rest and not in_epilogue:
        os.write(2, rest)


def _died_silently(noise: str) -> str:
    """Words for ranks that left no record: killed, or never started."""
    killed = re.search(r"exitcode\s*:?\s*-(\d+)", noise)
    rank = re.search(r"(?:local_rank|rank)\s*:?\s*(\d+)", noise)
    who = f"rank {rank[1]}" if rank else "a rank"
    if killed:
        number = int(killed[1])
        why = " (often the kernel's out-of-memory killer)" if number == signal.SIGKILL else ""
        return f"{who} died of signal {number}{why}; no traceback was left"
    return f"the ranks could not be started or died without a word:\n{noise[-4000:]}"


def _end_group(pid: int) -> None:
    """Whatever is left of the child's session."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


class _Stopper:
    """First SIGINT, SIGTERM or SIGUSR1: ask the ranks to stop; the second SIGINT/SIGTERM: kill."""

    def __init__(self, child: subprocess.Popen[bytes], run_dir: Path) -> None:
        self._child, self._run_dir, self._asked = child, run_dir, False
        self._kept = {
            number: signal.signal(number, self._handle)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        }

    def _handle(self, number: int, frame: object) -> None:
        if self._asked and number != signal.SIGUSR1:
            _end_group(self._child.pid)
            return
        self._asked = True
        self._run_dir.mkdir(parents=True, exist_ok=True)
        (self._run_dir / "STOP").touch()
        print(
            "\nstopping after this step, with a checkpoint; Ctrl-C again to kill",
            file=sys.stderr,
            flush=True,
        )

    def forget(self) -> None:
        for number, handler in self._kept.items():
            signal.signal(number, handler)
