"""Chooses the objective that options ask for, and refuses options that do not go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.blocks import Place
from megatron_sgopd.vocab_parallel.candidate import Candidate, CandidateLambda
from megatron_sgopd.vocab_parallel.divergences import ForwardKL, JensenShannon
from megatron_sgopd.vocab_parallel.objective import Lambda, Objective, is_one
from megatron_sgopd.vocab_parallel.reverse_kl import ReverseKL
from megatron_sgopd.vocab_parallel.sampled import Sampled
from megatron_sgopd.vocab_parallel.shard import Rows, Shard, is_logprobs, num_local_rows
from megatron_sgopd.vocab_parallel.softmax import Layout
from megatron_sgopd.vocab_parallel.top_k import TopK

ESTIMATORS = ("sampled", "full_vocab")
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
BACKENDS = ("auto", "torch", "triton")
LEAST_BETA = 1e-6  # of a JSD, or of 1 - beta


@dataclass(frozen=True)
class Choice:
    """The caller's options, checked one by one when made.

    Raises:
        ValueError: an option that is none of those allowed, or two that do not go together.
    """

    estimator: str
    divergence: str
    beta: float
    top_k: int | None
    lambdas: tuple[Lambda, ...]
    candidate_lambda: CandidateLambda | None
    backend: str
    entropy: bool = True  # whether the student's is wanted

    def __post_init__(self) -> None:
        for name, allowed in (
            ("estimator", ESTIMATORS),
            ("divergence", DIVERGENCES),
            ("backend", BACKENDS),
        ):
            if (value := getattr(self, name)) not in allowed:
                words = " and ".join(repr(a) for a in allowed)
                raise ValueError(f"{name} is {value!r}; allowed are {words}")
        if not 1 <= len(self.lambdas) <= 2:
            raise ValueError(f"one or two lambdas are allowed, got {len(self.lambdas)}")
        if not 0.0 <= self.beta <= 1.0:
            raise ValueError(f"beta is {self.beta}; it lies between 0 (forward) and 1 (reverse KL)")
        if 0.0 < min(self.beta, 1.0 - self.beta) < LEAST_BETA:
            raise ValueError(
                f"beta is {self.beta}, which fp32 hardly tells from an end point: use 0 (forward "
                "KL) or 1 (reverse KL)"
            )
        if self.estimator != "full_vocab":
            for name, off in (("divergence", "reverse_kl"), ("top_k", None)):
                if (value := getattr(self, name)) != off:
                    raise ValueError(
                        f"{name} is {value!r} with estimator 'sampled', which reads one token of a "
                        "row: use full_vocab"
                    )
            if self.candidate_lambda is not None:
                raise ValueError(
                    "candidate_lambda was given with estimator 'sampled', which reads one token of "
                    "a row: use full_vocab"
                )
        if self.top_k is not None:
            self._check_top_k(self.top_k)
        if self.candidate_lambda is not None and self.divergence != "reverse_kl":
            raise ValueError(
                f"the per-candidate gate is a reverse KL; divergence is {self.divergence!r}"
            )

    def _check_top_k(self, k: Any) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"top_k is {k}; at least one token is wanted (None: all of them)")
        if self.candidate_lambda is not None:
            raise ValueError("top_k and the per-candidate gate do not go together: drop one")
        if not all(is_one(lam) for lam in self.lambdas):
            raise ValueError(
                f"top_k serves lambda 1 alone, got lambdas {self.lambdas}: the extrapolated "
                "teacher's likeliest tokens are others than the teacher's"
            )

    @property
    def full(self) -> bool:
        return self.estimator == "full_vocab"

    @property
    def kind(self) -> str:
        """The divergence, with JSD's end points under their own names."""
        if self.divergence != "jsd" or 0.0 < self.beta < 1.0:
            return self.divergence
        return "reverse_kl" if self.beta == 1.0 else "forward_kl"

    def chosen(self, lam: Tensor, places: Place) -> tuple[Tensor, Tensor | None]:
        """(lambda [n] in float64, whether it is the last of two) from what coefficients gave."""
        two = len(self.lambdas) == 2
        if lam.dtype == torch.bool:
            values = self._at(0, places, lam)
            if not two:
                return values, None
            return torch.where(lam, self._at(-1, places, lam), values), lam
        if not self.full or self.candidate_lambda is not None:
            return lam.double(), None
        first, last = self._at(0, places, lam), self._at(-1, places, lam)
        is_last = lam == last.to(lam.dtype)
        neither = ~(is_last | (lam == first.to(lam.dtype)))
        if bool(neither.any()):
            raise ValueError(
                f"the coefficients gave lambda {lam[neither][0].item()}, which is none of "
                "`lambdas`; pass every value that they can take (two at most)"
            )
        return torch.where(is_last, last, first), is_last if two else None

    def _at(self, i: int, places: Place, like: Tensor) -> Tensor:
        """One of `lambdas`, of the tokens at these places."""
        lam = self.lambdas[i]
        if isinstance(lam, Tensor):
            return lam[places].double()
        return torch.full(like.shape, lam, dtype=torch.float64, device=like.device)


