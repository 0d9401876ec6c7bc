"""Which device a rank takes, without any: what torch sees is told to it."""

from __future__ import annotations

import pytest
import torch

from megatron_sgopd.distributed.groups import gpu_name, pick_device


def seen(
    monkeypatch: pytest.MonkeyPatch, count: int, local: int, *, torchrun: bool = False
) -> None:
    monkeypatch.setenv("SGOPD_DEVICE", "cuda")
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    else:
        monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)


@pytest.mark.parametrize(("count", "local", "index"), [(8, 5, 5), (1, 0, 0), (1, 5, 0)])
def test_a_rank_takes_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, count: int, local: int, index: int
) -> None:
    seen(monkeypatch, count, local)
    assert pick_device() == torch.device("cuda", index)


@pytest.mark.parametrize(("count", "torchrun"), [(2, False), (1, True), (2, True)])
def test_more_ranks_than_gpus_are_refused(
    monkeypatch: pytest.MonkeyPatch, count: int, torchrun: bool
) -> None:
    seen(monkeypatch, count, 2, torchrun=torchrun)
    with pytest.raises(ValueError, match=f"rank 2 .* has no GPU of its own, {count} can be seen"):
        pick_device()


@pytest.mark.parametrize(("visible", "name"), [("4,5,6", "5"), ("", "1"), ("GPU-a,GPU-b", "GPU-b")])
def test_a_gpu_is_named_as_other_processes_see_it(
    monkeypatch: pytest.MonkeyPatch, visible: str, name: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_name(torch.device("cuda", 1)) == name
    assert gpu_name(torch.device("cpu")) is None
