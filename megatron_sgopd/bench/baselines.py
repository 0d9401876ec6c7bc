"""Other projects' losses, from their wheels as they are; one that is missing is named, no error.

Each states for which cases it stands in, and how it is called on a case's inputs.

Shapes: T tokens, V vocabulary rows of this rank.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_sgopd.bench.cases import JSD_BETA, Case
from megatron_sgopd.bench.inputs import Batch
from megatron_sgopd.bench.variants import Loss, Variant
from megatron_sgopd.vocab_parallel import Rows

COMPILED_FROM_TOKENS = 128  # below, compiling takes longer than all the rest
BETAS = {"forward_kl": 0.0, "jsd": JSD_BETA, "reverse_kl": 1.0}  # of the generalised JSD


@dataclass(frozen=True)
class Baseline:
    """A function of another package."""

    name: str
    package: str
    module: str
    function: str  # its qualified name in the module
    serves: Callable[[Case], bool]
    make: Callable[[Any, Case], Loss]
    is_mean: bool = False
    needs_megatron: bool = False
    is_compiled: bool = False
    cuda_only: bool = False
    slow_on_cpu: bool = False  # left out of large cases there

    def serves_on(self, device: str, case: Case) -> bool:
        """Say whether it is measured beside ours."""
        if device == "cpu" and (self.cuda_only or (self.slow_on_cpu and case.is_large)):
            return False
        return self.serves(case) and not (self.is_compiled and case.tokens < COMPILED_FROM_TOKENS)

    def variant(self, case: Case) -> Variant:
        """Import it; raises whatever the import raises."""
        found: Any = importlib.import_module(self.module)
        for part in self.function.split("."):
            found = getattr(found, part)
        version = importlib.metadata.version(self.package)
        path = f"{self.module}.{self.function}"
        return Variant(
            self.name,
            self.make(found, case),
            is_mean=self.is_mean,
            needs_megatron=self.needs_megatron,
            is_compiled=self.is_compiled,
            origin=(("package", self.package), ("version", version), ("module", path)),
        )


def baseline_variants(case: Case, device: str, missing: dict[str, str]) -> list[Variant]:
    """Find those that serve the case; why one is not installed goes into `missing`."""
    found = []
    for baseline in BASELINES:
        if not baseline.serves_on(device, case):
            continue
        try:
            found.append(baseline.variant(case))
        except Exception as error:  # a wheel's import can fail in any way; the bench goes on
            missing[baseline.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found


# -- how each is called ----------------------------------------------------------------------------


def _trl_jsd(function: Any, case: Case) -> Loss:
    def loss(student: Any, batch: Batch) -> Tensor:
        beta = BETAS[case.objective]
        rows = (student[None], _logits(batch.teacher)[None])
        return function(*rows, beta=beta, reduction="sum")

    return loss


def _modelopt_kl(cls: Any, case: Case) -> Loss:
    """Make the criterion; `reverse` swaps torch's kl_div, whose own order is the forward KL."""
    config = SimpleNamespace(tensor_model_parallel_size=case.tp)
    criterion = cls(config, reverse=case.objective == "reverse_kl")

    def loss(student: Any, batch: Batch) -> Tensor:
        per_token, *_ = criterion(student[:, None], _logits(batch.teacher)[:, None])
        return per_token.sum()

    return loss


def _cross_entropy(function: Any, *more: Callable[[], Any]) -> Loss:
    """Make -(T - S) log p of a cross-entropy that takes logits [T, 1, V] and tokens [T, 1]."""

    def loss(student: Any, batch: Batch) -> Tensor:
        ce = function(student[:, None], batch.tokens[:, None], *(make() for make in more))[:, 0]
        return ((batch.teacher_logprobs + ce.detach()) * ce).sum()

    return loss


def _megatron_group() -> Any:
    state = importlib.import_module("megatron.core.parallel_state")
    return state.get_tensor_model_parallel_group()


def _liger_chunked(chunk_size: int, compiled: bool) -> Callable[[Any, Case], Loss]:
    def make(cls: Any, case: Case) -> Loss:
        module = cls(
            weight_hard_loss=0.0,
            weight_soft_loss=1.0,
            beta=BETAS[case.objective],
            compiled=compiled,
            chunk_size=chunk_size,
        )
        return lambda student, batch: module(*student, *_hidden(batch.teacher), batch.tokens)

    return make


def _liger_fused(cls: Any, case: Case) -> Loss:
    module = cls(jsd_beta=BETAS[case.objective])
    return lambda student, batch: module(*student, *_hidden(batch.teacher), None)


def _liger_jsd(cls: Any, case: Case) -> Loss:
    module = cls(beta=BETAS[case.objective])

    def loss(student: Any, batch: Batch) -> Tensor:
        teacher = _logits(batch.teacher).float().log_softmax(-1)
        return module(student.float().log_softmax(-1), teacher)

    return loss


