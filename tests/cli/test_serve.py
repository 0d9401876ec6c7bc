"""`sgopd serve`: a server that dies comes again, so often as was asked; a request ends it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch

from megatron_sgopd.rollouts.vllm_servers.client import VllmClient
from megatron_sgopd.rollouts.vllm_servers.engine import Remote, VllmEngine
from megatron_sgopd.types import EngineLost
from tests.support.layouts import layout

KEEP = (
    "import os, sys; from megatron_sgopd.cli.serve import _keep; "
    "sys.exit(_keep([sys.executable, '-c', sys.argv[1]], dict(os.environ), int(sys.argv[2])))"
)


def keep(server: str, restarts: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", KEEP, server, str(restarts)], stdout=subprocess.PIPE, text=True
    )


def test_a_server_that_dies_is_started_again_so_many_times(tmp_path: Path) -> None:
    server = f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); raise SystemExit(3)"
    process = keep(server, restarts=2)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3
    assert (tmp_path / "starts").read_text() == "xxx"
    assert said.splitlines() == [
        f"the server ended with exit code 3; {left} restarts left" for left in (2, 1, 0)
    ]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
def test_a_request_ends_the_server_and_is_no_failure(number: signal.Signals) -> None:
    process = keep("import os, time; print(os.getpid(), flush=True); time.sleep(600)", restarts=2)
    assert process.stdout is not None, "a pipe"
    server = int(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(60) == 0
    with pytest.raises(ProcessLookupError):
        os.kill(server, 0)


# -- engines that are not the trainer's ------------------------------------------------------------


class Gone:
    """Client and sender of a server on a lost node; it counts how often it was asked."""

    url, asked = "http://gone", 0

    def is_ready(self) -> bool:
        self.asked += 1
        return False

    def close(self) -> None:
        pass


def recover(stopping: bool) -> tuple[str, int]:
    """What is said of a lost engine at a URL when the run has been asked to stop, or is later."""
    gone, stop = Gone(), threading.Event()
    if stopping:
        stop.set()
    else:
        threading.Timer(1.2, stop.set).start()
    with layout(1) as groups:
        engine = VllmEngine(
            [Remote(0, gone, None, gone)],  # type: ignore[arg-type]
            groups,
            version="0",
            dtype=torch.float32,
            bucket_bytes=1,
            max_concurrency=1,
            max_restarts=1,
            patience_s=600.0,
            stop_asked=stop.is_set,
        )
        try:
            engine.recover()
        except EngineLost as error:
            return str(error), gone.asked
    return "recovered", gone.asked


@pytest.mark.parametrize("stopping", [True, False])
def test_a_run_that_is_to_stop_does_not_wait_for_a_lost_engine(pool: Any, stopping: bool) -> None:
    ((said, asked),) = pool(1).run(recover, stopping)
    assert "http://gone could not be brought back" in said
    assert asked <= 2 if stopping else asked >= 3


def test_the_kernel_breaks_connections_to_a_lost_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the given time, whatever the machine's own two hours are."""
    given: dict[str, Any] = {}
    plain = httpx2.HTTPTransport

    def transport(**options: Any) -> httpx2.HTTPTransport:
        given.update(options)
        return plain(**options)

    monkeypatch.setattr(httpx2, "HTTPTransport", transport)
    VllmClient("http://127.0.0.1:9", "key", lost_after_s=80).close()
    with socket.socket() as s:
        for option in given["socket_options"]:
            s.setsockopt(*option)
        names = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        told = [s.getsockopt(socket.IPPROTO_TCP, name) for name in names]
        assert s.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
    assert told == [40, 10, 4], "silent for 40 s, then asked 4 times in 40 s"
