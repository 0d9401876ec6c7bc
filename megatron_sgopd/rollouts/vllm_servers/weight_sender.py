"""The trainer's end of a weight push to one engine: a group of its own, then bucket by bucket."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.rollouts.vllm_servers.client import EngineDown, EngineRefused, VllmClient
from megatron_sgopd.rollouts.vllm_servers.weight_buckets import Bucket
from megatron_sgopd.rollouts.vllm_servers.weight_wire import (
    TIMEOUT_S,
    broadcast,
    export_handle,
    make_group,
    write_bucket,
)

POLL_S = 0.0005


def pick_transport(wanted: str, device: torch.device, *, colocated: bool) -> str:
    """auto: gloo from CPUs; from GPUs IPC where the engine is on the same ones, else NCCL."""
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "gloo"
    return "ipc" if colocated else "nccl"


class WeightSender:
    """Pushes to one engine; used by the one rank that owns it. Raises EngineDown, EngineRefused."""

    def __init__(
        self, client: VllmClient, transport: str, device: torch.device, folder: str | None
    ) -> None:
        self._client, self.transport = client, transport
        self._folder = Path(folder or "/dev/shm")
        if transport == "file" and not os.access(self._folder, os.W_OK | os.X_OK):
            raise ConfigError(
                f"rollout.vllm.transfer_folder is {str(self._folder)!r}, which this host cannot "
                "write to: name a folder that trainer and engine both see (null: /dev/shm)"
            )
        self.device = device if transport in ("nccl", "ipc") else torch.device("cpu")
        self._group: Any = None
        self._store: Any = None
        self._open = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sgopd-weights")

    def begin(self) -> None:
        """The engine stops taking requests; the group is made if there is none yet."""
        if not self._open:
            self._connect()
        self._client.start_update()

    def send(self, bucket: Bucket) -> None:
        """Returns when the engine's workers have loaded the bucket."""
        entries = [entry.as_json() for entry in bucket.entries]
        if self.transport == "file":
            handle, name = tempfile.mkstemp(
                prefix="sgopd-weights-", suffix=".bin", dir=self._folder
            )
            os.close(handle)
            try:
                write_bucket(Path(name), bucket.flat)
                self._client.update(entries, {"path": name})
            finally:
                Path(name).unlink(missing_ok=True)
        elif self.transport == "ipc":
            torch.cuda.synchronize(bucket.flat.device)  # the workers read what is there now
            self._client.update(entries, {"handles": export_handle(bucket.flat)})
        else:
            request = self._thread.submit(self._client.update, entries, {})
            _both(request, broadcast(self._group, bucket.flat))

    def finish(self, policy_version: int) -> None:
        """Sets the version of the weights, and reads it back."""
        self._client.finish_update(policy_version)
        if (held := self._client.policy_version()) != policy_version:
            raise EngineRefused(
                f"{self._client.url} reports weights of version {held} after version "
                f"{policy_version} was pushed"
            )

    def close(self) -> None:
        """Gives the group up; the next push makes a new one."""
        self._open, self._group, self._store = False, None, None

    def _connect(self) -> None:
        if self.transport not in ("gloo", "nccl"):
            self._client.init_transfer({"transport": self.transport})
            self._open = True
            return
        address = _address_towards(self._client.url)
        with socket.socket() as s:  # the store binds to it in a moment
            s.bind(("", 0))
            port = s.getsockname()[1]
        world = 1 + int(self._client.describe()["world_size"])
        info = {
            "transport": self.transport,
            "master_address": address,
            "master_port": port,
            "world_size": world,
        }
        request = self._thread.submit(self._client.init_transfer, info)
        joined = _in_thread(lambda: make_group(self.transport, address, port, 0, world, TIMEOUT_S))
        while not joined.done():
            if request.done() and (error := request.exception()):
                raise error  # the group's thread gives up at its own timeout
            time.sleep(POLL_S)
        self._group, self._store = joined.result()
        request.result()
        self._open = True


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    """A thread that nobody waits for at exit: joining a group has no end but its own timeout."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="sgopd-weights-group", daemon=True).start()
    return future


def _both(request: Future[Any], work: Any) -> None:
    """Waits for broadcast and answer; a failing one is not waited for by way of the other."""
    while not work.is_completed():
        if request.done() and (error := request.exception()):
            raise error
        time.sleep(POLL_S)
    try:
        work.wait()
    except RuntimeError as error:  # a worker of the engine is gone
        raise EngineDown(f"the broadcast of weights broke: {error}") from error
    request.result()


def _address_towards(url: str) -> str:
    """This machine's address as the engine's host reaches it."""
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as s:  # sends nothing: it asks for the route
        s.connect(place)
        return str(s.getsockname()[0])