def _trl_chunked(function: Any, case: Case) -> Loss:
    def loss(student: Any, batch: Batch) -> Tensor:
        beta = BETAS[case.objective]
        hidden, head = _hidden(batch.teacher)
        per_token, _ = function.apply(*student, None, hidden, head, None, beta, 1.0)
        return per_token.sum()

    return loss


def _logits(rows: Rows | None) -> Tensor:
    assert isinstance(rows, Tensor), "this baseline takes logits"
    return rows


def _hidden(rows: Rows | None) -> tuple[Tensor, Tensor]:
    assert isinstance(rows, tuple), "this baseline takes hidden states and a head"
    return rows


def _on_logits(*objectives: str) -> Callable[[Case], bool]:
    return lambda case: case.form == "logits" and case.objective in objectives


def _on_whole_logits(*objectives: str) -> Callable[[Case], bool]:
    return lambda case: case.tp == 1 and _on_logits(*objectives)(case)


def _sampled(case: Case) -> bool:
    return case.form == "sampled"


def _fused(case: Case) -> bool:
    return case.form == "fused"


BASELINES: Sequence[Baseline] = (
    Baseline(
        "TRL generalized_jsd_loss",
        "trl",
        "trl.experimental.gkd.gkd_trainer",
        "GKDTrainer.generalized_jsd_loss",
        _on_whole_logits("reverse_kl", "forward_kl", "jsd"),
        _trl_jsd,
    ),
    Baseline(
        "ModelOpt LogitsKLLoss",
        "nvidia-modelopt",
        "modelopt.torch.distill.plugins.megatron",
        "LogitsKLLoss",
        _on_logits("reverse_kl", "forward_kl"),
        _modelopt_kl,
        needs_megatron=True,
    ),
    Baseline(
        "Megatron cross-entropy",
        "megatron-core",
        "megatron.core.tensor_parallel.cross_entropy",
        "vocab_parallel_cross_entropy",
        _sampled,
        lambda function, case: _cross_entropy(function),
        needs_megatron=True,
    ),
    Baseline(
        "Megatron fused cross-entropy",
        "megatron-core",
        "megatron.core.fusions.fused_cross_entropy",
        "fused_vocab_parallel_cross_entropy",
        _sampled,
        lambda function, case: _cross_entropy(function, _megatron_group),
        needs_megatron=True,
        is_compiled=True,
    ),
    Baseline(
        "Liger cross-entropy, Triton",
        "liger-kernel",
        "liger_kernel.transformers.vocab_parallel_cross_entropy",
        "LigerVocabParallelCrossEntropy",
        _sampled,
        lambda cls, case: _cross_entropy(cls()),
        cuda_only=True,
    ),
    Baseline(
        "Liger JSD, Triton",
        "liger-kernel",
        "liger_kernel.transformers.jsd",
        "LigerJSD",
        _on_whole_logits("reverse_kl", "forward_kl", "jsd"),
        _liger_jsd,
        is_mean=True,
        cuda_only=True,
    ),
    Baseline(
        "Liger chunked JSD, 1024 rows",
        "liger-kernel",
        "liger_kernel.chunked_loss",
        "LigerFusedLinearJSDLoss",
        _fused,
        _liger_chunked(1024, compiled=False),
        is_mean=True,
    ),
    Baseline(
        "Liger chunked JSD, 128 rows",
        "liger-kernel",
        "liger_kernel.chunked_loss",
        "LigerFusedLinearJSDLoss",
        _fused,
        _liger_chunked(128, compiled=False),
        is_mean=True,
    ),
    Baseline(
        "Liger chunked JSD, compiled",
        "liger-kernel",
        "liger_kernel.chunked_loss",
        "LigerFusedLinearJSDLoss",
        _fused,
        _liger_chunked(1024, compiled=True),
        is_mean=True,
        is_compiled=True,
        cuda_only=True,
    ),
    Baseline(
        "Liger fused linear JSD, Triton",
        "liger-kernel",
        "liger_kernel.transformers.fused_linear_jsd",
        "LigerFusedLinearJSD",
        _fused,
        _liger_fused,
        is_mean=True,
        cuda_only=True,
    ),
    Baseline(
        "TRL chunked divergence",
        "trl",
        "trl.kernels.chunked_divergence",
        "ChunkedDivergenceFunction",
        _fused,
        _trl_chunked,
        slow_on_cpu=True,
    ),
)


def start_megatron(tp: int) -> None:
    """Make Megatron's tensor-parallel group, over all ranks of this process group."""
    assert dist.get_world_size() == tp, "one tensor-parallel group, no data parallelism"
    state = importlib.import_module("megatron.core.parallel_state")
    state.initialize_model_parallel(tensor_model_parallel_size=tp)
