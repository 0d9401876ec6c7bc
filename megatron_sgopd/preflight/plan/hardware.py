"""Figures of GPUs and of what software adds, each with its source; options may replace them.

Bytes, bytes per second and floating-point operations per second, of one GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
GB = 10**9
TERA = 10**12


@dataclass(frozen=True)
class Gpu:
    """Vendor's data sheets: dense bfloat16, one direction of the links; memory as torch sees it."""

    name: str
    memory_bytes: int
    flops_per_s: float
    memory_bytes_per_s: float
    link_bytes_per_s: float  # to the other GPUs of its node


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100-40", int(39.4 * GIB), 312 * TERA, 1555 * GB, 300 * GB),
        Gpu("a100-80", int(79.1 * GIB), 312 * TERA, 2039 * GB, 300 * GB),
        Gpu("l40s", int(44.4 * GIB), 362 * TERA, 864 * GB, 32 * GB),
        Gpu("h100", int(79.1 * GIB), 989 * TERA, 3350 * GB, 450 * GB),
        Gpu("h200", int(139.7 * GIB), 989 * TERA, 4800 * GB, 450 * GB),
        Gpu("b200", int(178.0 * GIB), 2250 * TERA, 8000 * GB, 900 * GB),
    )
}
DEFAULT_GPU = "h100"

# -- what takes memory beside tensors ------------------------------------------------------------
CONTEXT_BYTES = 2 * GIB  # assumed: CUDA context, cuBLAS, NCCL's buffers of a trainer's process
SLEEPING_SERVER_BYTES = 2 * GIB  # assumed: context and graphs of a vLLM worker that sleeps
FRAGMENTATION_SHARE = 0.05  # assumed: of what the trainer's tensors take
# vLLM beside weights and cache: activations of a prefill and CUDA graphs. Assumed.
SERVER_OVERHEAD_BYTES = 3 * GIB


@dataclass(frozen=True)
class Assumptions:
    """Describes what the time estimate rests on; every field is an option of `sgopd plan`."""

    mean_prompt_tokens: float
    mean_completion_tokens: float
    # Model FLOPs utilisation: verl's docs report 0.31 to 0.40 for training a 30B model on H100.
    train_mfu: float = 0.35
    score_mfu: float = 0.40  # forward alone, as a prefill; assumed
    decode_bandwidth_share: float = 0.6  # of the memory's bandwidth while decoding; assumed
    decode_step_overhead_s: float = 0.005  # scheduling, sampling, launches of a step; assumed
    network_bytes_per_s: float = 50 * GB  # of one GPU between nodes: 400 Gbit/s InfiniBand NDR
    network_share: float = 0.6  # of links and network that collectives reach; assumed
    host_bytes_per_s: float = 25 * GB  # a GPU to pinned host memory: half of PCIe 5 x16; assumed
    verify_s: float = 0.05  # one answer on one worker; assumed
    push_bucket_s: float = 0.02  # one bucket's requests to an engine; assumed


UNCERTAINTY = "a factor of 2 either way; not validated on GPUs"
