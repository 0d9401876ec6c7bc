"""What vocab_parallel/test_triton_kernels asserts, measured in a process of its own.

`python -m tests.support.triton_cases interpret` runs the kernels under Triton's interpreter, and
`compile FOLDER` makes machine code of them; both print JSON. The interpreter must be asked for
before the kernels are imported, and it changes every kernel of the process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel import distillation_loss
from megatron_sgopd.vocab_parallel.blocks import Chunk
from megatron_sgopd.vocab_parallel.divergences import ForwardKL
from megatron_sgopd.vocab_parallel.objective import Coefficients, Objective
from megatron_sgopd.vocab_parallel.reverse_kl import ReverseKL
from megatron_sgopd.vocab_parallel.sampled import Sampled
from megatron_sgopd.vocab_parallel.shard import Shard
from megatron_sgopd.vocab_parallel.softmax import Layout

INF = torch.inf
KINDS = ("sampled", "reverse", "forward")
EXCLUDED = (
    "nothing",
    "all",
    "student",
    "teacher",
    "teacher and student",
    "underflow",
    "a whole row",
)


@dataclass(frozen=True)
class Case:
    """A loss of T tokens over `vocab` columns, `padding` columns of garbage behind them."""

    estimator: str = "full_vocab"
    divergence: str = "reverse_kl"
    lambdas: tuple[float, ...] = (1.0, 1.8)
    dtype: str = "float32"
    temperature: float = 1.0
    vocab: int = 523
    padding: int = 9
    all_active: bool = False
    reference: bool = True
    per_token: bool = False  # lambdas as tensors

    def __str__(self) -> str:
        kind = self.estimator if self.estimator == "sampled" else self.divergence
        rest = [self.dtype, f"v{self.vocab}", f"t{self.temperature}", *map(str, self.lambdas)]
        flags = [name for name in ("all_active", "reference", "per_token") if getattr(self, name)]
        return "-".join([kind, *rest, *flags])


LOSSES = [
    Case("sampled"),
    Case("sampled", dtype="bfloat16", temperature=0.7, reference=False, all_active=True),
    Case(lambdas=(1.0,), reference=False, all_active=True),
    Case(lambdas=(1.0,), dtype="bfloat16", temperature=1.3),
    Case(),
    Case(dtype="bfloat16", vocab=1001, all_active=True),
    Case(dtype="float16", lambdas=(0.5, 1.25)),
    Case(lambdas=(1.8,), temperature=0.5, per_token=True),
    Case(vocab=7, padding=0, lambdas=(0.5, 1.8)),
    Case(divergence="forward_kl", lambdas=(1.0,), reference=False),
    Case(divergence="forward_kl", temperature=0.7),
    Case(divergence="forward_kl", dtype="bfloat16", lambdas=(0.5, 1.8), all_active=True),
    Case(divergence="forward_kl", lambdas=(1.0, 1.0), per_token=True),
]
SHIFT = 1000.0  # of some rows, which no softmax may notice


def draw(tokens: int, vocab: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the student, the teacher and the reference, not far from each other."""
    g = torch.Generator().manual_seed(seed)
    base = 3.0 * torch.randn(tokens, vocab, generator=g)
    return tuple(base + torch.randn(tokens, vocab, generator=g) for _ in range(3))  # type: ignore[return-value]


