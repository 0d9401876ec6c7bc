"""Weights from one process to another: CUDA IPC between two, NCCL as far as one GPU goes."""

from __future__ import annotations

import multiprocessing
import socket
from multiprocessing.connection import Connection

import pytest
import torch

from megatron_sgopd.rollouts.vllm_servers.weight_buckets import buckets, view
from megatron_sgopd.rollouts.vllm_servers.weight_wire import (
    Receiver,
    broadcast,
    export_handle,
    make_group,
)

GPU = torch.device("cuda", 0)


def worker(pipe: Connection) -> None:
    """Receives a bucket through IPC as an engine's worker does, and tells what it holds."""
    receiver = Receiver("ipc", GPU, rank=1, world_size=2, address="", port=0)
    entries, source = pipe.recv()
    flat = receiver.receive(entries, source)
    torch.cuda.synchronize()
    pipe.send("received")
    assert pipe.recv() == "overwritten", "the sender's buffer is its own again"
    pipe.send({e.name: view(flat, e).float().cpu().numpy() for e in entries})


def test_a_bucket_through_cuda_ipc_arrives_whole_and_is_the_receivers_own() -> None:
    torch.manual_seed(0)
    weights = {f"w{i}": torch.randn(s) for i, s in enumerate([(300, 7), (5,), (64, 64)])}
    (bucket,) = buckets(weights.items(), 2**20, torch.bfloat16, GPU)
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=worker, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    torch.cuda.synchronize()
    ours.send((bucket.entries, {"handles": export_handle(bucket.flat)}))
    assert ours.recv() == "received"
    bucket.flat.zero_()
    torch.cuda.synchronize()
    ours.send("overwritten")
    got = ours.recv()
    process.join(30)
    assert process.exitcode == 0
    assert got.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(torch.from_numpy(got[name]), tensor.bfloat16().float()), name


def test_another_gpus_handle_is_refused() -> None:
    flat = torch.zeros(64, dtype=torch.uint8, device=GPU)
    (arguments,) = export_handle(flat).values()
    (bucket,) = buckets([("w", torch.zeros(4))], 2**10, torch.float32, GPU)
    receiver = Receiver("ipc", GPU, rank=1, world_size=2, address="", port=0)
    with pytest.raises(ValueError, match="weights came for the GPUs \\['GPU-other'\\]"):
        receiver.receive(bucket.entries, {"handles": {"GPU-other": arguments}})


def test_the_group_of_a_push_broadcasts_over_nccl() -> None:
    """A group of the sender alone: NCCL takes one rank on a GPU."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    group, store = make_group("nccl", "127.0.0.1", port, 0, 1, 60.0)
    flat = torch.arange(1000, device=GPU).to(torch.uint8)
    work = broadcast(group, flat)
    work.wait()
    torch.cuda.synchronize()
    assert work.is_completed()
    assert torch.equal(flat.cpu(), torch.arange(1000).to(torch.uint8))
    del group, store
