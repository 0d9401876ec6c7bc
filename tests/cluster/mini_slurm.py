"""A throw-away Slurm cluster on this machine: real slurmctld, slurmd and munge, as root.

    python -m tests.cluster.mini_slurm FOLDER NODES NETWORK

starts it, prints "ready", and takes it down when standard input closes: whoever started it holds
the other end, so nothing is left behind however that process ends. FOLDER gets configuration, logs
and state (a short path: it holds a Unix socket). Two clusters at a time have different NETWORKs.

A node is a network, UTS, IPC and mount namespace of its own around a slurmd, with its own host name
(node1, node2, ...), address (10.199.NETWORK.11, ...), /dev/shm, /etc/hosts and eight devices that
stand for GPUs. So a wrong host or interface shows, and a link that is set down is a lost node. The
machine's own /etc is not touched.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
GPUS, CPUS, MEMORY_MB = 8, 16, 2000
START_S, STOP_S = 60.0, 20.0

SLURM_CONF = """\
ClusterName=mini
SlurmctldHost={host}({subnet}.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={base}/run/munge.socket
CryptoType=crypto/munge
StateSaveLocation={base}/state
SlurmdSpoolDir={base}/spool/%n
SlurmctldPidFile={base}/run/slurmctld.pid
SlurmdPidFile={base}/run/slurmd.%n.pid
SlurmctldLogFile={base}/log/slurmctld.log
SlurmdLogFile={base}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,batch_sched_delay=0,sched_min_interval=0
EnforcePartLimits=ALL
SlurmdParameters=config_overrides
GresTypes=gpu
JobRequeue=1
MinJobAge=3600
KillWait=10
ReturnToService=2
SlurmdTimeout=10
SwitchType=switch/none
PartitionName=batch Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class Node:
    index: int  # from 1
    network: int

    @property
    def name(self) -> str:
        return f"node{self.index}"

    @property
    def address(self) -> str:
        return f"{subnet(self.network)}.{10 + self.index}"

    @property
    def namespace(self) -> str:
        return f"sgopd{self.network}-{self.name}"

    @property
    def link(self) -> str:
        """The host's end of its cable."""
        return f"sgopd{self.network}n{self.index}"


def subnet(network: int) -> str:
    return f"10.199.{network}"


def install() -> None:
    """Debian's packages, where a program is missing. Raises RuntimeError with what to do."""
    missing = [p for p in PROGRAMS if find(p) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        raise RuntimeError(
            f"no {', '.join(missing)}: as root, apt-get install {' '.join(PACKAGES)}"
        )
    quiet = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
    for each in (["apt-get", "update", "-qq"], command):
        done = subprocess.run(each, env=quiet, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(each)} failed:\n{done.stdout}{done.stderr}")


def find(program: str) -> str | None:
    """Daemons are in /usr/sbin, which is not on everybody's PATH."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class MiniSlurm:
    def __init__(self, base: Path, num_nodes: int, network: int) -> None:
        self.base, self.network = base, network
        self.nodes = [Node(i, network) for i in range(1, num_nodes + 1)]
        self.bridge = f"sgopd{network}br"
        self.conf = base / "etc" / "slurm.conf"
        self._daemons: list[subprocess.Popen[bytes]] = []
        self._environment = {
            **os.environ,
            "SLURM_CONF": str(self.conf),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def start(self) -> None:
        """Returns when every node is idle. Raises RuntimeError with the daemons' last words."""
        self._clear()  # what a cluster left whose keeper was killed with SIGKILL
        self._write_files()
        self._start_munge()
        self._make_network()
        self._spawn("slurmctld", "-D", "-c", "-f", str(self.conf))
        for node in self.nodes:
            self._start_node(node)
        names = {node.name for node in self.nodes}
        if not _until(lambda: self._idle() == names, START_S):
            raise RuntimeError(f"idle after {START_S} s: {sorted(self._idle())}\n{self._logs()}")

    def stop(self) -> None:
        """Daemons first, then what is left in the namespaces, then the network."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        deadline = time.monotonic() + STOP_S
        for daemon in self._daemons:
            try:
                daemon.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons = []
        self._clear()

    def _write_files(self) -> None:
        for name in ("etc", "log", "run", "state", "spool", "dev"):
            (self.base / name).mkdir(parents=True, exist_ok=True)
        for folder in (self.base, self.base / "run", self.base / "log"):
            folder.chmod(0o755)
        for i in range(GPUS):  # with files behind them Slurm sets CUDA_VISIBLE_DEVICES
            os.mknod(self.base / "dev" / f"nvidia{i}", 0o666 | 0o020000, os.makedev(1, 3))
        lines = [
            f"NodeName={n.name} NodeHostname={n.name} NodeAddr={n.address} Port=16818 CPUs={CPUS} "
            f"RealMemory={MEMORY_MB} Gres=gpu:{GPUS} State=UNKNOWN\n"
            for n in self.nodes
        ]
        head, _, partition = SLURM_CONF.rpartition("PartitionName")
        text = head + "".join(lines) + "PartitionName" + partition
        host = socket.gethostname().split(".")[0]
        self.conf.write_text(
            text.format(
                host=host, subnet=subnet(self.network), base=self.base, port=16817 - self.network
            )
        )
        etc = self.base / "etc"
        devices = f"{self.base}/dev/nvidia[0-{GPUS - 1}]"
        nodes = f"node[1-{len(self.nodes)}]"
        (etc / "gres.conf").write_text(f"NodeName={nodes} Name=gpu File={devices}\n")
        # Loaded though unused; found by itself only where /sys/fs/cgroup is a mount.
        (etc / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        hosts = ["127.0.0.1 localhost", *(f"{n.address} {n.name}" for n in self.nodes)]
        (etc / "hosts").write_text("\n".join(hosts) + "\n")
        # No name server is there: torch's reverse queries would wait for their time-outs.
        (etc / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")

    def _start_munge(self) -> None:
        key, run = self.base / "etc" / "munge.key", self.base / "run"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o600)
        self._spawn(
            "munged",
            "--foreground",
            "--force",  # folders above it may be anybody's
            f"--key-file={key}",
            f"--socket={run}/munge.socket",
            f"--pid-file={run}/munged.pid",
            f"--log-file={self.base}/log/munged.log",
            f"--seed-file={run}/munged.seed",
        )
        if not _until((run / "munge.socket").exists, 10.0):
            raise RuntimeError(f"munged did not start:\n{self._logs()}")

    def _make_network(self) -> None:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{subnet(self.network)}.1/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for n in self.nodes:
            inside = ("-n", n.namespace)
            _ip("netns", "add", n.namespace)
            _ip(*f"link add {n.link} type veth peer eth0 netns {n.namespace}".split())
            _ip("link", "set", n.link, "master", self.bridge, "up")
            _ip(*inside, "link", "set", "lo", "up")
            _ip(*inside, "addr", "add", f"{n.address}/24", "dev", "eth0")
            _ip(*inside, "link", "set", "eth0", "up")

    def _start_node(self, node: Node) -> None:
        # nsenter: `ip netns exec` would mount /sys anew and hide the cgroups, without which slurmd
        # does not start. None of these forks, so the process ends up as slurmd itself.
        inside = f"""
            hostname {node.name}
            mount -t tmpfs -o size=1g shm /dev/shm
            for name in hosts nsswitch.conf; do mount --bind {self.base}/etc/$name /etc/$name; done
            exec slurmd -D -N {node.name} -f {self.conf}"""
        enter = ("nsenter", f"--net=/run/netns/{node.namespace}", "unshare")
        unshared = ("--uts", "--ipc", "--mount", "--propagation", "private")
        self._spawn(*enter, *unshared, "bash", "-ec", inside)

    def _spawn(self, program: str, *arguments: str) -> None:
        with open(self.base / "log" / "daemons.out", "ab") as out:
            self._daemons.append(
                subprocess.Popen(
                    [find(program) or program, *arguments],
                    env=self._environment,
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                )
            )

    def _idle(self) -> set[str]:
        command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N %T"]
        done = subprocess.run(
            command, env=self._environment, capture_output=True, text=True, check=False
        )
        rows = [line.split() for line in done.stdout.splitlines()]
        return {name for name, state in rows if state == "idle"}

    def _logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:])
            for path in sorted((self.base / "log").iterdir())
        )

    def _clear(self) -> None:
        """Processes in the nodes' namespaces, the namespaces, the links: by name."""
        for node in self.nodes:
            if Path("/run/netns", node.namespace).exists():
                kill_all(lambda node=node: namespace_pids(node))  # type: ignore[misc]
        for node in self.nodes:
            # The link first: a namespace outlives its processes while sockets are in TIME_WAIT.
            _ip("link", "del", node.link, check=False)
            _ip("netns", "del", node.namespace, check=False)
        _ip("link", "del", self.bridge, check=False)


def namespace_pids(node: Node) -> list[int]:
    """Of the processes on a node."""
    return [int(pid) for pid in _ip("netns", "pids", node.namespace, check=False).split()]


def kill_all(pids: Callable[[], list[int]]) -> None:
    """SIGKILL until none is left: one may start another in between."""

    def none_left() -> bool:
        left = [pid for pid in pids() if not _is_zombie(pid)]
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        return not left

    _until(none_left, STOP_S)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _ip(*arguments: str, check: bool = True) -> str:
    command = [find("ip") or "ip", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def set_link(node: Node, *, up: bool) -> None:
    """Pulls a node's cable, or puts it back."""
    _ip("link", "set", node.link, "up" if up else "down")


def _until(true: Callable[[], bool], patience_s: float) -> bool:
    deadline = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def main() -> int:
    base = Path(sys.argv[1])
    cluster = MiniSlurm(base, int(sys.argv[2]), int(sys.argv[3]))
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(1))
    try:
        cluster.start()
        print("ready", flush=True)
        sys.stdin.read()
    finally:
        cluster.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
