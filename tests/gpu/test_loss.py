"""The loss on a GPU against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel import distillation_loss

T, V = 96, 1000
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def loss_and_gradient(
    inputs: dict[str, Tensor], device: str, dtype: torch.dtype, estimator: str
) -> tuple[Tensor, Tensor]:
    given = {k: x.to(device, dtype) for k, x in inputs.items()}
    student = given.pop("student").requires_grad_()
    tokens = torch.arange(T, device=device) % V
    opened = torch.arange(T, device=device) % 3 == 0
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    high, low = torch.tensor([1.8, 1.0], dtype=wide, device=device)
    lam = torch.where(opened, high, low)
    result = distillation_loss(
        student,
        given["teacher"],
        reference=given["reference"],
        tokens=tokens,
        mask=torch.arange(T, device=device) % 7 != 0,
        vocab_size=V - 9,  # some rows are padding
        coefficients=lambda stats: (torch.ones_like(lam), lam, torch.full_like(lam, 0.1)),
        estimator=estimator,
        token_scale=torch.full_like(lam, 1 / T),
    )
    result.loss.backward()
    assert student.grad is not None
    return result.loss.detach().double().cpu(), student.grad.double().cpu()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("estimator", ["sampled", "full_vocab"])
def test_loss_and_gradient_are_those_of_float64(estimator: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    teacher = torch.randn(T, V)
    inputs = {
        "teacher": teacher,
        "student": teacher + torch.randn(T, V),
        "reference": teacher + torch.randn(T, V),
    }
    inputs = {k: x.to(dtype) for k, x in inputs.items()}  # the same numbers on both devices
    want, gradient = loss_and_gradient(inputs, "cpu", torch.float64, estimator)
    loss, ours = loss_and_gradient(inputs, "cuda", dtype, estimator)
    assert abs(loss - want) <= BOUNDS[dtype] * abs(want)
    assert (ours - gradient).abs().max() <= BOUNDS[dtype] * gradient.abs().max()
