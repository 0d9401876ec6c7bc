"""Checks that a node can take its part in a job: else it would hang, minutes later.

Takes a placement and this node's name; gives what is wrong, a line each. No torch is imported: all
nodes answer within seconds.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.hub_names import is_hub_name
from megatron_sgopd.launch.placement import Placement
from megatron_sgopd.rollouts.vllm_servers.server import check_port, check_version, installed_version

TOKEN_FILE = ".preflight"  # in the run directory; the batch script writes it
NEEDED = ("torch", "megatron.core", "transformers", "math_verify")


def problems(placement: Placement, node: str, token: str, *, on_gpus: bool) -> Iterator[str]:
    """`token`: what the batch script wrote into RUN_DIR/.preflight on the first node."""
    yield from _gpus(placement.processes_per_node) if on_gpus else ()
    yield from _run_dir(placement.run_dir, node, token)
    yield from _environment(placement, node)
    yield from _models(placement)
    yield from _network(placement, node)


def _gpus(wanted: int) -> Iterator[str]:
    try:
        listed = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=False
        )
        found = sum(line.startswith("GPU ") for line in listed.stdout.splitlines())
    except FileNotFoundError:
        yield (
            f"no GPUs (there is no nvidia-smi), {wanted} wanted; without GPUs export SGOPD_DEVICE="
            "cpu"
        )
    except subprocess.TimeoutExpired:
        yield "nvidia-smi does not answer"
    else:
        if found < wanted:
            yield f"{found} GPUs (nvidia-smi -L), {wanted} wanted"


def _run_dir(run_dir: Path, node: str, token: str) -> Iterator[str]:
    try:
        found = (run_dir / TOKEN_FILE).read_text(encoding="utf-8").strip()
    except OSError as error:
        found = f"{error.strerror}"
    if found != token:
        yield (
            f"the run directory {run_dir} is not the first node's ({found}): put logging.run_dir "
            "on a file system that all nodes share"
        )
        return
    own = run_dir / f"{TOKEN_FILE}-{node}"
    try:
        own.write_text(token, encoding="utf-8")
    except OSError as error:
        yield f"the run directory {run_dir} cannot be written to ({error.strerror})"
    finally:
        with suppress(OSError):
            own.unlink(missing_ok=True)


def _environment(placement: Placement, node: str) -> Iterator[str]:
    needed = NEEDED if node in placement.trainers else ()
    missing = [name for name in needed if not _is_there(name)]
    if missing:
        yield f"the python environment has no {', '.join(missing)}"
    rollout = placement.config.rollout
    if rollout.engine == "vllm" and (node in placement.engines or not placement.engines):
        vllm = rollout.vllm
        try:
            where = vllm.python or "the python environment"
            check_version(installed_version(vllm.python), vllm, where)
        except ConfigError as error:
            yield str(error)


def _is_there(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # the package above it
        return False


def _models(placement: Placement) -> Iterator[str]:
    """Directories; a hub's name is looked up when the model is loaded."""
    model = placement.config.model
    for role in ("student", "teacher", "reference"):
        path = getattr(model, role).hf_path
        if not path or (Path(path) / "config.json").is_file():
            continue
        if not is_hub_name(path):
            yield f"model.{role}.hf_path {path} is no Hugging Face directory here"


def _network(placement: Placement, node: str) -> Iterator[str]:
    master = placement.trainers[0]
    try:
        socket.getaddrinfo(master, placement.port)
    except OSError as error:
        yield f"the first node's name {master} does not resolve ({error.strerror})"
    if len(placement.trainers) > 1 and node in placement.trainers:
        yield from _own_address()
    for port in placement.ports_of(node):
        try:
            check_port("", port)
        except ConfigError:
            yield f"port {port} is taken: another process of an earlier job may be left there"


def _own_address() -> Iterator[str]:
    """gloo, which Megatron uses beside NCCL, listens where its own host name points to."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None)[0][4][0])
    except OSError as error:
        yield f"its own name {name} does not resolve ({error.strerror})"
        return
    if address.startswith("127.") or address == "::1":
        yield (
            f"its own name {name} resolves to {address}, where other nodes do not reach it: "
            "export GLOO_SOCKET_IFNAME (slurm/site.sh), or correct /etc/hosts"
        )
