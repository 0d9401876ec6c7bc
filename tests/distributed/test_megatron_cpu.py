"""The two compatibility modules: CPU stubs, and the optimizer that loads its own state.

Both patch Megatron for the whole process, so each case runs in one of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import make_hf_dir

# What the stubs replace, as (module, attribute).
CALLS = """
import json, torch
from megatron_sgopd.distributed import megatron_cpu

def now():
    names = [n for n in dir(torch.cuda) if callable(getattr(torch.cuda, n))]
    found = {"torch.cuda." + n: getattr(torch.cuda, n) for n in names}
    return found | {"Tensor." + n: getattr(torch.Tensor, n) for n in ("cuda", "type", "to")}

def changed(before):
    after = now()
    return sorted(k for k in before if after.get(k) is not before[k])

"""
STUBBED = [
    "Tensor.cuda",
    "Tensor.type",
    "torch.cuda.current_device",
    "torch.cuda.get_rng_state",
    "torch.cuda.manual_seed",
    "torch.cuda.set_rng_state",
    "torch.cuda.synchronize",
]


def run(program: str, *args: str) -> Any:
    """The JSON on the last line of a fresh process's output."""
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def installs() -> Any:
    """What changed after install("cuda"), then install("cpu"), then install("cpu") again."""
    return run(
        CALLS
        + """
import sys
before = now()
megatron_cpu.install(torch.device("cuda"))
out = {"cuda": changed(before), "cuda_loads_megatron": "megatron.core" in sys.modules}
megatron_cpu.install(torch.device("cpu"))
out["cpu"] = changed(before)

import megatron.core.tensor_parallel.random as megatron_random
from megatron.core.optimizer import clip_grads, optimizer
again, views = now(), (clip_grads.torch, optimizer.torch)
fork = megatron_random.CudaRNGStatesTracker.fork
megatron_cpu.install(torch.device("cpu"))
megatron_cpu.install(torch.device("cuda", 0))
out["again"] = changed(again)
out["same_views"] = views == (clip_grads.torch, optimizer.torch)
out["same_fork"] = fork is megatron_random.CudaRNGStatesTracker.fork

view = clip_grads.torch
out["made"] = str(view.zeros(2, device="cuda").device)
out["made_with_index"] = str(view.empty(2, device=torch.device("cuda", 3)).device)
out["other_devices"] = str(view.zeros(2, device="meta").device)
out["own_type"] = torch.zeros(1).type()
out["plain_torch"] = torch.zeros is not view.zeros and view.float32 is torch.float32

tracker = megatron_random.get_cuda_rng_tracker()
tracker.reset()
tracker.add("model-parallel-rng", 5)
torch.manual_seed(1)
outside = [torch.rand(1).item(), torch.rand(1).item()]
torch.manual_seed(1)
first = torch.rand(1).item()
with tracker.fork("model-parallel-rng"):
    inside = torch.rand(1).item()
out["fork_keeps_outside"] = [first, torch.rand(1).item()] == outside
with tracker.fork("model-parallel-rng"):
    out["fork_goes_on"] = torch.rand(1).item() != inside
torch.manual_seed(5)
out["fork_is_seeded"] = torch.rand(1).item() == inside
print(json.dumps(out))
"""
    )


def test_another_device_is_left_alone(installs: Any) -> None:
    assert installs["cuda"] == []
    assert installs["cuda_loads_megatron"] is False


def test_the_cpu_install_stubs_these_and_no_others(installs: Any) -> None:
    assert installs["cpu"] == STUBBED


def test_installing_again_changes_nothing(installs: Any) -> None:
    assert installs["again"] == []
    assert installs["same_views"] is True
    assert installs["same_fork"] is True


def test_megatrons_modules_make_cpu_tensors(installs: Any) -> None:
    assert (installs["made"], installs["made_with_index"]) == ("cpu", "cpu")
    assert installs["other_devices"] == "meta"
    assert installs["own_type"] == "torch.FloatTensor"  # only Megatron's optimizer sees the lie
    assert installs["plain_torch"] is True


def test_the_rng_tracker_keeps_two_streams_apart(installs: Any) -> None:
    assert installs["fork_keeps_outside"] is True
    assert installs["fork_goes_on"] is True
    assert installs["fork_is_seeded"] is True


OPTIMIZER = """
import json, os, sys
path, out, repaired = sys.argv[1], sys.argv[2], sys.argv[3] == "repaired"
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", SGOPD_DEVICE="cpu")
import torch, torch.distributed as dist
from megatron_sgopd.distributed import megatron_adam
from megatron_sgopd.distributed import megatron_cpu
megatron_cpu.install(torch.device("cpu"))
if not repaired:
    megatron_adam.install = lambda: None  # parallel.initialize calls it
dist.init_process_group("gloo", init_method=f"file://{out}/store", rank=0, world_size=1)
from tests.support.optimizer_cases import save_and_load
print(json.dumps(save_and_load(path, out)))
"""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_hf_dir(tmp_path_factory.mktemp("optimizer") / "hf", 41, layers=1))


def test_the_distributed_optimizer_loads_its_own_state(model_path: str, tmp_path: Path) -> None:
    got = run(OPTIMIZER, model_path, str(tmp_path), "repaired")
    assert got["error"] is None
    assert got["state_differs"] == 0.0
    assert got["steps"] == [3.0]  # each parameter's own counter, advanced once by the third step
    assert got["next_step_differs"] == 0.0  # N steps = k + (N - k) steps
    assert got["moved"] > 0.0


def test_without_the_repair_it_cannot(model_path: str, tmp_path: Path) -> None:
    """Goes red when Megatron mends this: then megatron_adam can go."""
    assert run(OPTIMIZER, model_path, str(tmp_path), "plain")["error"] is not None
