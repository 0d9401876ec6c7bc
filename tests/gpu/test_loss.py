"""The loss on a GPU against float64 on the CPU, with either back end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel import distillation_loss
from megatron_sgopd.vocab_parallel.backend import kernels
from tests.support.triton_cases import chunk_of, draw, make, shard_of

T, V = 24, 9000  # more than two tiles of a program
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
BACKENDS = ("torch", "triton")
OBJECTIVES = {
    "sampled": {"estimator": "sampled"},
    "reverse KL": {"estimator": "full_vocab"},
    "forward KL": {"estimator": "full_vocab", "divergence": "forward_kl"},
}


def rows(dtype: torch.dtype, excluded: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(0)
    teacher = torch.randn(T, V)
    inputs = {
        "teacher": teacher,
        "student": teacher + torch.randn(T, V),
        "reference": teacher + torch.randn(T, V),
    }
    if excluded:  # by all models, among them all that some threads read
        for x in inputs.values():
            x[:, 40:4000] = x[:, -12] = -torch.inf
    return {k: x.to(dtype) for k, x in inputs.items()}  # the same numbers on both devices


def loss_and_gradient(
    inputs: dict[str, Tensor], device: str, dtype: torch.dtype, **options: Any
) -> tuple[Tensor, Tensor]:
    given = {k: x.to(device, dtype) for k, x in inputs.items()}
    student = given.pop("student").requires_grad_()
    tokens = torch.arange(T, device=device)
    last = tokens % 3 == 0
    one = torch.ones(T, dtype=torch.float64, device=device)
    result = distillation_loss(
        student,
        given["teacher"],
        reference=given["reference"],
        tokens=tokens,
        mask=tokens % 7 != 0,
        vocab_size=V - 9,  # some rows are padding
        coefficients=lambda stats: (one, last, 0.1 * one),
        token_scale=one / T,
        **options,
    )
    result.loss.backward()
    assert student.grad is not None
    return result.loss.detach().double().cpu(), student.grad.double().cpu()


@pytest.mark.parametrize("excluded", [False, True], ids=["", "excluded"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_and_gradient_are_those_of_float64(
    backend: str, objective: str, dtype: torch.dtype, excluded: bool
) -> None:
    inputs, options = rows(dtype, excluded), OBJECTIVES[objective] | {"temperature": 0.9}
    want, gradient = loss_and_gradient(inputs, "cpu", torch.float64, **options)
    loss, ours = loss_and_gradient(inputs, "cuda", dtype, backend=backend, **options)
    assert abs(loss - want) <= 1e-5 * abs(want)
    assert (ours - gradient).abs().max() <= BOUNDS[dtype] * gradient.abs().max()


@pytest.mark.parametrize("in_main_grad", [False, True], ids=["grad", "main_grad"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_hidden_states_and_a_bf16_head(backend: str, objective: str, in_main_grad: bool) -> None:
    torch.manual_seed(0)
    hidden, heads = torch.randn(T, 64), [torch.randn(V, 64) * 0.2 for _ in range(3)]
    numbers = [x.bfloat16() for x in (hidden, *heads)]

    def run(device: str, dtype: torch.dtype, name: str) -> tuple[Tensor, ...]:
        states, student, teacher, reference = (x.to(device, dtype) for x in numbers)
        states.requires_grad_()
        student.requires_grad_()
        if in_main_grad and device == "cuda":
            student.main_grad = torch.zeros(V, 64, device=device)  # type: ignore[attr-defined]
        tokens = torch.arange(T, device=device)
        one = torch.ones(T, dtype=torch.float64, device=device)

        class Coefficients:
            def __call__(self, stats: Any) -> tuple[Tensor, ...]:
                return self.select(tokens)(stats)

            def select(self, index: Any) -> Any:
                return lambda stats: (one[index], (tokens % 3 == 0)[index], 0.1 * one[index])

        result = distillation_loss(
            (states, student),
            (states.detach(), teacher),
            reference=(states.detach(), reference),
            tokens=tokens,
            mask=tokens % 7 != 0,
            vocab_size=V - 9,
            coefficients=Coefficients(),
            chunk_tokens=10,
            backend=name,
            **OBJECTIVES[objective],
        )
        result.loss.backward()
        head_grad = getattr(student, "main_grad", student.grad)
        assert states.grad is not None and head_grad is not None
        return tuple(x.detach().double().cpu() for x in (result.loss, states.grad, head_grad))

    want = run("cpu", torch.float64, "torch")
    for ours, right in zip(run("cuda", torch.bfloat16, backend), want, strict=True):
        assert (ours - right).norm() <= 2e-2 * right.norm()  # the gradient is rounded on the way


def test_rows_beyond_two_to_the_31_elements() -> None:
    count, width = 17_000, 131_072  # 4.5 GB a matrix, of which three are there at once
    last = [x.bfloat16() for x in draw(2, width)[:2]]

    def gradient_of_last(backend: str, device: str, num_rows: int, dtype: torch.dtype) -> Tensor:
        models = [torch.zeros(num_rows, width, device=device, dtype=dtype) for _ in last]
        for matrix, x in zip(models, last, strict=True):
            matrix[-2:] = x.to(device, dtype)
        mask = torch.zeros(num_rows, device=device)
        mask[-2:] = 1.0
        one = torch.ones(num_rows, dtype=torch.float64, device=device)
        distillation_loss(
            models[0].requires_grad_(),
            models[1],
            tokens=torch.zeros(num_rows, dtype=torch.long, device=device),
            mask=mask,
            vocab_size=width,
            coefficients=lambda s: (one, one, one),
            lambdas=(1.0,),
            estimator="full_vocab",
            backend=backend,
        ).loss.backward()
        assert models[0].grad is not None
        return models[0].grad[-2:].double().cpu()

    ours = gradient_of_last("triton", "cuda", count, torch.bfloat16)
    want = gradient_of_last("torch", "cpu", 2, torch.float64)
    assert (ours - want).abs().max() <= BOUNDS[torch.bfloat16] * want.abs().max()


@pytest.mark.parametrize("kind", ["sampled", "reverse", "forward"])
def test_kernels_never_wait_for_the_gpu(kind: str) -> None:
    shard = shard_of(torch.arange(4, device="cuda"), 523)
    objective = make(kind, shard, "triton")
    chunk = chunk_of(tuple(x.to("cuda") for x in draw(4, 523)), shard)
    launched = kernels("triton", True, chunk.student)
    assert launched is not None
    one = torch.ones(4, device="cuda")
    factors = launched.Factors(one, one, one, one, one)
    for mode in ("default", "error"):  # compiling may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            local = objective.statistics(chunk)
            launched.gradient(objective, chunk, local, factors)
        finally:
            torch.cuda.set_sync_debug_mode("default")
