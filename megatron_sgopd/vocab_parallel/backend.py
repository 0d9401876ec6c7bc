"""Chooses the back end of an objective's passes: plain PyTorch, or Triton on NVIDIA GPUs.

Triton is imported when it is first needed and never by importing this package.
"""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

KERNELS = "megatron_sgopd.vocab_parallel.triton_kernels"


def check(backend: str, objective: str, has_kernels: bool) -> None:
    """Raises ValueError where Triton is asked for by name and cannot serve."""
    if backend != "triton":
        return
    if not has_kernels:
        raise ValueError(
            f"backend 'triton' has no kernels for the {objective}: use 'auto', which takes PyTorch"
        )
    if isinstance(found := _import(), str):
        raise ValueError(
            f"backend 'triton' cannot be imported ({found}): install triton, or 'auto'"
        )


def kernels(backend: str, has_kernels: bool, student: Tensor) -> ModuleType | None:
    """The module `triton_kernels` where it serves these logits; None: plain PyTorch.

    Float64 is plain PyTorch's, and without logits there is nothing to run.
    """
    if backend == "torch" or not has_kernels or student.dtype == torch.float64:
        return None
    if backend == "auto":
        found = _import() if student.is_cuda else None
        return found if isinstance(found, ModuleType) else None
    found = _import()
    assert isinstance(found, ModuleType), "check() was not asked"
    if not (student.is_cuda or found.INTERPRETED):
        raise ValueError(
            f"backend 'triton' runs on NVIDIA GPUs, and the logits are on {student.device}: "
            "use 'auto' or 'torch'"
        )
    return found


@cache
def _import() -> ModuleType | str:
    """The kernels, or why they cannot be imported."""
    try:
        return importlib.import_module(KERNELS)
    except ImportError as error:
        return str(error)