def measure_loss(case: Case, tokens: int = 4) -> dict[str, float]:
    """Errors of value and gradient against float64 on the same numbers."""
    dtype = getattr(torch, case.dtype)
    rows = draw(tokens, case.vocab + case.padding)
    if dtype == torch.float32:
        rows[0][1] += SHIFT
        rows[1][2] -= SHIFT
    rows = tuple(x.to(dtype) for x in rows)
    student, teacher, reference = rows
    mask = torch.ones(tokens) if case.all_active else (torch.arange(tokens) % 4 != 2).float()
    lambdas: Any = case.lambdas
    if case.per_token:
        lambdas = tuple(torch.full((tokens,), lam, dtype=torch.float64) for lam in lambdas)

    def coefficients(statistics: Any) -> tuple[Tensor, Tensor, Tensor]:
        s = statistics.student_logprobs
        last = torch.arange(tokens) % 2 == 0
        weight = torch.arange(tokens, dtype=s.dtype) - 1.0  # one is 0
        return weight, last, 0.1 * weight + 0.3

    def run(backend: str, working: torch.dtype) -> tuple[Any, Tensor]:
        x = student.to(working).clone().requires_grad_()
        result = distillation_loss(
            x,
            teacher.to(working),
            reference=reference.to(working) if case.reference else None,
            tokens=torch.arange(tokens) * 5 % case.vocab,
            mask=mask,
            vocab_size=case.vocab,
            coefficients=coefficients,
            lambdas=lambdas,
            estimator=case.estimator,
            divergence=case.divergence,
            temperature=case.temperature,
            token_scale=torch.linspace(0.5, 1.5, tokens),
            backend=backend,
        )
        result.loss.backward()
        assert x.grad is not None
        return result, x.grad.double()

    (want, wanted), (got, gradient) = run("torch", torch.float64), run("triton", dtype)
    ours, right = got.statistics, want.statistics
    return {
        "losses": relative(got.token_losses, want.token_losses),
        "gradient": relative(gradient, wanted),
        "logprobs": float((ours.student_logprobs - right.student_logprobs).abs().max()),
        "entropy": float((ours.student_entropy - right.student_entropy).abs().max()),
        "elsewhere": float(gradient[mask == 0].abs().sum() + gradient[:, case.vocab :].abs().sum()),
    }


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).abs().max() / want.abs().max())


# -- the columns of one shard ----------------------------------------------------------------------


def exclude(rows: tuple[Tensor, ...], which: str) -> None:
    """Logits of -inf, among them all of a lane's share of the columns."""
    student, teacher, _ = rows
    if which == "all":
        for x in rows:
            x[:, :150] = x[0, 200:203] = x[:, -1] = -INF
    if which == "student":
        student[:, 1::2] = -INF
    if which == "teacher and student":
        student[:, 2] = teacher[:, 2] = -INF
    if which == "teacher":
        teacher[1, 77] = -INF
    if which == "underflow":  # where the teacher excludes, the student's exponential is 0
        student[:, 40:60], teacher[:, 40:60] = -3000.0, -INF
    if which == "a whole row":
        for x in rows:
            x[1] = -INF


def make(kind: str, shard: Shard, backend: str) -> Objective:
    has = {"teacher": True, "reference": True}
    if kind == "sampled":
        return Sampled(shard, Layout(**has), backend=backend)
    if kind == "forward":
        layout = Layout(**has, targets=1, sums=2)
        return ForwardKL(shard, layout, (1.8, 1.0), backend=backend)
    layout = Layout(**has, targets=2, sums=2)
    return ReverseKL(shard, layout, (0.5, 1.8), backend=backend)


def shard_of(tokens: Tensor, width: int, first: int = 0, group: Any = None) -> Shard:
    local = tokens - first
    return Shard(
        num_tokens=len(tokens),
        active=torch.arange(len(tokens), device=tokens.device),
        local_token=local.clamp(0, max(0, width - 1)),
        owned=(local >= 0) & (local < width),
        first=first,
        valid=width,
        group=group,
        temperature=0.8,
        dtype=torch.float32,
    )


def chunk_of(rows: tuple[Tensor, ...], shard: Shard, place: Any = None) -> Chunk:
    place = slice(0, shard.num_tokens) if place is None else place
    return Chunk(*rows, place, shard.active, shard.local_token, shard.owned)


