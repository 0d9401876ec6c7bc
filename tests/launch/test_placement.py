"""Where a Slurm job's processes go, and what a node finds wrong with itself."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from megatron_sgopd.__main__ import main
from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.config.load import load_config
from megatron_sgopd.distributed.failure import record_error
from megatron_sgopd.launch.node_check import problems
from megatron_sgopd.launch.placement import Placement, place

NODES = [f"n{i}" for i in range(1, 9)]
QWEN, DEMO = "recipes/qwen3_8node.yaml", "recipes/demo/sg_opd.yaml"


def placed(recipe: str, *overrides: str, nodes: int = 8, gpus: int = 8, job: int = 5) -> Placement:
    return place(load_config(recipe, overrides), NODES[:nodes], gpus, job)


def test_the_8_node_recipe_trains_on_four_nodes_and_serves_on_four():
    found = placed(QWEN)
    assert (found.trainers, found.engines) == (tuple(NODES[:4]), tuple(NODES[4:]))
    p = found.config.parallel
    assert p.tensor_model_parallel_size * (p.data_parallel_size or 0) == 4 * 8
    # Job 5 has ports 20000 + 5 x 32 to 31 more: rendezvous, 15 students, 15 teachers.
    assert found.port == 20160
    assert list(found.ports_of("n1")) == [20160]
    assert list(found.ports_of("n2")) == []
    assert list(found.ports_of("n8")) == [20161, 20162, 20163, 20164, 20176]
    students = [f"http://{n}:{port}" for n in NODES[4:] for port in range(20161, 20165)]
    teachers = [f"http://{n}:20176" for n in NODES[4:]]
    assert found.overrides == [
        f"rollout.vllm.urls=[{','.join(students)}]",
        f"rollout.vllm.teacher.urls=[{','.join(teachers)}]",
    ]
    load_config(QWEN, found.overrides)  # they are overrides


def test_without_nodes_for_servers_all_train():
    found = placed(DEMO, nodes=2, gpus=1)  # TP 2 across two nodes
    assert (found.trainers, found.engines, found.overrides) == (("n1", "n2"), (), [])
    assert "TRAINER_NODES=2" in list(found.assignments())


@pytest.mark.parametrize("nodes", [2, 4])
def test_any_number_of_nodes(nodes: int):
    settings = ("parallel.data_parallel_size=null", "rollout.num_prompts=64")
    found = placed(DEMO, *settings, nodes=nodes)
    assert found.config.parallel.data_parallel_size == nodes * 8 // 2


def test_jobs_that_follow_each_other_share_no_port():
    config = load_config(QWEN)
    jobs = (*range(100, 110), 397, 398)  # 398 begins anew
    sets = [set(place(config, NODES, 8, job).ports_of("n8")) for job in jobs]
    assert sum(map(len, sets)) == len(set.union(*sets)) == 5 * len(jobs)
    assert max(map(max, sets)) < 32768, "below the ports that Linux hands out"
    assert place(config, NODES, 8, 398).port == 20000 == place(config, NODES, 8, 0).port


VLLM = ("rollout.engine=vllm", "rollout.vllm.gpu_memory_utilization=0.4")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["nodes=8"], "leaves none for the trainers: submit with more (sbatch -N 9"),
        (["nodes=0"], "rollout.vllm.nodes is 0, and all GPUs are the trainer's: set nodes apart"),
        (["nodes=-1"], "rollout.vllm.nodes is -1; it must not be negative"),
        (
            ["nodes=2", "num_engines=3"],
            "rollout.vllm.num_engines is 3 and rollout.vllm.nodes 2, which cannot share",
        ),
        (
            ["nodes=1", "num_engines=4", "tensor_parallel_size=4"],
            "are 16 GPUs a node, and a node has 8",
        ),
        (
            ["nodes=1", "colocated=true"],
            "servers have nodes of their own or share the trainer's",
        ),
        (
            ["nodes=1", "urls=[http://x:1]"],
            "set nodes to 0 or urls to null",
        ),
        (
            ["nodes=1", "gpu_memory_utilization=0.9"],
            "add up to 1.80; at most 0.95",
        ),
    ],
)
def test_what_cannot_be_placed_is_refused(overrides: list[str], words: str):
    vllm = [f"rollout.vllm.{each}" for each in overrides]
    dp = "parallel.data_parallel_size=null"
    with pytest.raises(ConfigError) as error:
        placed(DEMO, *VLLM, dp, "rollout.num_prompts=840", *vllm)
    assert words in str(error.value)


# -- a node checks itself --------------------------------------------------------------------------


@pytest.fixture
def well(tmp_path: Path) -> Placement:
    """A job of this machine alone, as it should be."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"num_attention_heads": 2, "num_key_value_heads": 2}')
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / ".preflight").write_text("5.0\n")
    settings = [f"model.{role}.hf_path={model}" for role in ("student", "teacher")]
    config = load_config(DEMO, [*settings, f"logging.run_dir={run_dir}"])
    return place(config, ["localhost"], 2, free_job())


