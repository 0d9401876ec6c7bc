"""Which error is a rank's own, and which the echo of another rank's end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_sgopd.config.errors import ConfigError
from megatron_sgopd.distributed.failure import first_error, record_error
from megatron_sgopd.training.weight_sync import StaleWeights
from megatron_sgopd.types import EngineLost

CLOSED = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:29500"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(CLOSED),
        RuntimeError("NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled system error"),
        dist.DistNetworkError("failed to recv, got 0 bytes"),
        dist.DistBackendError("NCCL communicator was aborted"),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_peers_end_is_an_echo(tmp_path: Path, error: BaseException) -> None:
    assert record_error(tmp_path, 0, error)["echo"]


@pytest.mark.parametrize(
    "error",
    [
        EngineLost("no vLLM engine is left (ConnectError: [Errno 111] Connection refused)"),
        StaleWeights("its connection is broken"),
        ConfigError("set rollout.vllm.weight_transfer to nccl"),
        ValueError("the chat template is broken"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_quotes_a_peers_words_is_no_echo(tmp_path: Path, error: BaseException) -> None:
    """A lost engine was reported as "no rank left an error of its own"."""
    record_error(tmp_path, 1, RuntimeError(CLOSED))
    assert not record_error(tmp_path, 0, error)["echo"]
    first = first_error(tmp_path)
    assert first is not None and first["rank"] == 0, "though the echo was written earlier"