def measure_columns(kind: str, which: str) -> dict[str, list[float]]:
    """Every column of the plain back end and of Triton's, token after token."""
    rows = draw(2, 523)
    exclude(rows, which)
    shard = shard_of(torch.tensor([5, 522]), 523)
    columns = {}
    for backend in ("torch", "triton"):
        found = make(kind, shard, backend).statistics(chunk_of(rows, shard))
        columns[backend] = found.storage.double().flatten().tolist()
    return columns


def measure_places() -> dict[str, float]:
    """Gradients of rows in other orders, strides and places against those of plain rows."""
    rows, n = draw(4, 523), 4
    shard = shard_of(torch.arange(n) * 100, 523)
    plain = gradient_of(rows, shard, slice(0, n))
    order = torch.tensor([6, 0, 3, 1])
    scattered = [torch.zeros(8, 523).index_copy(0, order, x) for x in rows]
    below = [torch.cat([torch.zeros(3, 523), x]) for x in rows]
    lying = [x.T.contiguous().T for x in rows]
    wide = [torch.cat([x, x], 1)[:, :523] for x in rows]
    errors = {
        "indices": relative(gradient_of(tuple(scattered), shard, order)[order], plain.double()),
        "a later slice": relative(
            gradient_of(tuple(below), shard, slice(3, 7))[3:], plain.double()
        ),
        "columns apart": relative(gradient_of(tuple(lying), shard, slice(0, n)), plain.double()),
        "rows apart": relative(gradient_of(tuple(wide), shard, slice(0, n)), plain.double()),
    }
    others = gradient_of(tuple(scattered), shard, order)
    errors["untouched"] = float(others[[2, 4, 5, 7]].abs().sum())
    return errors


def coefficients_of(objective: Objective) -> Coefficients:
    one = torch.ones(objective.shard.num_tokens, dtype=torch.float64)
    last = torch.arange(len(one)) % 2 == 0
    first, second = objective.lambdas or (1.0, 1.0)
    lam = torch.where(last, torch.as_tensor(second).double(), torch.as_tensor(first).double())
    return Coefficients(one, lam, last, 0.2 * one, one)


def gradient_of(
    rows: tuple[Tensor, ...], shard: Shard, place: Any, narrows: bool = False
) -> Tensor:
    """The gradient over a student's matrix; `narrows`: as bf16 in its own memory."""
    student = rows[0].clone() if rows[0].is_contiguous() else rows[0]
    objective = make("reverse", shard, "triton")
    chunk = chunk_of((student, *rows[1:]), shard, place)
    local = objective.statistics(chunk)
    found = objective.merge(chunk, objective.columns(local.storage[None].double()))
    c = coefficients_of(objective)
    divergence = objective.divergence(chunk, local, found, c)
    if not narrows:
        objective.gradient(chunk, local, found, c, divergence)
        return student
    narrow = student.view(torch.bfloat16)[:, : student.shape[1]]
    objective.gradient(replace(chunk, narrow=narrow), local, found, c, divergence)
    return narrow.float()


def measure_narrow() -> float:
    """A bf16 gradient over fp32 logits in the same memory, many tiles long."""
    rows = draw(2, 1501)
    shard = shard_of(torch.tensor([3, 1500]), 1501)
    wide = gradient_of(rows, shard, slice(0, 2))
    return relative(gradient_of(rows, shard, slice(0, 2), narrows=True), wide.double())


