"""One case of `distillation_loss` in full: logits or hidden states, the method, the options.

With models given as (hidden [T, D], head [N, D]) the logits are matrix products, whose own rounding
enters the bounds as an error of the logits. In bf16 that is the product's rounding to bf16 for the
frozen models; the student's logits, which make most of the gradient's error, are asked for as if
such a product and its remainder had been added: 2 u^2.

Shapes: T tokens, N vocabulary entries in all, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from megatron_sgopd import sgopd
from megatron_sgopd.preflight.numerics import bounds
from megatron_sgopd.preflight.numerics.bounds import U32, Softmax
from megatron_sgopd.preflight.numerics.cases import Case, Loss
from megatron_sgopd.preflight.numerics.inputs import Inputs

MODELS = ("student", "teacher", "reference")
LAMBDAS = {"sg_opd": (1.0, 1.8), "exopd": (1.25,)}
WIDTHS = {"student": 16, "teacher": 24, "reference": 16}  # D: a teacher may have its own
ADVANTAGE = 0.7  # |a1|, which only `grpo` reads beyond its sign


@dataclass(frozen=True)
class Problem:
    """Float64 logits [T, N] of all models, and what the loss is told of them."""

    loss: Loss
    dtype: torch.dtype  # of logits, hidden states and heads
    inputs: Inputs
    logits: dict[str, Tensor]
    hidden: dict[str, tuple[Tensor, Tensor]]  # (hidden, head) by model; empty for logits
    coefficients: Callable[[Any], Any]  # of all tokens, lambda as a number
    function: Callable[[Any], Any]  # the same as the case hands it over
    options: dict[str, Any]  # what fast path and reference both take
    scale: Tensor  # [T]

    def logit_error(self, model: str) -> Tensor:
        """Bounds what the logits over the temperature are off by, [T, N]."""
        t, logits = self.loss.temperature, self.logits[model]
        error = torch.zeros_like(logits)
        if model in self.hidden:
            hidden, head = self.hidden[model]
            error = product_error(hidden, head.T)
            roundoff, _ = bounds.ROUNDOFF[self.dtype]
            if roundoff > U32:  # CPUs hand over a product in the type of its factors
                roundoff = 2 * roundoff**2 if model == "student" else roundoff
                error = error + roundoff * logits.abs()
        if t != 1.0:  # the quotient's own rounding, of the logits as they are
            error = error + U32 * logits.abs()
        return error / t

    def softmax(self, model: str) -> Softmax:
        return bounds.softmax(self.logits[model] / self.loss.temperature, self.logit_error(model))

    def statistics(self) -> SimpleNamespace:
        """Computes what coefficients read: the sampled tokens' log-probs, [T] each."""
        at = self.inputs.tokens[:, None]
        picked = {m: self.softmax(m).log_p.gather(-1, at)[:, 0] for m in MODELS}
        return SimpleNamespace(**{f"{m}_logprobs": x for m, x in picked.items()})

    def extras(self, chunk_tokens: int) -> dict[str, Any]:
        """Options that the plain reference does not have."""
        loss = self.loss
        out: dict[str, Any] = {}
        if loss.chunked:
            out["chunk_tokens"] = chunk_tokens
        if loss.overwrite:
            out["overwrite_student"] = True
        return out


def product_error(a: Tensor, b: Tensor) -> Tensor:
    """Rounding error of a @ b in fp32, whatever the order of summation: n u |a| |b|."""
    return a.shape[-1] * U32 * (a.abs() @ b.abs())


def problem_of(case: Case, x: Inputs) -> Problem:
    assert case.loss is not None, f"{case.name} has no options of the loss"
    loss = case.loss
    hidden = draw_hidden(case) if loss.hidden else {}
    given = {"student": x.student, "teacher": x.teacher, "reference": x.reference}
    advantage = ADVANTAGE * x.signs
    outcome = sgopd.Outcome(advantage, x.signs > 0, torch.zeros(len(x.signs)).bool())
    method = sgopd.coefficients(loss.method, lambda_uniform=1.25)

    def coefficients(stats: Any) -> Any:
        return method(stats, outcome)

    a1 = advantage[:, None]
    options = {
        "tokens": x.tokens,
        "mask": x.mask,
        "lambdas": LAMBDAS.get(loss.method, (1.0,)),
        "estimator": loss.estimator,
        "divergence": loss.divergence,
        "beta": loss.beta,
        "top_k": loss.top_k,
        "temperature": loss.temperature,
        "token_scale": x.weights.float() if loss.token_scale else None,
        "candidate_lambda": (lambda a2, i: sgopd.candidate_lambda(a1[i].to(a2), a2))
        if loss.candidate
        else None,
    }
    return Problem(
        loss,
        getattr(torch, case.rows.dtype),
        x,
        {m: h @ w.T for m, (h, w) in hidden.items()} or given,
        hidden,
        coefficients,
        method.for_batch(outcome) if loss.token_local else coefficients,
        options,
        x.weights if loss.token_scale else torch.ones_like(x.weights),
    )


def draw_hidden(case: Case) -> dict[str, tuple[Tensor, Tensor]]:
    """(hidden [T, D], head [N, D]) of every model; logits have a standard deviation of 3."""
    g = torch.Generator().manual_seed(77 + case.rows.seed)
    dtype, out = getattr(torch, case.rows.dtype), {}
    for name, width in WIDTHS.items():
        hidden = torch.randn(case.rows.tokens, width, generator=g, dtype=torch.float64)
        head = torch.randn(case.rows.vocab, width, generator=g, dtype=torch.float64)
        out[name] = (hidden.to(dtype).double(), (head * 3 / width**0.5).to(dtype).double())
    return out
