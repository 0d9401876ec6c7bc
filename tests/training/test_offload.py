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

from megatron_sgopd.training.offload import Shelf

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
    shelf = Shelf(CPU)
    for _ in range(3):  # buffers and file are used again
        shelf.put_away([tensor])
        assert tensor.untyped_storage().nbytes() == 0
        assert shelf.bytes_away == before.untyped_storage().nbytes()
        shelf.bring_back()
        assert torch.equal(tensor, before)
        assert shelf.bytes_away == 0


def test_views_of_one_storage_are_put_away_once_and_stay_views() -> None:
    whole = some(torch.float32)
    left, right = whole[: SIZE // 2], whole[SIZE // 2 :]
    before = whole.clone()
    shelf = Shelf(CPU)
    shelf.put_away([left, right])
    assert shelf.bytes_away == before.untyped_storage().nbytes()
    shelf.bring_back()
    assert torch.equal(whole, before)
    left.zero_()
    assert bool((whole[: SIZE // 2] == 0).all())


def test_small_and_empty_tensors_stay() -> None:
    step, nothing = torch.tensor(3.0), torch.empty(0)
    shelf = Shelf(CPU)
    shelf.put_away([step, nothing])
    assert step.item() == 3.0
    assert shelf.bytes_away == 0


def test_training_with_the_state_away_between_steps_is_training() -> None:
    torch.manual_seed(1)
    plain = torch.nn.Linear(64, 64)
    other = copy.deepcopy(plain)
    x = torch.randn(8, 64)
    shelf, results = Shelf(CPU), []
    for model, away in ((plain, False), (other, True)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(4):
            if away:
                shelf.bring_back()
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            if away:
                states = [v for s in optimizer.state.values() for v in s.values()]
                shelf.put_away(states)
                assert shelf.bytes_away > 0
        results.append(model.weight.detach().clone())
    assert torch.equal(*results)


def test_inside_at_hand_the_bytes_are_there_and_afterwards_away_even_after_an_error() -> None:
    tensor = some(torch.float32)
    shelf = Shelf(CPU)
    shelf.put_away([tensor])

    def fail() -> None:
        with shelf.at_hand([tensor]):
            assert tensor.sum().isfinite()
            raise RuntimeError("planned")

    with pytest.raises(RuntimeError, match="planned"):
        fail()
    assert tensor.untyped_storage().nbytes() == 0
    shelf.close()
    assert tensor.untyped_storage().nbytes() > 0


def test_other_tensors_while_some_are_away_are_refused() -> None:
    first, second = some(torch.float32), some(torch.float32)
    shelf = Shelf(CPU)
    shelf.put_away([first])
    shelf.put_away([first])  # again is nothing
    with pytest.raises(ValueError, match=r"\(1000, 3\) torch.float32 .*bring those back first"):
        shelf.put_away([first, second])
    assert second.untyped_storage().nbytes() > 0


def test_a_full_disk_loses_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tensors = [some(torch.float32), some(torch.float64)]
    before = [t.clone() for t in tensors]
    shelf = Shelf(CPU, tmp_path)
    plain, calls = Shelf._write, []

    def full(self: Shelf, storage: torch.UntypedStorage) -> None:
        calls.append(storage)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        plain(self, storage)

    monkeypatch.setattr(Shelf, "_write", full)
    with pytest.raises(OSError, match=rf"could not be put away in {tmp_path}.*No space left"):
        shelf.put_away(tensors)
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_write_the_system_cuts_short_loses_nothing(tmp_path: Path) -> None:
    tensors = [some(torch.float32), some(torch.float64)]  # 12,000 and 24,000 bytes
    before = [t.clone() for t in tensors]
    shelf, old = Shelf(CPU, tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
    try:
        with pytest.raises(OSError, match="36000 bytes could not be put away"):
            shelf.put_away(tensors)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert shelf.bytes_away == 0
    for _ in range(2):  # as they were, and the shelf still works
        assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
        shelf.put_away(tensors)
        shelf.close()


def test_a_write_of_nothing_is_an_error_and_no_endless_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Stuck:
        def seek(self, place: int) -> None: ...

        def write(self, view: memoryview) -> int:
            return 0

    tensor, shelf = some(torch.float32), Shelf(CPU)
    monkeypatch.setattr(shelf, "_file", Stuck())
    with pytest.raises(OSError, match="nothing was written"):
        shelf.put_away([tensor])
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
    shelf = Shelf(CPU)
    with pytest.raises(ValueError, match=r"\(1000, 3\) torch.float32 cannot be freed"):
        shelf.put_away([good, bad])
    assert shelf.bytes_away == 0 and good.untyped_storage().nbytes() > 0
    shelf.put_away([good])  # the shelf still works
    shelf.close()


MEASURE = """
import sys, torch
from megatron_sgopd.training.offload import Shelf
def mb(key):
    return int(open("/proc/self/status").read().split(key + ":")[1].split()[0]) * 1024 / 1e6
count = int(sys.argv[1])
for _ in range(3):
    del_me = torch.ones(31 * 2**18); del del_me  # glibc now takes up to 31 MiB from its heap
tensors = [torch.ones(50_000_000 // count) for _ in range(count)]  # 200 MB
shelf = Shelf(torch.device("cpu"), sys.argv[2])
for _ in range(3):
    before = mb("VmRSS"); shelf.put_away(tensors); away = mb("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the peak counts from here
    shelf.bring_back()
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
    shelf = Shelf(CPU, tmp_path)
    shelf.put_away([some(torch.float32)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_from_a_gpu_to_pinned_memory_and_back() -> None:
    device = torch.device("cuda", 0)
    tensor = some(torch.bfloat16).to(device)
    before, shelf = tensor.clone(), Shelf(device)
    for _ in range(2):
        shelf.put_away([tensor, some(torch.float32)])
        assert tensor.untyped_storage().nbytes() == 0
        shelf.bring_back()
        assert torch.equal(tensor, before)
