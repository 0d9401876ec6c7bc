"""Runs a vLLM server and ends it, with everything that it started, when the trainer ends.

`python -m megatron_sgopd.rollouts.vllm_servers.supervisor COMMAND …` stands between the trainer and
a server: its standard input is a pipe that closes when the trainer ends, however it ends. Imports
neither torch nor vLLM.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path

from megatron_sgopd.distributed.failure import die_with_parent

GRACE_S = 15.0  # from SIGTERM to SIGKILL
LEFT_OVER_S = 4.0  # the same for what a server leaves behind


def supervise(command: list[str], environment: Mapping[str, str], pipe: int) -> int:
    """Runs the server until it ends, the pipe's other end closes, or a signal asks for it.

    Returns the server's exit code; 0 where it was ended from here.
    """
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):  # srun hands on the last
        signal.signal(number, lambda *_: os.close(pipe))
    with tempfile.TemporaryDirectory(prefix="sgopd-vllm-", ignore_cleanup_errors=True) as folder:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            env={**environment, "VLLM_RPC_BASE_PATH": folder, "TMPDIR": folder},
            start_new_session=True,
            preexec_fn=partial(die_with_parent, signal.SIGTERM),  # should this process be killed
        )
        asked = False
        while server.poll() is None and not asked:
            try:
                ready = select.select([pipe], [], [], 0.2)[0]
                asked = bool(ready) and not os.read(pipe, 1)
            except (OSError, ValueError):  # closed by a signal
                asked = True
        shared = _shared_memory(server.pid)
        if server.poll() is None:
            server.terminate()
            with suppress(subprocess.TimeoutExpired):
                server.wait(GRACE_S)
        _end_session(server.pid)
        for segment in shared:  # tensor parallel workers on CPUs leave theirs
            segment.unlink(missing_ok=True)
        return 0 if asked else server.wait()


def _shared_memory(group: int) -> set[Path]:
    """The segments that vLLM's processes in a session have mapped."""
    found = set()
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(place.name)) == group:
                lines = (place / "maps").read_text().splitlines()
                found |= {line.split(None, 5)[5] for line in lines if " /dev/shm/" in line}
        except OSError:  # it ended meanwhile
            continue
    return {Path(p) for p in found if Path(p).name.startswith(("vllm", "psm_"))}


def _end_session(group: int) -> None:
    """Whatever is left of the server: engine core, workers.

    Python's trackers of shared memory ignore SIGTERM and give it back once the others are gone.
    """
    for number in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + LEFT_OVER_S
        try:
            os.killpg(group, number)
            while time.monotonic() < deadline:
                os.killpg(group, 0)
                time.sleep(0.05)
        except ProcessLookupError:
            return


if __name__ == "__main__":
    sys.exit(supervise(sys.argv[1:], os.environ, pipe=0))
