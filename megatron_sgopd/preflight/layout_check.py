"""`sgopd doctor --parallel`: does this machine, under this layout, compute what one rank computes?

A tiny student, teacher and reference of the recipe's shape family take one step's forward and
backward pass through everything a run goes through: packing, scoring, hand-over, Megatron's
schedule, the loss on vocabulary shards, gradient reduction. Rank 0 does the same sums alone with
transformers and autograd, one rollout at a time, and compares loss and every gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_sgopd.config.schema import Config, DistillConfig
from megatron_sgopd.distributed.groups import Groups, from_first_rank, initialize, inner_groups
from megatron_sgopd.model.gpt import build_model
from megatron_sgopd.model.weight_stream import iter_hf_weights, load_stream
from megatron_sgopd.preflight.tiny_models import (
    ROLES,
    VOCAB,
    draw_rollouts,
    logits_of,
    make_models,
    shrink,
)
from megatron_sgopd.training.frozen import Frozen
from megatron_sgopd.training.objective import Objective, Scores
from megatron_sgopd.training.packing import micro_batches, num_loss_tokens, token_scales
from megatron_sgopd.training.step import accumulate_gradients, gather_metrics, prepare
from megatron_sgopd.training.student import Student, make_student
from megatron_sgopd.types import Rollout

TOLERANCE = 1e-5  # fp32: of the loss, and of max|d| / max|ref| per parameter


@dataclass(frozen=True)
class Report:
    """Describes what came out of the comparison; errors are max|d| / max|ref|."""

    layout: str
    models: str
    loss: float
    expected_loss: float
    gradient_errors: dict[str, float]
    gradient_ratios: dict[str, float]  # least-squares factor of ours on the expected
    missing: list[str]

    @property
    def worst(self) -> str:
        return max(self.gradient_errors, key=lambda n: self.gradient_errors[n])

    @property
    def loss_error(self) -> float:
        return abs(self.loss - self.expected_loss) / max(abs(self.expected_loss), 1e-30)

    @property
    def ok(self) -> bool:
        finite = self.gradient_errors[self.worst] < TOLERANCE  # False for NaN
        return finite and self.loss_error < TOLERANCE and not self.missing

    def lines(self) -> list[str]:
        """The account a person reads."""
        errors = sorted(self.gradient_errors.items(), key=lambda e: -e[1])
        lines = [
            f"layout     {self.layout}",
            f"models     {self.models}",
            f"loss       {self.loss:.8f} here, {self.expected_loss:.8f} on one rank (relative "
            f"error {self.loss_error:.1e})",
            f"gradients  of {len(errors)} parameters the worst is {self.worst}: {errors[0][1]:.1e}",
        ]
        if self.ok:
            return [*lines, f"ok: the layout computes what one rank does, within {TOLERANCE:.0e}"]
        wrong = [(n, e) for n, e in errors if not e < TOLERANCE]
        lines += [
            f"           {e:.1e}  {n} (ours is {self.gradient_ratios[n]:.4f} of it)"
            for n, e in wrong[:5]
        ]
        lines += [f"           no gradient at all: {n}" for n in self.missing]
        return [
            *lines,
            f"FAILED: {len(wrong)} of {len(errors)} gradients are wrong: {self._hint()}",
        ]

    def _hint(self) -> str:
        wrong = [n for n, e in self.gradient_errors.items() if not e < TOLERANCE]
        ratios = [self.gradient_ratios[n] for n in wrong]
        if wrong and len(wrong) == len(self.gradient_errors) and max(ratios) - min(ratios) < 1e-3:
            return f"all by the factor {ratios[0]:.4f}, as if the loss were scaled"
        if wrong and all("norm" in n for n in wrong):
            return "all of norms, as if their gradients were not summed over tensor parallel ranks"
        if not wrong and not self.missing:
            return "the gradients are right and the logged loss is not"
        return (
            "do not train with this layout; run again with parts of it switched off to find the "
            "one that breaks it, and report it with this output"
        )


def check_parallel(config: Config) -> Report:
    """Compares the recipe's layout with one rank. Collective; the same report on every rank."""
    groups = initialize(config.parallel, seed=config.seed)
    # torch's plain attention kernel: the CPU's flash kernel is only good to 3e-5.
    with sdpa_kernel(SDPBackend.MATH):
        config = shrink(config)
        models = make_models(config.model, config.distill, config.seed, groups)
        rollouts = draw_rollouts(models, groups.dp_size)
        objective = Objective.from_config(config.distill, config.rollout, eps=0.0)
        metrics, gradients = _under_the_layout(config, groups, models, rollouts, objective)
        report = None
        if groups.rank == 0:
            loss, expected = _on_one_rank(
                config.distill, groups.device, models, rollouts, objective
            )
            layout = _describe(config.distill, groups)
            report = _compare(layout, models, metrics["train/loss"], gradients, loss, expected)
    made: Report = from_first_rank(report)
    return made


def _compare(
    layout: str,
    models: dict[str, Any],
    loss: float,
    gradients: dict[str, Tensor],
    expected_loss: float,
    expected: dict[str, Tensor],
) -> Report:
    errors, ratios = {}, {}
    for name in expected.keys() & gradients.keys():
        ours, other = gradients[name].double(), expected[name].double()
        errors[name] = float((ours - other).abs().max() / other.abs().max())
        ratios[name] = float((ours * other).sum() / (other * other).sum())
    return Report(
        layout=layout,
        models="; ".join(
            f"{role} {m.config.num_hidden_layers} layers x {m.config.hidden_size}, "
            f"{m.config.num_attention_heads}/{m.config.num_key_value_heads} heads, "
            f"{'tied' if m.config.tie_word_embeddings else 'untied'} head"
            for role, m in models.items()
        ),
        loss=loss,
        expected_loss=expected_loss,
        gradient_errors=errors,
        gradient_ratios=ratios,
        missing=sorted(expected.keys() ^ gradients.keys()),
    )


