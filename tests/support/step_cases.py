"""One optimizer step under a layout, and the formula it must equal, written out in float64.

`expected` works the formula out, once, in the test's own process; the rank functions that are
compared with it run in the worker pool.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM

from megatron_sgopd import sgopd
from megatron_sgopd.config.schema import (
    Config,
    DistillConfig,
    FrozenConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    StudentConfig,
)
from megatron_sgopd.distributed.groups import Groups
from megatron_sgopd.metrics import Clock
from megatron_sgopd.model.weight_stream import iter_hf_weights
from megatron_sgopd.preflight.layout_check import full_gradients
from megatron_sgopd.training.frozen import Frozen
from megatron_sgopd.training.load_models import (
    Vocabulary,
    load_reference,
    load_student,
    load_teacher,
)
from megatron_sgopd.training.objective import Objective, outcome_of
from megatron_sgopd.training.step import (
    accumulate_gradients,
    gather_metrics,
    prepare,
    run_schedule,
    train_step,
)
from megatron_sgopd.training.student import Student, make_student
from megatron_sgopd.training.tie_width import measure_tie_width
from megatron_sgopd.types import Completion, Prompt, Rollout
from tests.support.layouts import layout

GATE_EDGE = 1e-4  # tokens this close to a gate edge are drawn again before layouts are compared


@dataclass(frozen=True)
class StepCase:
    student: str
    teacher: str
    reference: str
    vocab: int
    tp: int = 1
    micro_batch_size: int = 2
    estimator: str = "sampled"
    method: str = "sg_opd"
    aggregation: str = "seq_mean_token_mean"
    seed: int = 0
    order: int | None = None  # shuffle the rollouts with this seed
    long_first: bool = False  # a replica with one long sequence and its neighbours short
    mask_truncated: bool = True
    parallel: tuple[tuple[str, Any], ...] = ()  # other fields of ParallelConfig
    frozen: tuple[tuple[str, Any], ...] = ()  # fields of the teacher's and reference's config
    offload_optimizer: bool = False
    forward_only_first: bool = False  # and after: they must leave no gradient
    dtype: str = "float32"
    flash: bool = False  # let torch take its flash kernel

    def problem(self) -> StepCase:
        """The case without its layout: what decides the numbers."""
        plain = StepCase(self.student, self.teacher, self.reference, self.vocab)
        kept = ("estimator", "method", "aggregation", "seed", "order", "mask_truncated")
        return replace(plain, **{name: getattr(self, name) for name in kept})


def config_of(case: StepCase) -> Config:
    return Config(
        name="step",
        model=ModelConfig(
            dtype=case.dtype,  # type: ignore[arg-type]
            student=StudentConfig(hf_path=case.student),
            teacher=FrozenConfig(hf_path=case.teacher, **dict(case.frozen)),
            reference=FrozenConfig(hf_path=case.reference, **dict(case.frozen)),
        ),
        parallel=parallel_of(case),
        distill=DistillConfig(
            method=case.method,  # type: ignore[arg-type]
            estimator=case.estimator,  # type: ignore[arg-type]
            loss_agg=case.aggregation,  # type: ignore[arg-type]
            mask_truncated=case.mask_truncated,
            chunk_tokens=16,
        ),
        rollout=RolloutConfig(tis="token", tis_cap=1.5),
        optimizer=OptimizerConfig(
            lr=1e-3, clip_grad=1.0, weight_decay=0.1, offload=case.offload_optimizer
        ),
    )


def parallel_of(case: StepCase) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=case.tp,
        micro_batch_size=case.micro_batch_size,
        **{"make_vocab_size_divisible_by": 1, **dict(case.parallel)},
    )


# -- the rollouts ----------------------------------------------------------------------------------


def draw_rollouts(case: StepCase) -> list[Rollout]:
    """Eight ragged rollouts: 1 to 60 tokens, one empty, one truncated, one of the teacher."""
    return list(_draw_rollouts(case.problem()))


@lru_cache(maxsize=64)  # many layouts are tried on few problems
def _draw_rollouts(case: StepCase) -> list[Rollout]:
    models = {name: hf_model(getattr(case, name)) for name in ("student", "teacher")}
    rng = random.Random(case.seed)
    lengths = [60, 1, 0, 7, 23, 2, 41, 12]
    rollouts = []
    for i, length in enumerate(lengths):
        prompt = tuple(rng.randrange(case.vocab) for _ in range(rng.randint(1, 6)))
        answer = _draw_answer(models, prompt, length, case.vocab, rng)
        finish = "length" if i == 4 else "stop"
        completion = Completion(
            answer,
            tuple(rng.uniform(-5, -1) for _ in answer),
            finish,
            0,
            i,  # type: ignore[arg-type]
        )
        correct = rng.random() < 0.5
        rollouts.append(
            Rollout(
                Prompt(f"p{i}", prompt, "1"),
                completion,
                "teacher" if i == 5 else "student",
                correct,
                verifier_advantage=[0.9, -1.1, 0.0][i % 3],
            )
        )
    if case.order is not None:
        random.Random(case.order).shuffle(rollouts)
    return rollouts


def _draw_answer(
    models: dict[str, Any], prompt: tuple[int, ...], length: int, vocab: int, rng: random.Random
) -> tuple[int, ...]:
    """Tokens none of which has |a2| at the gate's edge, where layouts may rightly differ."""
    while True:
        answer = tuple(rng.randrange(vocab) for _ in range(length))
        logps = [token_logprobs(m, prompt, answer) for m in models.values()]
        if not length or bool(((logps[1] - logps[0]).abs() > GATE_EDGE).all()):
            return answer


