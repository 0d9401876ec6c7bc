"""The loss's Triton kernels on a GPU against float64 there: what tools/gpu_bench.py asks first.

Shapes: T tokens, V vocabulary rows, D hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel import distillation_loss

WIDTH = 18_992  # columns of a row: more than a program reads at once
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}  # of gradients


def is_right() -> bool:
    """Prints the errors, relative to float64's largest; False where one is too large."""
    good = True
    for estimator, divergence in (
        ("sampled", "reverse_kl"),
        ("full_vocab", "reverse_kl"),
        ("full_vocab", "forward_kl"),
    ):
        for dtype, bound in BOUNDS.items():
            for excluded in (False, True):
                errors = logits_errors(estimator, divergence, dtype, excluded)
                right = errors[0] < 1e-5 and errors[1] < bound
                good &= right
                name = "sampled" if estimator == "sampled" else divergence
                words = f"{name}, {dtype}{', some columns -inf' if excluded else ''}"
                verdict = "" if right else "   TOO LARGE"
                print(f"{words:<52} loss {errors[0]:.1e}  gradient {errors[1]:.1e}{verdict}")
    for backend in ("torch", "triton"):
        error = hidden_error(backend)
        good &= error < 1e-2
        print(f"{f'hidden states, bf16, {backend}':<52} gradients {error:.1e}")
    return good


def logits_errors(
    estimator: str, divergence: str, dtype: torch.dtype, excluded: bool
) -> tuple[float, float]:
    """(of the loss, of the gradient), V a few less than the rows hold, so that reads are uneven."""
    tokens, valid = 192, WIDTH - 7
    torch.manual_seed(0)
    base = 3.0 * torch.randn(tokens, WIDTH, device="cuda")
    rows = [(base + torch.randn_like(base)).to(dtype) for _ in range(3)]
    rows[0][1] += 100.0  # no softmax may notice
    for x in rows if excluded else ():
        x[:, 300:9000] = x[:, -100] = -torch.inf

    def run(working: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
        student, teacher, reference = (x.to(working) for x in rows)
        student = student.clone().requires_grad_()
        places = torch.arange(tokens, device="cuda")
        one = torch.ones(tokens, dtype=torch.float64, device="cuda")
        result = distillation_loss(
            student,
            teacher,
            reference=reference,
            tokens=places,
            mask=places % 5 != 0,
            vocab_size=valid,
            coefficients=lambda statistics: (one, places % 2 == 0, 0.1 * one),
            estimator=estimator,
            divergence=divergence,
            temperature=0.9,
            backend=backend,
        )
        result.loss.backward()
        assert student.grad is not None
        return result.loss.detach().double(), student.grad.double()

    (want, wanted), (loss, gradient) = run(torch.float64, "torch"), run(dtype, "triton")
    worst = (gradient - wanted).abs().max() / wanted.abs().max()
    return float((loss - want).abs() / want.abs()), float(worst)


def hidden_error(backend: str) -> float:
    """The worse of hidden states' and head's gradients, against float64 of the same numbers."""
    tokens, width, hidden = 700, 9_000, 256
    torch.manual_seed(0)
    numbers = [torch.randn(tokens, hidden, device="cuda")]
    numbers += [torch.randn(width, hidden, device="cuda") * 0.2 for _ in range(2)]

    def run(working: torch.dtype, backend: str) -> list[Tensor]:
        states, student, teacher = (x.bfloat16().to(working).clone() for x in numbers)
        states.requires_grad_()
        student.requires_grad_()
        if working != torch.float64:
            student.main_grad = torch.zeros(width, hidden, device="cuda")  # type: ignore[attr-defined]
        one = torch.ones(tokens, device="cuda")
        distillation_loss(
            (states, student),
            (states.detach(), teacher),
            tokens=torch.arange(tokens, device="cuda"),
            mask=one,
            vocab_size=width,
            coefficients=lambda statistics: (one, one, 0.0 * one),
            lambdas=(1.0,),
            estimator="full_vocab",
            chunk_tokens=256,
            backend=backend,
        ).loss.backward()
        assert states.grad is not None
        head_grad = getattr(student, "main_grad", student.grad)
        assert head_grad is not None
        return [states.grad.double(), head_grad.double()]

    pairs = zip(run(torch.bfloat16, backend), run(torch.float64, "torch"), strict=True)
    return max(float((got - want).norm() / want.norm()) for got, want in pairs)