def measure_hidden(dtype: torch.dtype, in_main_grad: bool) -> dict[str, float]:
    """Gradients from hidden states and heads, of Triton's and of the plain back end's chunks."""
    g, tokens, width = torch.Generator().manual_seed(0), 9, 300
    numbers = [torch.randn(tokens, 16, generator=g)]
    numbers += [torch.randn(width + 4, 16, generator=g) * 0.5 for _ in range(3)]

    def run(backend: str, working: torch.dtype) -> tuple[Tensor, Tensor]:
        hidden, *heads = (x.to(dtype).to(working).clone() for x in numbers)
        hidden.requires_grad_()
        heads[0].requires_grad_()
        if in_main_grad and working == dtype:
            heads[0].main_grad = torch.zeros(width + 4, 16)  # type: ignore[attr-defined]

        def select(index: Any) -> Any:
            one = torch.ones(tokens, dtype=torch.float64)[index]
            return lambda statistics: (one, (torch.arange(tokens) % 2 == 0)[index], 0.3 * one)

        function = select(slice(None))
        function.select = select
        result = distillation_loss(
            (hidden, heads[0]),
            (hidden.detach(), heads[1]),
            reference=(hidden.detach(), heads[2]),
            tokens=torch.arange(tokens) * 7,
            mask=torch.arange(tokens) != 2,
            vocab_size=width,
            coefficients=function,
            estimator="full_vocab",
            chunk_tokens=3,
            backend=backend,
        )
        result.loss.backward()
        assert hidden.grad is not None
        return hidden.grad.double(), getattr(heads[0], "main_grad", heads[0].grad).double()

    want, found = run("torch", torch.float64), {}
    for backend in ("torch", "triton"):
        pairs = zip(run(backend, dtype), want, strict=True)
        found[backend] = max(float((a - b).norm() / b.norm()) for a, b in pairs)
    return found


class TwoRanks:
    """A process group's rank and size, without processes."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return 2


def measure_halves(kind: str) -> dict[str, float]:
    """Two shards against the whole, one of them of few columns; and a shard of padding only."""
    rows, tokens = draw(4, 300), torch.tensor([0, 120, 200, 299])
    errors = {}
    for cut in (200, 300):
        spans = ((0, cut), (cut, 300))
        students, pieces = [], []
        for rank, (a, b) in enumerate(spans):
            shard = shard_of(tokens, b - a, a, TwoRanks(rank))
            own = tuple(x[:, a:b].clone() for x in rows)
            objective = make(kind, shard, "triton")
            chunk = chunk_of(own, shard)
            students.append(own[0])
            pieces.append((objective, chunk, objective.statistics(chunk)))
        gathered = torch.stack([local.storage for _, _, local in pieces]).double()
        for objective, chunk, local in pieces:
            found = objective.merge(chunk, objective.columns(gathered))
            c = coefficients_of(objective)
            divergence = objective.divergence(chunk, local, found, c)
            objective.gradient(chunk, local, found, c, divergence)
        whole = tuple(x.clone().double() for x in rows)
        shard = shard_of(tokens, 300)
        plain = make(kind, Shard(**{**vars(shard), "dtype": torch.float64}), "torch")
        chunk = chunk_of(whole, shard)
        local = plain.statistics(chunk)
        found, c = plain.merge(chunk, plain.columns(local.storage[None])), coefficients_of(plain)
        plain.gradient(chunk, local, found, c, plain.divergence(chunk, local, found, c))
        errors[str(cut)] = relative(torch.cat(students, 1), whole[0])
    return errors


def measure_refusal() -> str:
    """What an infinite divergence says."""
    rows = draw(3, 523)
    exclude(rows, "teacher")
    try:
        distillation_loss(
            rows[0].requires_grad_(),
            rows[1],
            tokens=torch.tensor([1, 2, 3]),
            mask=torch.ones(3),
            vocab_size=523,
            coefficients=lambda s: (torch.ones(3), torch.ones(3), torch.zeros(3)),
            lambdas=(1.0,),
            estimator="full_vocab",
            backend="triton",
        )
    except ValueError as error:
        return str(error)
    return ""


def measure_unweighted(backend: str) -> float:
    """How far a token's gradient is from its additive term's, whose weight is 0 and D infinite."""
    rows = draw(3, 523)
    exclude(rows, "teacher")
    student = rows[0].clone().requires_grad_()
    distillation_loss(
        student,
        rows[1],
        tokens=torch.tensor([1, 2, 3]),
        mask=torch.ones(3),
        vocab_size=523,
        coefficients=lambda s: (torch.tensor([1.0, 0.0, 1.0]), torch.ones(3), 0.5 * torch.ones(3)),
        lambdas=(1.0,),
        estimator="full_vocab",
        backend=backend,
    ).loss.backward()
    want = 0.5 * rows[0][1].double().softmax(-1)
    want[2] -= 0.5
    assert student.grad is not None
    return relative(student.grad[1], want)


def interpret() -> dict[str, Any]:
    nothing = shard_of(torch.arange(0), 523)
    empty = make("reverse", nothing, "triton").statistics(chunk_of(draw(0, 523), nothing))
    columns = [(kind, which) for kind in KINDS for which in EXCLUDED]
    return {
        "losses": {str(case): measure_loss(case) for case in LOSSES},
        "columns": {f"{k}, {w}": measure_columns(k, w) for k, w in columns},
        "places": measure_places(),
        "narrow": measure_narrow(),
        "hidden": {
            f"{str(dtype).split('.')[1]}, {in_main_grad}": measure_hidden(dtype, in_main_grad)
            for dtype in (torch.float32, torch.bfloat16)
            for in_main_grad in (False, True)
        },
        "halves": {kind: measure_halves(kind) for kind in KINDS},
        "refusal": measure_refusal(),
        "unweighted": {backend: measure_unweighted(backend) for backend in ("torch", "triton")},
        "empty": list(empty.storage.shape),
    }


# -- machine code, without a GPU -------------------------------------------------------------------


class NoGPU:
    """What Triton asks a driver for when it compiles; nothing runs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