def lambdas_from(given: object) -> tuple[Lambda, ...]:
    """The lambdas as numbers or tensors [T].

    Raises:
        ValueError: something else was given.
    """
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise ValueError(f"lambdas is {given!r}; a sequence of one or two is wanted: (1.0, 1.8)")
    found: list[Lambda] = []
    for lam in given:
        if isinstance(lam, Tensor) and lam.dim() == 1:
            found.append(lam)
        elif isinstance(lam, int | float) or (isinstance(lam, Tensor) and lam.dim() == 0):
            found.append(float(lam))
        else:
            raise ValueError(f"a lambda is {lam!r}; a number is wanted, or a tensor [T]")
    return tuple(found)


def check_models(choice: Choice, models: Mapping[str, Rows]) -> None:
    """Raises ValueError for models that do not fit each other or the choice."""
    width = num_local_rows(models["student"])
    for name, rows in models.items():
        if is_logprobs(rows):
            if choice.full or name == "student":
                raise ValueError(
                    f"full_vocab needs the {name}'s rows (logits [T, V] or hidden and head); got "
                    "log-probs [T], which serve `sampled` only"
                )
        elif num_local_rows(rows) != width:
            raise ValueError(
                f"the {name} holds {num_local_rows(rows)} vocabulary rows on this rank and the "
                f"student {width}: pad both vocabularies to the same size"
            )
    if not choice.full or "teacher" not in models:
        return
    if choice.top_k is not None and "reference" in models:
        raise ValueError("top_k compares with the teacher alone; a reference was given: leave it")
    extrapolates = choice.candidate_lambda or not all(is_one(lam) for lam in choice.lambdas)
    if extrapolates and "reference" not in models:
        raise ValueError(
            f"lambdas {choice.lambdas} need a reference and none was given: give one, or pass "
            "lambdas=(1.0,)"
        )


def make_objective(choice: Choice, shard: Shard, models: Mapping[str, Rows]) -> Objective:
    """The objective of the options; without a teacher there is nothing to diverge from."""
    rows = {name for name in models if not is_logprobs(models[name])}
    logprobs = {name: m for name, m in models.items() if isinstance(m, Tensor) and is_logprobs(m)}
    has = {name: name in rows for name in ("teacher", "reference")}
    entropy = choice.entropy
    if not choice.full or "teacher" not in models:
        return Sampled(
            shard, Layout(**has, entropy=entropy), logprobs=logprobs, backend=choice.backend
        )
    if choice.candidate_lambda is not None:
        gate = Candidate(shard, Layout(**has), backend=choice.backend)
        gate.candidate_lambda = choice.candidate_lambda
        return gate
    if choice.top_k is not None:
        best = TopK(shard, Layout(**has), backend=choice.backend)
        best.k = min(choice.top_k, shard.size * num_local_rows(models["student"]))
        best.beta = {"reverse_kl": 1.0, "forward_kl": 0.0}.get(choice.kind, choice.beta)
        return best
    lambdas = choice.lambdas
    targets = sum(not is_one(lam) for lam in lambdas)
    if choice.kind == "reverse_kl":
        layout = Layout(**has, targets=targets, sums=2 if targets else 1, entropy=entropy)
        return ReverseKL(shard, layout, lambdas, backend=choice.backend)
    if choice.kind == "forward_kl":
        layout = Layout(**has, targets=targets, sums=len(lambdas), entropy=entropy)
        return ForwardKL(shard, layout, lambdas, backend=choice.backend)
    mixture = JensenShannon(shard, Layout(**has, targets=targets), lambdas, backend=choice.backend)
    mixture.beta = choice.beta
    return mixture
