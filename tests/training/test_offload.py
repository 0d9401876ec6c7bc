"""Tensors put away come back bit for bit, as the same objects; nothing is lost on the way."""

from __future__ import annotations

import copy
import io
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_sgopd.training.offload import Offloader

CPU = torch.device("cpu")
SIZE = 1000


def some(dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    values = torch.randn(SIZE, 3) * 100
    return values.to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]
)
def test_a_round_trip_is_bit_identical(dtype: torch.dtype) -> None:
    tensor = some(dtype)
    before = tensor.clone()
    offloader = Offloader(CPU)
    for _ in range(3):  # buffers and file are used again
        offloader.offload([tensor])
        assert tensor.untyped_storage().nbytes() == 0
        assert offloader.bytes_offloaded == before.untyped_storage().nbytes()
        offloader.restore()
        assert torch.equal(tensor, before)
        assert offloader.bytes_offloaded == 0


def test_views_of_one_storage_are_put_away_once_and_stay_views() -> None:
    whole = some(torch.float32)
    left, right = whole[: SIZE // 2], whole[SIZE // 2 :]
    before = whole.clone()
    offloader = Offloader(CPU)
    offloader.offload([left, right])
    assert offloader.bytes_offloaded == before.untyped_storage().nbytes()
    offloader.restore()
    assert torch.equal(whole, before)
    left.zero_()
    assert bool((whole[: SIZE // 2] == 0).all())


def test_small_and_empty_tensors_stay() -> None:
    step, nothing = torch.tensor(3.0), torch.empty(0)
    offloader = Offloader(CPU)
    offloader.offload([step, nothing])
    assert step.item() == 3.0
    assert offloader.bytes_offloaded == 0


def test_training_with_the_state_away_between_steps_is_training() -> None:
    torch.manual_seed(1)
    plain = torch.nn.Linear(64, 64)
    other = copy.deepcopy(plain)
    x = torch.randn(8, 64)
    offloader, results = Offloader(CPU), []
    for model, away in ((plain, False), (other, True)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(4):
            if away:
                offloader.restore()
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if away:
                states = [v for s in optimizer.state.values() for v in s.values()]
                offloader.offload(states)
                assert offloader.bytes_offloaded > 0
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


def test_inside_at_hand_the_bytes_are_there_and_afterwards_away_even_after_an_error() -> None:
    tensor = some(torch.float32)
    offloader = Offloader(CPU)
    offloader.offload([tensor])

    def fail() -> None:
        with offloader.on_device([tensor]):
            assert tensor.sum().isfinite()
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fail()
    assert tensor.untyped_storage().nbytes() == 0
    offloader.close()
    assert tensor.untyped_storage().nbytes() > 0


def test_other_tensors_while_some_are_away_are_refused() -> None:
    first, second = some(torch.float32), some(torch.float32)
    offloader = Offloader(CPU)
    offloader.offload([first])
    offloader.offload([first])  # again is nothing
    with pytest.raises(ValueError, match=r"\(1000, 3\) torch.float32 .*bring those back first"):
        offloader.offload([first, second])
    assert second.untyped_storage().nbytes() > 0


def test_a_full_disk_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = [some(torch.float32), some(torch.float64)]
    before = [t.clone() for t in tensors]
    offloader = Offloader(CPU, tmp_path)
    plain, calls = Offloader._write, []

    def full(self: Offloader, storage: torch.UntypedStorage) -> None:
        calls.append(storage)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        plain(self, storage)

    monkeypatch.setattr(Offloader, "_write", full)
    with pytest.raises(OSError, match=rf"could not be put away in {tmp_path}.*No space left"):
        offloader.offload(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_write_the_system_cuts_short_loses_nothing(tmp_path: Path) -> None:
    tensors = [some(torch.float32), some(torch.float64)]  # 12,000 and 24,000 bytes
    before = [t.clone() for t in tensors]
    offloader, old = Offloader(CPU, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(OSError, match="36000 bytes could not be put away"):
            offloader.offload(tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert offloader.bytes_offloaded == 0
    for _ in range(2):  # as they were, and the offloader still works
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        offloader.offload(tensors)
        offloader.close()


def test_a_write_of_nothing_is_an_error_and_no_endless_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stuck:
        def seek(self, place: int) -> None: ...

        def write(self, view: memoryview) -> int:
            return 0

    tensor, offloader = some(torch.float32), Offloader(CPU)
    monkeypatch.setattr(offloader, "_file", Stuck())
    with pytest.raises(OSError, match="nothing was written"):
        offloader.offload([tensor])
    assert tensor.untyped_storage().nbytes() > 0


def from_file() -> Tensor:
    file = io.BytesIO()
    torch.save(some(torch.float32), file)
    file.seek(0)
    return torch.load(file)


def seen_by_numpy() -> Tensor:
    tensor = some(torch.float32)
    tensor.numpy()
    return tensor


@pytest.mark.parametrize("make", [from_file, seen_by_numpy])
def test_what_torch_cannot_free_is_refused_before_anything_is_freed(make: object) -> None:
    good, bad = some(torch.float32), make()
    offloader = Offloader(CPU)
    with pytest.raises(ValueError, match=r"\(1000, 3\) torch.float32 cannot be freed"):
        offloader.offload([good, bad])
    assert offloader.bytes_offloaded == 0 and good.untyped_storage().nbytes() > 0
    offloader.offload([good])  # the offloader still works
    offloader.close()


MEASURE = """
import sys, torch
from megatron_sgopd.training.offload import Offloader
def mb(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024 / 1e6
count = int(sys.argv[1])
for _ in range(3):
    del_me = torch.ones(31 * 2**18); del del_me  # glibc now takes up to 31 MiB from its heap
tensors = [torch.ones(50_000_000 // count) for _ in range(count)]  # 200 MB
offloader = Offloader(torch.device("cpu"), sys.argv[2])
for _ in range(3):
    before = mb("VmRSS"); offloader.offload(tensors); away = mb("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    offloader.restore()
    print(before - away, mb("VmHWM") - away)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("count", [1, 20, 500])
def test_memory_falls_by_what_is_away_and_does_not_double_on_the_way_back(
    count: int, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", MEASURE, str(count), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rounds = [[float(x) for x in line.split()] for line in out.splitlines()]
    assert len(rounds) == 3
    for fell, peak in rounds:
        assert fell > 180, out
        assert peak < 220, out


def test_no_file_is_left_for_others_to_see(tmp_path: Path) -> None:
    offloader = Offloader(CPU, tmp_path)
    offloader.offload([some(torch.float32)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu_to_pinned_memory_and_back() -> None:
    device = torch.device("cuda", 0)
    tensor = some(torch.bfloat16).to(device)
    before, offloader = tensor.clone(), Offloader(device)
    for _ in range(2):
        offloader.offload([tensor, some(torch.float32)])
        assert tensor.untyped_storage().nbytes() == 0
        offloader.restore()
        assert torch.equal(tensor, before)
