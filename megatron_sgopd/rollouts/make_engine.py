"""Makes the engines of a recipe: embedded in the ranks, or vLLM servers started or found."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from megatron_sgopd.config.engines import LOCAL_HOSTS, servers_of
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.schema import Config, VllmConfig
from megatron_sgopd.distributed.groups import (
    Groups,
    broadcast_object,
    from_first_rank,
    gather_objects,
    gpu_name,
)
from megatron_sgopd.model.hf_location import read_hf_config
from megatron_sgopd.rollouts.embedded_engine import EmbeddedEngine
from megatron_sgopd.rollouts.vllm_servers.client import EngineDown, EngineRefused, VllmClient
from megatron_sgopd.rollouts.vllm_servers.engine import Remote, VllmEngine
from megatron_sgopd.rollouts.vllm_servers.server import (
    EVERY_ADDRESS,
    ServerSpec,
    VllmServer,
    check_version,
    installed_version,
    make_specs,
    new_key,
)
from megatron_sgopd.rollouts.vllm_servers.weight_sender import WeightSender, pick_transport
from megatron_sgopd.rollouts.vllm_servers.weight_wire import SHAPE
from megatron_sgopd.types import Engine, EngineLost

logger = logging.getLogger(__name__)
Progress = Callable[[str, float], object]  # (URL, seconds waited)


def make_engine(
    config: Config,
    groups: Groups,
    hf_config: Any,
    model: Path,
    role: str = "student",
    shared_vocab_size: int | None = None,
) -> Engine:
    """Makes the engine of a model; `Engine.awaits_weights` says if it has none yet. Collective.

    Args:
        hf_config: the model as the trainer has it, with the trainer's vocabulary rows.
        model: its Hugging Face directory.
        role: student, teacher or evaluated.
        shared_vocab_size: token ids from here on are never sampled; None: the model has no others.

    Raises:
        ConfigError: vLLM or a server that cannot serve this recipe, and what to do.
        EngineLost: a server that did not start, with the end of its log.
    """
    if config.rollout.engine == "embedded":
        return EmbeddedEngine(
            hf_config,
            group=groups.replica_group,
            device=groups.device,
            dtype=getattr(torch, config.model.dtype),
            max_batch_size=config.rollout.max_batch_size,
            shared_vocab_size=shared_vocab_size,
        )
    vllm = servers_of(config.rollout.vllm, role)
    if vllm.nodes and not vllm.urls:
        raise ConfigError(
            f"rollout.vllm.nodes is {vllm.nodes}: servers on nodes of their own are started by "
            "slurm/sgopd_8node.sh; elsewhere start them with `sgopd serve RECIPE` and name them in "
            "rollout.vllm.urls (rollout.vllm.teacher.urls), or set nodes to 0"
        )
    key = from_first_rank(new_key(vllm) if groups.rank == 0 else None)
    hf_config = read_hf_config(model)  # a server has all rows of the model on disk
    rows = hf_config.vocab_size
    never_sampled = range(shared_vocab_size or rows, rows)
    run_dir, progress = Path(config.logging.run_dir or ""), _starting(config, groups)
    remotes = _remotes(vllm, groups, model, role, run_dir, key, progress, never_sampled)
    described = _check(remotes, config, hf_config, role)
    version = broadcast_object(described.get("version", ""), groups)
    return VllmEngine(
        remotes,
        groups,
        version=version,
        # A teacher's server, and one started to be evaluated, has read its weights itself.
        awaits_weights=role == "student" or (role == "evaluated" and bool(vllm.urls)),
        dtype=getattr(torch, vllm.dtype),
        bucket_bytes=int(vllm.bucket_mb * 2**20),
        max_concurrency=vllm.max_concurrency,
        max_restarts=vllm.max_restarts,
        patience_s=vllm.startup_timeout_s,
        health_timeout_s=vllm.health_timeout_s,
        colocated=vllm.colocated,
        stop_asked=(run_dir / "STOP").exists,
    )


def _starting(config: Config, groups: Groups) -> Progress:
    """Makes what a person sees while servers start: a line now and then; it heeds RUN_DIR/STOP."""
    shown: dict[str, float] = {}
    stop = Path(config.logging.run_dir or "") / "STOP"

    def show(url: str, seconds: float) -> None:
        if stop.exists():
            raise InterruptedError("stopped on request, while vLLM servers were starting")
        if groups.rank == 0 and seconds - shown.get(url, -10.0) >= 10.0:
            shown[url] = seconds
            print(
                f"{config.name}: waiting for the vLLM server at {url}, {seconds:.0f} s "
                f"(log in {config.logging.run_dir}/engines)",
                flush=True,
            )

    return show


def _remotes(
    vllm: VllmConfig,
    groups: Groups,
    model: Path,
    role: str,
    run_dir: Path,
    key: str,
    progress: Progress,
    never_sampled: range,
) -> list[Remote]:
    """All engines that this first rank reaches; its own ones started and ready."""
    own: dict[int, tuple[str, str]] = {}  # index -> (host name, URL)
    servers: dict[int, VllmServer] = {}
    problem: Exception | None = None
    devices = gather_objects(gpu_name(groups.device), groups.replica_group)
    if groups.is_replica_first_rank:
        owned = range(groups.dp_rank, vllm.num_engines, groups.dp_size)
        try:
            if vllm.urls:
                own = {i: ("", vllm.urls[i]) for i in owned}
            else:
                specs = _specs(vllm, groups, model, role, run_dir, key, devices)
                servers = {i: VllmServer(specs[i]) for i in owned}
                own = {i: (socket.gethostname(), specs[i].url) for i in owned}
                for server in servers.values():
                    server.start()
        except ConfigError as error:
            problem = error
    of_all_ranks = gather_objects((own, problem))
    for _, failure in of_all_ranks:
        if failure is not None:
            _stop(servers)
            raise failure
    if not groups.is_replica_first_rank:
        return []
    everywhere = {i: place for places, _ in of_all_ranks for i, place in places.items()}
    remotes = []
    for index, (host, own_url) in sorted(everywhere.items()):
        url = url_from_here(host, own_url, vllm.host)
        if url is None:
            continue
        client = VllmClient(
            url,
            key,
            max_connections=vllm.max_concurrency,
            timeout_s=vllm.request_timeout_s,
            never_sampled=never_sampled,
            lost_after_s=vllm.health_timeout_s,
        )
        sender = None
        if index in own:
            transport = pick_transport(
                vllm.weight_transfer, groups.device, colocated=vllm.colocated
            )
            sender = WeightSender(client, transport, groups.device, vllm.transfer_folder)
        remotes.append(Remote(index, client, servers.get(index), sender))
    if not remotes:
        raise ConfigError(
            f"this node has no vLLM engine and rollout.vllm.host is {vllm.host!r}, which other "
            "nodes do not reach: set num_engines to the number of replicas, or host to 0.0.0.0"
        )
    for remote in remotes:
        if remote.sender is not None:
            _wait_ready(remote, progress)
    return remotes


def url_from_here(host: str, url: str, bound_to: str) -> str | None:
    """Returns how this node reaches the server that `host` ("": any) has at `url`; None: not.

    `bound_to`: rollout.vllm.host, one address or every address of its node.
    """
    if host in ("", socket.gethostname()):
        return url
    if bound_to in LOCAL_HOSTS:
        return None
    return f"http://{host}:{urlsplit(url).port}" if bound_to in EVERY_ADDRESS else url


def _specs(
    vllm: VllmConfig,
    groups: Groups,
    model: Path,
    role: str,
    run_dir: Path,
    key: str,
    devices: Sequence[str | None],
) -> list[ServerSpec]:
    on_gpu = groups.device.type == "cuda"
    check_version(installed_version(vllm.python), vllm, vllm.python or "this environment")
    if on_gpu and vllm.devices is None:
        if not vllm.colocated:
            raise ConfigError(
                "rollout.vllm.devices is null on GPUs, where the trainer's ranks are: name each "
                "server's GPUs, such as ['4,5'], or set rollout.vllm.colocated=true to share them"
            )
        replica = list(dict.fromkeys(d for d in devices if d is not None))
        own = ",".join(replica[: vllm.tensor_parallel_size])
        vllm = replace(vllm, devices=[own] * vllm.num_engines)
    folder = run_dir / "engines"
    return make_specs(vllm, model, role, folder, on_gpu=on_gpu, key=key)


def _wait_ready(remote: Remote, progress: Progress) -> None:
    try:
        if remote.server is not None:
            remote.server.wait_ready(
                remote.client.is_ready, lambda seconds: progress(remote.client.url, seconds)
            )
        elif not remote.client.is_ready():
            raise ConfigError(
                f"{remote.client.url} (rollout.vllm urls) does not answer: start it with `sgopd "
                "serve RECIPE` and wait until it is ready, or name another"
            )
    except RuntimeError as error:
        raise EngineLost(str(error)) from error


def _check(remotes: list[Remote], config: Config, hf_config: Any, role: str) -> dict[str, Any]:
    """Checks that every engine can serve this recipe; returns a description of one."""
    described: dict[str, Any] = {}
    for remote in remotes:
        if remote.sender is None:
            continue  # its owner asks
        try:
            described = remote.client.describe()
        except (EngineDown, EngineRefused) as error:
            raise ConfigError(str(error)) from error
        vllm, url = config.rollout.vllm, remote.client.url
        check_version(str(described["version"]), vllm, url)
        wanted = {key: getattr(hf_config, key, None) for key in SHAPE}
        if role == "teacher" and described["awaits_weights"]:
            raise ConfigError(
                f"the engine at {url} (rollout.vllm.teacher.urls) is a student's, without weights "
                "until a trainer sends some: start it with `sgopd serve --teacher RECIPE`"
            )
        wanted |= {"dtype": vllm.dtype, "logprobs_mode": "processed_logprobs"}
        for key, value in wanted.items():
            if described[key] != value:
                raise ConfigError(
                    f"the engine at {url} serves {described['model']} with {key} "
                    f"{described[key]}, this run needs {value}: start it with `sgopd serve RECIPE`"
                )
        if described["max_model_len"] < (vllm.max_model_len or 0):
            raise ConfigError(
                f"the engine at {url} has max_model_len {described['max_model_len']}, this recipe "
                f"needs {vllm.max_model_len} (prompts, completions and the guard's probe): start "
                "it with a longer one"
            )
    return described


def _stop(servers: dict[int, VllmServer]) -> None:
    for server in servers.values():
        server.stop()