def hf_model(path: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float64, attn_implementation="eager"
    )


def all_logprobs(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    """log softmax of the rows that predict the answer's tokens, [|y|, vocab]."""
    ids = torch.tensor([[*prompt, *answer]])
    rows = model(input_ids=ids, use_cache=False).logits[0].double()
    return rows[len(prompt) - 1 : len(prompt) - 1 + len(answer)].log_softmax(-1)


def token_logprobs(model: Any, prompt: tuple[int, ...], answer: tuple[int, ...]) -> Tensor:
    if not answer:
        return torch.empty(0, dtype=torch.float64)
    with torch.no_grad():
        logps = all_logprobs(model, prompt, answer)
    return logps.gather(-1, torch.tensor(answer)[:, None])[:, 0]


# -- the formula, in float64, one sequence at a time -----------------------------------------------


def formula(case: StepCase) -> tuple[float, dict[str, Tensor]]:
    """The step's loss and gradient by Hugging Face models and autograd, term by term."""
    student, teacher, reference = (
        hf_model(getattr(case, name)) for name in ("student", "teacher", "reference")
    )
    config, rollouts = config_of(case), draw_rollouts(case)
    lengths = [_loss_tokens(r, case) for r in rollouts]
    terms = []
    for rollout, length in zip(rollouts, lengths, strict=True):
        if length == 0:
            continue
        token_losses = _token_losses(case, config, rollout, student, teacher, reference)
        if case.aggregation == "token_mean":
            terms.append(token_losses.sum() / sum(lengths))
        else:
            terms.append(token_losses.sum() / length / len(rollouts))
    loss = torch.stack(terms).sum()
    loss.backward()
    return loss.item(), {n: p.grad for n, p in student.named_parameters() if p.grad is not None}


def _loss_tokens(rollout: Rollout, case: StepCase) -> int:
    cut = rollout.completion.finish_reason == "length" and case.mask_truncated
    return 0 if cut else len(rollout.completion.token_ids)


def _token_losses(
    case: StepCase, config: Config, rollout: Rollout, student: Any, teacher: Any, reference: Any
) -> Tensor:
    prompt, answer = rollout.prompt.token_ids, rollout.completion.token_ids
    picked = torch.tensor(answer)[:, None]
    s_rows = all_logprobs(student, prompt, answer)
    with torch.no_grad():
        t_rows, r_rows = (all_logprobs(m, prompt, answer) for m in (teacher, reference))
    s, t, r = (rows.gather(-1, picked)[:, 0] for rows in (s_rows, t_rows, r_rows))
    if rollout.source == "teacher" or case.method == "sft":
        return -s
    a2 = (t - s).detach()
    open_ = (rollout.verifier_advantage * a2 > 0) & (case.method == "sg_opd")
    lam = torch.where(open_, torch.tensor(1.8).double(), torch.tensor(1.0).double())
    engine = torch.tensor(rollout.completion.logprobs, dtype=torch.float64)
    tis = (s.detach() - engine).exp().clamp(max=config.rollout.tis_cap)
    if case.estimator == "sampled":
        return -tis * (a2 + (lam - 1) * (t - r)) * s
    target = (lam[:, None] * t_rows + (1 - lam[:, None]) * r_rows).log_softmax(-1)
    return tis * (s_rows.exp() * (s_rows - target)).sum(-1)


# -- the same under Megatron -----------------------------------------------------------------------


@dataclass(frozen=True)
class Parts:
    student: Student
    teacher: Frozen
    reference: Frozen
    groups: Groups
    config: Config
    objective: Objective


@contextmanager
def groups_of(case: StepCase) -> Iterator[Groups]:
    """The case's layout, and attention by torch's plain kernel.

    On CPU the flash kernel's exponential is an approximation: gradients come out 1e-5 to 3e-5 off
    in fp32 on one rank already, more than any layout adds (test_the_flash_kernel_is_less_exact).
    """
    kernels = [SDPBackend.MATH, *([SDPBackend.FLASH_ATTENTION] if case.flash else [])]
    parallel = {"micro_batch_size": case.micro_batch_size, **dict(case.parallel)}
    with layout(tp=case.tp, **parallel) as groups, sdpa_kernel(kernels):
        yield groups


def assemble_parts(case: StepCase, groups: Groups) -> Parts:
    config = config_of(case)
    vocabulary = Vocabulary.from_config(config.model, config.distill)
    student = load_student(config.model, groups, vocabulary, trainable=True, seed=config.seed)
    frozen = [
        load_teacher(config.model, groups, vocabulary),
        load_reference(config.model, groups, vocabulary, seed=config.seed),
    ]
    return Parts(
        make_student(student, config.optimizer, config.num_steps),
        *frozen,
        groups,
        config,
        Objective.from_config(config.distill, config.rollout, eps=0.0),
    )


def my_share(rollouts: list[Rollout], groups: Groups, case: StepCase) -> list[Rollout]:
    if case.long_first:  # the long sequence alone on the first replica, all others on the second
        return rollouts[:1] if groups.dp_rank == 0 else rollouts[1:]
    size = len(rollouts) // groups.dp_size
    return rollouts[groups.dp_rank * size : (groups.dp_rank + 1) * size]


def gradients_of(case: StepCase, parts: Parts, rollouts: list[Rollout]) -> tuple[Any, Any]:
    """(metrics, gradients) of one step's schedule, without the update."""
    prepared = prepare(
        parts.teacher,
        parts.reference,
        my_share(rollouts, parts.groups, case),
        parts.objective,
        parts.config.distill,
        parts.groups,
    )
    if case.forward_only_first:  # a self-test or a tie width between steps must leave nothing
        run_schedule(
            parts.student,
            prepared.work,
            parts.objective,
            lambda part, result: None,
            forward_only=True,
        )
    loss, sums = accumulate_gradients(parts.student, prepared.work, parts.objective)
    if case.forward_only_first:
        kept = [p.main_grad.clone() for p in parts.student.model.parameters()]
        measure_tie_width(parts.student, parts.teacher, rollouts, parts.config)
        for p, g in zip(parts.student.model.parameters(), kept, strict=True):
            assert torch.equal(p.main_grad, g), "a forward-only pass wrote a gradient"
    metrics = gather_metrics(parts.groups, loss, sums | prepared.sums, prepared.work)
    return metrics, full_gradients(parts.student)


def gradient_errors(case: StepCase, expected: Expected) -> dict[str, Any]:
    """|loss - formula| and max|d|/max|ref| of each gradient, on this rank."""
    with groups_of(case) as groups:
        parts = assemble_parts(case, groups)
        metrics, gradients = gradients_of(case, parts, expected.rollouts)
    return {
        "missing": set(expected.gradients) ^ set(gradients),
        "loss": abs(metrics["train/loss"] - expected.loss) / max(abs(expected.loss), 1e-30),
        "gradients": {
            n: float((gradients[n].double() - g).abs().max() / g.abs().max())
            for n, g in expected.gradients.items()
            if n in gradients
        },
        "metrics": metrics,
        "frozen_gradients": sum(
            p.grad is not None or p.requires_grad or hasattr(p, "main_grad")
            for frozen in (parts.teacher, parts.reference)
            for p in frozen.model.parameters()
        ),
    }


@dataclass(frozen=True)
class Expected:
    """A problem's rollouts and its right answers in float64, without any layout."""

    rollouts: list[Rollout]
    loss: float
    gradients: dict[str, Tensor]
    norm: float  # of all gradients
    weights: dict[str, Tensor]  # after one step of torch's AdamW


def expected(case: StepCase) -> Expected:
    answer = _expected(replace(case.problem(), order=None))
    return replace(answer, rollouts=draw_rollouts(case))


@lru_cache(maxsize=32)
def _expected(case: StepCase) -> Expected:
    config = config_of(case)
    loss, gradients = formula(case)
    norm = float(torch.sqrt(sum((g**2).sum() for g in gradients.values())))  # type: ignore[arg-type]
    parameters = dict(hf_model(case.student).named_parameters())
    for name, p in parameters.items():
        p.grad = gradients[name] * min(1.0, config.optimizer.clip_grad / (norm + 1e-6))
    o = config.optimizer
    torch.optim.AdamW(
        [
            {"params": [p for p in parameters.values() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters.values() if p.dim() == 1], "weight_decay": 0.0},
        ],
        lr=o.lr,
        betas=(o.adam_beta1, o.adam_beta2),
        eps=o.adam_eps,
    ).step()
    after = {n: p.detach() for n, p in parameters.items()}
    return Expected([], loss, gradients, norm, after)


def step_errors(case: StepCase, expected: Expected) -> dict[str, float]:
    """Largest weight error after one optimizer step, against torch's AdamW in float64."""
    with groups_of(case) as groups:
        parts = assemble_parts(case, groups)
        metrics = train_step(
            parts.student,
            parts.teacher,
            parts.reference,
            my_share(expected.rollouts, groups, case),
            parts.objective,
            parts.config.distill,
            Clock(),
        )
        after = {n: w.clone() for n, w in iter_hf_weights(parts.student.model)}
        copies_differ = tied_copies_differ(parts.student, after)
    # AdamW's first step moves a weight by about lr * sign(g): where g is rounding noise its sign
    # is free, so weights are compared where the gradient stands clear of it.
    worst = 0.0
    for name, weight in expected.weights.items():
        gradient = expected.gradients[name]
        clear = gradient.abs() > 1e-3 * gradient.abs().max()
        worst = max(worst, float(((after[name].double() - weight) * clear).abs().max()))
    lr = parts.config.optimizer.lr
    return {
        "weights": worst / lr,
        "grad_norm": abs(metrics["train/grad_norm"] - expected.norm) / expected.norm,
        "lr": metrics["train/lr"],
        "norm": expected.norm,
        "copies_differ": copies_differ,
    }


def tied_copies_differ(student: Student, weights: dict[str, Tensor]) -> float:
    """Of a tied embedding's copy on the last pipeline stage from the one on the first."""
    groups = student.groups
    if "lm_head.weight" in weights or not groups.is_last_stage:
        return 0.0
    mine = student.model.last_chunk.lm_head_weight().detach()
    whole = weights["model.embed_tokens.weight"]
    rows = whole[groups.tp_rank * len(mine) : (groups.tp_rank + 1) * len(mine)]
    return float((mine[: len(rows)] - rows).abs().max())


def self_teacher(case: StepCase) -> dict[str, float]:
    """A teacher that is a copy of the student, through the real frozen path."""
    case = replace(case, teacher=case.student, reference=case.student)
    rollouts = [replace(r, source="student") for r in draw_any_rollouts(case)]
    with groups_of(case) as groups:
        parts = assemble_parts(case, groups)
        share = my_share(rollouts, groups, case)
        eps = measure_tie_width(parts.student, parts.teacher, share, parts.config)
        parts = replace(
            parts, objective=Objective.from_config(parts.config.distill, parts.config.rollout, eps)
        )
        metrics, gradients = gradients_of(case, parts, rollouts)
        norm = max(float(g.abs().max()) for g in gradients.values())
    return {"eps": eps, "open": metrics["gate/open_rate"], "gradient": norm}


def open_gates_of_a_self_teacher(case: StepCase, batches: int) -> float:
    """The largest share of open gates in many batches, with the tie width of the first."""
    case = replace(case, teacher=case.student, reference=case.student)
    with groups_of(case) as groups:
        parts = assemble_parts(case, groups)
        largest = 0.0
        for seed in range(batches):
            rollouts = draw_any_rollouts(replace(case, seed=seed))
            if seed == 0:
                eps = measure_tie_width(parts.student, parts.teacher, rollouts, parts.config)
                parts = replace(
                    parts,
                    objective=Objective.from_config(
                        parts.config.distill, parts.config.rollout, eps
                    ),
                )
            work = prepare(
                parts.teacher,
                parts.reference,
                rollouts,
                parts.objective,
                parts.config.distill,
                groups,
            ).work

            def share(part: Any, result: Any, options: Any = parts.objective.options) -> float:
                gate = sgopd.gate_of(result.statistics, outcome_of(part), options)
                return float(gate.float().mean())

            seen = run_schedule(parts.student, work, parts.objective, share, forward_only=True)
            largest = max(largest, *seen)
    return largest


def _centred(stats: Any, outcome: sgopd.Outcome, opt: sgopd.MethodOptions) -> sgopd.Coefficients:
    """OPD whose tokens are weighted by their distance from the batch's mean T - S."""
    assert outcome.batch_sums is not None and outcome.sequence_ids is not None
    total, count = outcome.batch_sums
    a2 = sgopd.teacher_signal(stats)
    return sgopd.Coefficients(a2 - total / count, torch.zeros_like(a2, dtype=torch.bool), 0.0 * a2)


def _mean_gap(stats: Any, outcome: sgopd.Outcome) -> Tensor:
    a2 = sgopd.teacher_signal(stats)
    trained = stats.student_logprobs != 0
    return torch.stack([a2[trained].sum().double(), trained.sum().double()])


def gradients_of_a_batch_method(case: StepCase) -> tuple[float, dict[str, Tensor]]:
    """(loss, gradients) of a method that needs sums over the step's global batch."""
    method = sgopd.Method(_centred, token_local=False, summarize=_mean_gap)
    sgopd.METHODS["centred"] = method
    try:
        with groups_of(replace(case, method="centred")) as groups:
            parts = assemble_parts(replace(case, method="centred"), groups)
            parts = replace(parts, objective=replace(parts.objective, method="centred"))
            metrics, gradients = gradients_of(case, parts, draw_any_rollouts(case))
    finally:
        del sgopd.METHODS["centred"]
    return metrics["train/loss"], gradients


def padding_errors(
    case: StepCase, padded: StepCase, shared: int
) -> tuple[float, dict[str, float], float]:
    """The step of `case` against that of the padded models on the same rollouts.

    Error of the loss, of each gradient's first rows, and the largest gradient beyond them.
    """
    rollouts, results = draw_any_rollouts(case), []
    paths = {name: getattr(padded, name) for name in ("student", "teacher", "reference")}
    for each in (case, replace(case, **paths)):
        with groups_of(each) as groups:
            results.append(gradients_of(each, assemble_parts(each, groups), rollouts))
    (metrics, wanted), (got_metrics, got) = results
    errors, beyond = {}, 0.0
    for name, gradient in wanted.items():
        rows = slice(shared) if "embed" in name or "lm_head" in name else slice(None)
        worst = (got[name][rows] - gradient).abs().max()
        errors[name] = float(worst / gradient.abs().max())
        beyond = max(beyond, float(got[name][shared:].abs().sum()) if rows.stop else 0.0)
    return abs(got_metrics["train/loss"] / metrics["train/loss"] - 1), errors, beyond


def tie_width(case: StepCase) -> float:
    """As measured at a run's start, with the student in the teacher's layout."""
    with groups_of(case) as groups:
        parts = assemble_parts(case, groups)
        return measure_tie_width(
            parts.student, parts.teacher, draw_any_rollouts(case), parts.config
        )


def load_error(case: StepCase) -> str:
    with groups_of(case) as groups:
        try:
            assemble_parts(case, groups)
        except ValueError as error:
            return str(error)
    return "no error"


def repeated_gradients(case: StepCase, copies: int) -> float:
    """How far the gradient of one rollout repeated in `copies` micro-batches is from it alone.

    The mean over the batch makes them equal; by a power of two, in bfloat16 exactly.
    """
    gradients = []
    for count in (1, copies):
        with groups_of(case) as groups:
            parts = assemble_parts(case, groups)
            gradients.append(gradients_of(case, parts, draw_any_rollouts(case)[:1] * count)[1])
    one, many = gradients
    return max(float((many[n] - g).abs().max() / g.abs().max()) for n, g in one.items())


def draw_any_rollouts(case: StepCase) -> list[Rollout]:
    rng = random.Random(case.seed)
    return [
        Rollout(
            Prompt(f"p{i}", tuple(rng.randrange(case.vocab) for _ in range(3)), "1"),
            Completion(
                tuple(rng.randrange(case.vocab) for _ in range(9)), (-3.0,) * 9, "stop", 0, i
            ),
            "student",
            i % 2 == 0,
            verifier_advantage=1.0 if i % 2 == 0 else -1.0,
        )
        for i in range(4)
    ]


def world_size() -> int:
    return dist.get_world_size()


METHODS = tuple(sgopd.METHODS)