def _describe(d: DistillConfig, groups: Groups) -> str:
    p = groups.config
    parts = [
        f"TP {groups.tp_size} x PP {groups.pp_size} x CP {groups.cp_size} x DP {groups.dp_size} "
        f"({groups.world_size} ranks, {dist.get_backend()} on {groups.device.type})"
    ]
    if p.virtual_pipeline_model_parallel_size:
        parts.append(f"{p.virtual_pipeline_model_parallel_size} interleaved chunks a stage")
    for name in ("sequence_parallel", "use_distributed_optimizer", "overlap_grad_reduce"):
        if getattr(p, name):
            parts.append(name.replace("_", " "))
    parts.append("packed" if p.micro_batch_tokens else "padded")
    if p.recompute_granularity != "none":
        parts.append(f"{p.recompute_granularity} recompute")
    return ", ".join(parts) + f"; {d.method}, {d.estimator}, {d.loss_agg}"


# -- both sides ------------------------------------------------------------------------------------


def _under_the_layout(
    config: Config,
    groups: Groups,
    models: dict[str, Any],
    rollouts: list[Rollout],
    objective: Objective,
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(metrics, full gradients) of one step's forward and backward passes."""
    megatron = {}
    for role, hf_model in models.items():
        own = None if role == "student" else getattr(config.model, role)
        layout = groups
        if own is not None:
            layout = inner_groups(
                groups, own.tensor_model_parallel_size, own.pipeline_model_parallel_size
            )
        megatron[role] = build_model(
            hf_model.config,
            layout,
            dtype=torch.float32,
            transformer_impl=config.model.transformer_impl,
            trainable=role == "student",
        )
        weights = ((n, p.detach()) for n, p in hf_model.named_parameters())
        load_stream(megatron[role], weights, source="the self-test")
    budget = config.parallel.hidden_states_budget_mb
    frozen = {
        role: Frozen(
            megatron[role],
            groups,
            getattr(config.model, role).offload,
            None if budget is None else budget * 2**20,
        )
        for role in ROLES[1:]
        if role in megatron
    }
    student = make_student(megatron["student"], config.optimizer, config.num_steps)
    share = len(rollouts) // groups.dp_size
    of_this_rank = rollouts[groups.dp_rank * share : (groups.dp_rank + 1) * share]
    prepared = prepare(
        frozen.get("teacher"),
        frozen.get("reference"),
        of_this_rank,
        objective,
        config.distill,
        groups,
    )
    loss, sums = accumulate_gradients(student, prepared.work, objective)
    metrics = gather_metrics(groups, loss, sums | prepared.sums, prepared.work)
    return metrics, full_gradients(student)


def full_gradients(student: Student) -> dict[str, Tensor]:
    """Every `main_grad` as whole Hugging Face tensors, through the weight stream. Collective."""
    for ddp in student.ddp:
        if ddp.ddp_config.use_distributed_optimizer:
            _gather_gradient_shards(ddp)
    parameters = list(student.model.parameters())
    kept = [p.data for p in parameters]
    for p in parameters:
        p.data = p.main_grad.clone()  # type: ignore[attr-defined]
    gradients = {n: g.clone() for n, g in iter_hf_weights(student.model)}
    for p, data in zip(parameters, kept, strict=True):
        p.data = data
    return gradients


def _gather_gradient_shards(ddp: Any) -> None:
    """Gathers gradients of which each data parallel rank has its share of a bucket summed up."""
    group = ddp.intra_dp_cp_group
    for buffer in ddp.buffers:
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            shards = [torch.empty_like(own) for _ in range(group.size())]
            dist.all_gather(shards, own, group=group)
            bucket.grad_data.copy_(torch.cat(shards))


def _on_one_rank(
    distill: DistillConfig,
    device: torch.device,
    models: dict[str, Any],
    rollouts: list[Rollout],
    objective: Objective,
) -> tuple[float, dict[str, Tensor]]:
    """The same loss and gradients by transformers and autograd, one rollout at a time."""
    masked = distill.mask_truncated
    scales = token_scales(
        rollouts,
        aggregation=distill.loss_agg,
        num_sequences=len(rollouts),
        num_tokens=sum(num_loss_tokens(r, masked) for r in rollouts),
        mask_truncated=masked,
    )
    total = 0.0
    for rollout, scale in zip(rollouts, scales, strict=True):
        (batch,) = micro_batches([rollout], [scale], micro_batch_size=1, mask_truncated=masked)
        if not bool(batch.loss_mask.any()):
            continue
        ids = tuple(batch.input_ids[0].tolist())
        with torch.no_grad():
            frozen = {role: logits_of(models[role], ids) for role in ROLES[1:] if role in models}
        result = objective.loss(
            logits_of(models["student"], ids),
            batch.to(device),
            Scores(frozen.get("teacher"), frozen.get("reference")),
            group=None,
            vocab_size=VOCAB,
        )
        result.loss.backward()
        total += float(result.loss.detach())
    student = models["student"]
    return total, {n: p.grad for n, p in student.named_parameters() if p.grad is not None}