class Compiled:
    """Stands for a kernel whose launches are compiled and kept."""

    def __init__(self, kernel: Any, results: list[Any]) -> None:
        self.kernel, self.results = kernel, results

    def __getitem__(self, grid: Any) -> Any:
        def launch(**arguments: Any) -> None:
            self.results.append(self.kernel.warmup(grid=grid, **arguments))

        return launch


def resources(compiled: Any, folder: Path) -> dict[str, int]:
    """Registers, bytes of spilled registers, and how global memory is read, 128 or 16 bits."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(path)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "wide_reads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "narrow_reads": len(re.findall(r"ld\.global\S*\.b16", ptx)),
    }


def compile_all(folder: Path) -> dict[str, dict[str, int]]:
    """Every objective's kernels for compute capability 9.0, as they are launched."""
    import triton

    from megatron_sgopd.vocab_parallel import triton_kernels

    triton.runtime.driver.set_active(NoGPU())
    results: list[Any] = []
    for name in ("statistics_kernel", "gradient_kernel"):
        setattr(triton_kernels, name, Compiled(getattr(triton_kernels, name), results))
    triton_kernels.INTERPRETED = True  # it is to launch on these tensors
    width, found = 16 * 1187, {}
    for kind, dtype in (
        ("sampled", torch.bfloat16),
        ("reverse", torch.bfloat16),
        ("reverse", torch.float32),
        ("forward", torch.bfloat16),
    ):
        shard = shard_of(torch.tensor([1, 2]), width)
        objective = make(kind, shard, "triton")
        chunk = chunk_of(tuple(torch.zeros(2, width, dtype=dtype) for _ in range(3)), shard)
        local = objective.statistics(chunk)
        one = torch.ones(2)
        factors = triton_kernels.Factors(one, one, one, one, one)
        if dtype == torch.float32:
            chunk = replace(chunk, narrow=chunk.student.view(torch.bfloat16)[:, :width])
        triton_kernels.gradient(objective, chunk, local, factors)
        for name, compiled in zip(("statistics", "gradient"), results, strict=True):
            found[f"{kind} {name} {str(dtype).split('.')[1]}"] = resources(compiled, folder)
        results.clear()
    return found


if __name__ == "__main__":
    assert (sys.argv[1] == "interpret") == (os.environ.get("TRITON_INTERPRET") == "1")
    torch.set_num_threads(1)
    out = interpret() if sys.argv[1] == "interpret" else compile_all(Path(sys.argv[2]))
    print(json.dumps(out))
