"""Hidden states wait in order, as sequence shards, within their byte budget on the device."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_sgopd.training.hidden_states import HiddenStates
from tests.support.layouts import layout

CPU = torch.device("cpu")


def resident_mb() -> float:
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) / 1024 for x in lines if x.startswith("VmRSS"))


def waiting(budget_mb: float | None) -> dict[str, Any]:
    """Eight micro-batches of 8 MB: what the store counts, what the process holds, what returns."""
    with layout(1) as groups:
        store = HiddenStates(groups.tp_group, CPU, None if budget_mb is None else budget_mb * 2**20)
        torch.manual_seed(0)
        before = resident_mb()
        kept = []
        for _ in range(8):
            states = torch.randn(2048, 2, 512)
            kept.append((store.put(states, 2048), states.double().sum().item()))
            del states
        grown = resident_mb() - before
        same = all(s.take().double().sum().item() == total for s, total in kept)
        return {
            "grown": grown,
            "peak": store.peak_device_bytes / 2**20,
            "left": store.device_bytes,
            "spilled": store.spilled_bytes / 2**20,
            "same": same,
        }


@pytest.mark.parametrize(("budget", "kept"), [(None, 64.0), (20.0, 16.0), (0.0, 0.0)])
def test_the_device_holds_no_more_than_the_budget(
    pool: Any, budget: float | None, kept: float
) -> None:
    (got,) = pool(1).run(waiting, budget)
    assert got["same"]
    assert got["peak"] == kept
    assert got["spilled"] == 64.0 - kept
    assert got["left"] == 0
    assert got["grown"] < kept + 20  # what the process really holds; one micro-batch is in the air


def sharded(length: int, rows: int, is_shard: bool) -> tuple[tuple[int, ...], bool]:
    """(a shard's shape, whether the whole comes back) for states given whole or as shards."""
    with layout(2) as groups:
        torch.manual_seed(1)
        whole = torch.randn(length, rows, 3)
        given = whole.chunk(2)[groups.tp_rank] if is_shard else whole
        stored = HiddenStates(groups.tp_group, CPU, None).put(given, length)
        assert stored.shard is not None
        shape = tuple(stored.shard.shape)
        same = torch.equal(stored.take(), whole.transpose(0, 1).flatten(0, 1))
        dist.barrier()
        return shape, same


@pytest.mark.parametrize(
    ("length", "rows", "is_shard", "shape"),
    [
        (8, 2, False, (4, 2, 3)),
        (7, 1, False, (4, 1, 3)),
        (1, 2, False, (1, 2, 3)),
        (8, 2, True, (4, 2, 3)),
    ],
)
def test_each_rank_keeps_its_share_of_the_positions(
    pool: Any, length: int, rows: int, is_shard: bool, shape: tuple[int, ...]
) -> None:
    assert pool(2).run(sharded, length, rows, is_shard) == [(shape, True)] * 2


def taken_twice() -> str:
    with layout(1) as groups:
        stored = HiddenStates(groups.tp_group, CPU, None).put(torch.zeros(2, 1, 3), 2)
        stored.take()
        try:
            stored.take()
        except AssertionError as error:
            return str(error)
    return "taken twice"


def test_states_are_taken_once(pool: Any) -> None:
    assert pool(1).run(taken_twice) == ["hidden states are taken once"]