def free_job() -> int:
    """A job's number whose ports are free here."""
    for job in range(397, 0, -1):
        with socket.socket() as s:
            if s.connect_ex(("127.0.0.1", 20000 + 32 * job)) != 0:
                return job
    raise AssertionError("no free port")


def found(placement: Placement, node: str = "localhost", **options: bool) -> list[str]:
    return list(problems(placement, node, "5.0", **{"on_gpus": False, **options}))


def test_a_node_that_is_well_says_nothing(well: Placement):
    assert found(well) == []
    assert list(well.run_dir.iterdir()) == [well.run_dir / ".preflight"], "and leaves nothing"


def test_a_run_directory_that_is_not_the_first_nodes(well: Placement):
    (well.run_dir / ".preflight").write_text("of another job\n")
    (said,) = found(well)
    assert "is not the first node's (of another job)" in said
    (well.run_dir / ".preflight").unlink()
    (said,) = found(well)
    assert "is not the first node's (No such file or directory)" in said
    assert "on a file system that all nodes share" in said


def test_a_port_that_is_taken(well: Placement):
    with socket.create_server(("", well.port)):
        (said,) = found(well)
    assert said.startswith(f"port {well.port} is taken")


def test_gpus_are_counted(well: Placement, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (said,) = found(well, on_gpus=True)
    assert said.startswith("no GPUs (there is no nvidia-smi), 2 wanted")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\n")
    smi.chmod(0o755)
    assert found(well, on_gpus=True) == ["1 GPUs (nvidia-smi -L), 2 wanted"]
    smi.write_text("#!/bin/sh\necho 'GPU 0: NVIDIA H100'\necho 'GPU 1: NVIDIA H100'\n")
    assert found(well, on_gpus=True) == []


def test_a_model_that_is_not_there(well: Placement):
    Path(well.config.model.student.hf_path, "config.json").unlink()
    assert len(found(well)) == 2  # student and teacher share it
    assert "model.student.hf_path" in found(well)[0]


def test_a_first_node_whose_name_says_nothing(well: Placement, monkeypatch: pytest.MonkeyPatch):
    def unknown(*arguments: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr("socket.getaddrinfo", unknown)
    assert found(well) == [
        "the first node's name localhost does not resolve (Name or service not known)"
    ]


def test_a_name_that_points_to_the_loopback(well: Placement, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("socket.gethostname", lambda: "localhost")
    config = load_config(
        DEMO,
        [
            *(f"model.{role}.hf_path=owner/name" for role in ("student", "teacher")),
            f"logging.run_dir={well.run_dir}",
        ],
    )
    two = place(config, ["localhost", "other"], 1, free_job())
    (said,) = found(two)
    assert "resolves to" in said and "export GLOO_SOCKET_IFNAME" in said
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    assert found(two) == []


# -- why a run failed ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words", "code"),
    [
        (RuntimeError("the loss is not a number"), "rank 3 failed: RuntimeError: the loss is", 0),
        (ConfigError("rollout.n is 0"), "rank 3 failed: ConfigError: rollout.n is 0", 2),
        (RuntimeError("gloo: connection closed by peer"), "no rank left an error of its own", 0),
        (None, "no rank left an error of its own", 0),
    ],
)
def test_the_account_of_a_failure(
    error: Exception | None, words: str, code: int, tmp_path: Path, capsys
):
    if error is not None:
        record_error(tmp_path, 3, error)
    assert main(["cluster", "account", str(tmp_path)]) == code, "2: another try is no use"
    assert words in capsys.readouterr().out
