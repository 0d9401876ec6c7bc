"""Places the processes of a Slurm job: trainers on the first nodes, vLLM servers on the last.

A pure function of the recipe, the job's nodes and its number: the batch script asks once, and every
node that checks itself comes to the same answer. Ports come from the job's number, so that jobs on
one node do not meet; they stay below the range from which Linux hands out free ports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_sgopd.config.checks import resolve
from megatron_sgopd.config.engines import samples_teacher, servers_of
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.schema import Config

FIRST_PORT, LAST_PORT = 20000, 32767  # Linux's own begin at 32768
PORTS = 32  # of each job: the rendezvous, then the servers of a node
MOST_SERVERS = 15  # on a node, of the student or of the teacher
JOBS = (LAST_PORT - FIRST_PORT) // PORTS  # whose ports differ


@dataclass(frozen=True)
class Servers:
    """The servers of one model, alike on every engine node."""

    per_node: int
    gpus: int  # of each
    first_port: int

    def urls(self, nodes: Sequence[str]) -> list[str]:
        return [
            f"http://{node}:{self.first_port + i}" for node in nodes for i in range(self.per_node)
        ]


NO_SERVERS = Servers(0, 0, 0)


@dataclass(frozen=True)
class Placement:
    config: Config  # resolved
    trainers: tuple[str, ...]  # nodes
    engines: tuple[str, ...]  # nodes
    processes_per_node: int
    port: int  # of the trainers' rendezvous, on their first node
    student: Servers = NO_SERVERS
    teacher: Servers = NO_SERVERS

    @property
    def run_dir(self) -> Path:
        return Path(self.config.logging.run_dir or "").absolute()

    @property
    def overrides(self) -> list[str]:
        """Returns what the trainers' command line needs beside the user's."""
        addresses = {
            "rollout.vllm.urls": self.student.urls(self.engines),
            "rollout.vllm.teacher.urls": self.teacher.urls(self.engines),
        }
        return [f"{key}=[{','.join(urls)}]" for key, urls in addresses.items() if urls]

    def ports_of(self, node: str) -> Iterator[int]:
        """Yields the ports that this job listens on there."""
        if node == self.trainers[0]:
            yield self.port
        if node in self.engines:
            for servers in (self.student, self.teacher):
                yield from range(servers.first_port, servers.first_port + servers.per_node)

    def assignments(self) -> Iterator[str]:
        """The lines of NAME=VALUE that the batch script reads."""
        values = {
            "RUN_DIR": str(self.run_dir),
            "TRAINER_NODES": str(len(self.trainers)),
            "ENGINE_NODES": str(len(self.engines)),
            "MASTER_ADDR": self.trainers[0],
            "MASTER_PORT": str(self.port),
            "OVERRIDES": " ".join(self.overrides),
        }
        for role, servers in (("STUDENT", self.student), ("TEACHER", self.teacher)):
            values[f"{role}_SERVERS"] = str(servers.per_node)
            values[f"{role}_GPUS"] = str(servers.gpus)
            values[f"{role}_PORT"] = str(servers.first_port)
            values[f"{role}_URLS"] = " ".join(servers.urls(self.engines))
        for name, value in values.items():
            yield f"{name}={value}"


def place(
    config: Config, nodes: Sequence[str], processes_per_node: int, job: int, *, on_gpus: bool = True
) -> Placement:
    """Shares the nodes out.

    Raises:
        ConfigError: a recipe that cannot be, or that does not fit these nodes.
    """
    engines = config.rollout.vllm.nodes if config.rollout.engine == "vllm" else 0
    if len(nodes) <= engines:
        raise ConfigError(
            f"rollout.vllm.nodes is {engines} and the job has {len(nodes)} nodes, which leaves "
            f"none for the trainers: submit with more (sbatch -N {engines + 1} or above), or set "
            "fewer apart"
        )
    if engines and config.rollout.vllm.urls:
        raise ConfigError(
            f"rollout.vllm.nodes is {engines} and rollout.vllm.urls names servers: the job starts "
            "its own on nodes set apart, or uses those that are there; set nodes to 0 or urls to "
            "null"
        )
    vllm = config.rollout.vllm
    placed = vllm.nodes or vllm.colocated or vllm.urls is not None or vllm.devices is not None
    if on_gpus and config.rollout.engine == "vllm" and not placed:
        raise ConfigError(
            "rollout.vllm.nodes is 0, and all GPUs are the trainer's: set nodes apart for the "
            "servers, name rollout.vllm.devices or urls, or share the trainer's with "
            "rollout.vllm.colocated=true rollout.max_policy_lag=0"
        )
    world = (len(nodes) - engines) * processes_per_node
    port = FIRST_PORT + PORTS * (job % JOBS)
    resolved = resolve(config, world)
    gpus = processes_per_node if on_gpus else None
    return Placement(
        config=resolved,
        trainers=tuple(nodes[: len(nodes) - engines]),
        engines=tuple(nodes[len(nodes) - engines :]),
        processes_per_node=processes_per_node,
        port=port,
        student=_servers(resolved, "student", port + 1, gpus),
        teacher=_servers(resolved, "teacher", port + 1 + MOST_SERVERS, gpus),
    )


def _servers(config: Config, role: str, first_port: int, gpus: int | None) -> Servers:
    """`gpus`: of a node; None on CPUs."""
    vllm = config.rollout.vllm
    if config.rollout.engine != "vllm" or not vllm.nodes:
        return NO_SERVERS
    if role == "teacher" and not samples_teacher(config.distill):
        return NO_SERVERS
    own = servers_of(vllm, role)
    per_node = own.num_engines // vllm.nodes
    key = "rollout.vllm." + ("teacher." if role == "teacher" else "")
    wanted = per_node * own.tensor_parallel_size
    if gpus is not None and wanted > gpus:
        raise ConfigError(
            f"{key}num_engines {own.num_engines} x tensor_parallel_size "
            f"{own.tensor_parallel_size} on rollout.vllm.nodes {vllm.nodes} are {wanted} GPUs a "
            f"node, and a node has {gpus}: fewer servers, or more nodes for them"
        )
    if per_node > MOST_SERVERS:
        raise ConfigError(f"{key}num_engines: {per_node} servers a node; at most {MOST_SERVERS}")
    return Servers(per_node, own.tensor_parallel_size, first_port)
