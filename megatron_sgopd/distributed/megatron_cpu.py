"""Lets megatron-core 0.16 train on CPU with gloo: stubs for the CUDA calls on its path.

Keyed on the configured device, never on `torch.cuda.is_available()`: a GPU machine may run a CPU
job. Each remedy names the Megatron lines that need it (0.16.1, relative to megatron/core/). The
layer spec (own norm and attention) and the model's config switch off what can be switched off;
what is left is here.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch

CPU = torch.device("cpu")
_installed = False

# Modules that hold a literal device="cuda" on a path that training or checkpointing uses:
# pipeline_parallel/schedules.py:596, optimizer/optimizer.py:481,907, optimizer/clip_grads.py:103,
# transformer/utils.py:35, utils.py:1207, dist_checkpointing/strategies/state_dict_saver.py:252,
# models/common/embeddings/rope_utils.py:62.
LITERALS = (
    "pipeline_parallel.schedules",
    "pipeline_parallel.utils",
    "pipeline_parallel.bridge_communicator",
    "optimizer.optimizer",
    "optimizer.clip_grads",
    "optimizer.grad_scaler",
    "transformer.utils",
    "utils",
    "dist_checkpointing.strategies.state_dict_saver",
    "dist_checkpointing.exchange_utils",
    "tensor_parallel.data",
    "models.common.embeddings.rope_utils",
)
FACTORIES = frozenset(
    ("tensor", "zeros", "ones", "empty", "full", "arange", "empty_like", "zeros_like")
)


def install(device: torch.device) -> None:
    """Makes Megatron run on `device` when that is the CPU; does nothing on any other device."""
    global _installed
    quiet()
    if device.type != "cpu" or _installed:
        return
    _installed = True
    # Megatron wraps its fused functions in torch.compile at import; here that would call g++.
    torch.compiler.set_stance("force_eager")
    _stub_cuda_calls()
    _stub_rng_tracker()
    for module in LITERALS:
        importlib.import_module(f"megatron.core.{module}").torch = _CpuTorch()  # type: ignore[attr-defined]
    _stub_tensor_methods()


def quiet() -> None:
    """Silences what Megatron says of packages that are optional here, and of its own older calls.

    Call it before the first import of megatron.core.
    """
    absent = r"(Transformer Engine|Apex|absl\.logging).*not installed"
    renamed = r"`torch\.distributed\.\w+` is deprecated"  # in torch 2.13, as Megatron calls them
    not_leaf = r"The \.grad attribute of a Tensor that is not a leaf"  # asked of optimizer shards
    for message in (absent, "full scope is deprecated", renamed, not_leaf):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"megatron\.core")


def _stub_cuda_calls() -> None:
    """torch.cuda functions that only raise without CUDA.

    tensor_parallel/random.py:235 (RNG state), tensor_parallel/layers.py:261 and
    distributed/param_and_grad_buffer.py:800 (current_device), p2p_communication.py:242
    (synchronize).
    """
    torch.cuda.current_device = lambda: CPU  # type: ignore[assignment, return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    torch.cuda.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    torch.cuda.manual_seed = lambda seed: torch.manual_seed(seed)  # type: ignore[assignment]


def _stub_rng_tracker() -> None:
    """tensor_parallel/random.py: the tracker's "cuda" state is the CPU generator's."""
    import megatron.core.tensor_parallel.random as megatron_random

    def get_state(device: object = "cuda", clone: bool = False, graph_safe: bool = False) -> Any:
        return torch.get_rng_state()

    def set_state(state: Any, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(
        tracker: Any, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME
    ) -> Iterator[None]:
        # Megatron's own fork warns when the CPU generator moved inside, which is the point here.
        if name not in tracker.states_:
            raise KeyError(f"rng state {name!r} was not added to the tracker")
        kept = torch.get_rng_state()
        torch.set_rng_state(tracker.states_[name])
        try:
            yield
        finally:
            tracker.states_[name] = torch.get_rng_state()
            torch.set_rng_state(kept)

    megatron_random._get_cuda_rng_state = get_state
    megatron_random._set_cuda_rng_state = set_state
    megatron_random.CudaRNGStatesTracker.fork = fork


class _CpuTorch:
    """`torch` as one Megatron module sees it: factories asked for "cuda" make CPU tensors."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in FACTORIES:
            return value

        def factory(*args: Any, **kwargs: Any) -> Any:
            if str(kwargs.get("device", "")).startswith("cuda"):
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
            return value(*args, **kwargs)

        return factory


def _stub_tensor_methods() -> None:
    """Tensor.cuda() (models/common/language_module/language_module.py:244), and Tensor.type(),
    which optimizer/clip_grads.py:167 and distrib_optimizer.py:361 compare with torch.cuda names."""
    from megatron.core.optimizer import optimizer

    folder, plain_type = os.path.dirname(optimizer.__file__), torch.Tensor.type

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = plain_type(self, *args, **kwargs)
        asked_by_megatron = sys._getframe(1).f_code.co_filename.startswith(folder)
        if isinstance(answer, str) and asked_by_megatron:
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
