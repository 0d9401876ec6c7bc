"""The gradient pass: divergence per token and the gradient of this rank's student logits.

Nothing here communicates, except `candidate_gradient`, whose gate needs the normalisers first.

Shapes: T tokens, V local rows, N active tokens, n those of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.shard import Shard, num_local_rows
from megatron_sgopd.vocab_parallel.statistics import (
    Lambda,
    Models,
    target_logits,
    target_name,
)

CandidateLambda = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class ActiveCoefficients:
    """Coefficients of the active tokens, [N] each."""

    weight: Tensor
    lam: Tensor
    additive: Tensor
    scale: Tensor


def sampled_gradient(
    shard: Shard, models: Models, merged: dict[str, Tensor], c: ActiveCoefficients
) -> tuple[Tensor, Tensor]:
    """D = -A log p(y), A = (T-S) + (lambda-1)(T-R) [N], and the gradient [T, V]."""
    student = merged["student"]
    advantage = torch.zeros_like(student)
    if "teacher" in merged:
        advantage = merged["teacher"] - student
        if "reference" in merged:
            advantage = advantage + (c.lam - 1.0) * (merged["teacher"] - merged["reference"])
    toward = (c.weight * advantage + c.additive) * c.scale
    grad = _zero_gradient(models)
    for chunk, p, _ in _student_chunks(shard, models, merged):
        _write(shard, grad, chunk, _toward_token(shard, p, toward[chunk], chunk))
    return -advantage * student, grad


def kl_gradient(
    shard: Shard,
    models: Models,
    merged: dict[str, Tensor],
    c: ActiveCoefficients,
    lambdas: Sequence[Lambda],
) -> tuple[Tensor, Tensor]:
    """D = KL(student || target of the token's lambda) [N], and the gradient [T, V].

    Row gradient: p (log p - log q - KL), q the target (docs/method.md, "The loss").
    """
    which = _which_lambda(shard, c.lam, lambdas)

    def chosen(keys: list[str]) -> Tensor:
        return torch.where(which, merged[keys[-1]], merged[keys[0]])

    targets = [target_name(i, lam) for i, lam in enumerate(lambdas)]
    kl = chosen([f"kl{i}" for i in range(len(lambdas))])
    target_m = chosen([f"{t}_m" for t in targets])
    gap = merged["student_s"].log() - chosen([f"{t}_s" for t in targets]).log()
    grad = _zero_gradient(models)
    for chunk, p, centred in _student_chunks(shard, models, merged):
        lam = c.lam[chunk]
        # Where lambda is 1 on the whole chunk the reference is not projected.
        h = target_logits(shard, models, 1.0 if bool((lam == 1.0).all()) else lam, chunk)
        log_ratio = (centred - (h - target_m[chunk, None])) - gap[chunk, None]
        g = p * (log_ratio - kl[chunk, None]) * (c.weight * c.scale)[chunk, None]
        g += _toward_token(shard, p, (c.additive * c.scale)[chunk], chunk)
        _write(shard, grad, chunk, g)
    return kl, grad


def candidate_gradient(
    shard: Shard,
    models: Models,
    merged: dict[str, Tensor],
    c: ActiveCoefficients,
    candidate_lambda: CandidateLambda,
) -> tuple[Tensor, Tensor]:
    """D = -E_p A with a lambda per vocabulary entry [N], gradient -p (A - E_p A) [T, V].

    A(v) = (T-S)(v) + (lambda(v)-1)(T-R)(v) from log-probs: with raw logits the normalisers would
    not cancel (docs/method.md). One more collective, for E_p A.
    """

    def advantage(chunk: slice) -> Tensor:
        t, s, r = (
            (shard.logits(models[k], chunk) - merged[f"{k}_m"][chunk, None])
            - merged[f"{k}_s"].log()[chunk, None]
            for k in ("teacher", "student", "reference")
        )
        return (t - s) + (candidate_lambda(t - s, shard.active[chunk]) - 1.0) * (t - r)

    local = [(p * advantage(k)).sum(-1) for k, p, _ in _student_chunks(shard, models, merged)]
    grad = _zero_gradient(models)
    if not local:
        return merged["student"], grad
    mean = shard.all_gather({"mean": torch.cat(local)})["mean"].sum(0)
    for chunk, p, _ in _student_chunks(shard, models, merged):
        g = -p * (advantage(chunk) - mean[chunk, None]) * (c.weight * c.scale)[chunk, None]
        g += _toward_token(shard, p, (c.additive * c.scale)[chunk], chunk)
        _write(shard, grad, chunk, g)
    return -mean, grad


def _which_lambda(shard: Shard, lam: Tensor, lambdas: Sequence[Lambda]) -> Tensor:
    """Whether a token's lambda is the last of `lambdas` (else it is the first), [N] bool."""
    values = [
        v[shard.active].to(lam.dtype) if isinstance(v, Tensor) else lam.new_tensor(v)
        for v in lambdas
    ]
    is_last = lam == values[-1]
    if not bool((is_last | (lam == values[0])).all()):
        odd = lam[~(is_last | (lam == values[0]))][0].item()
        raise ValueError(
            f"the coefficients gave lambda {odd}, which is none of `lambdas`; pass every value "
            "that they can take (two at most)"
        )
    return is_last


def _student_chunks(
    shard: Shard, models: Models, merged: dict[str, Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(chunk, p [n, valid], x - max [n, valid]) of the student."""
    for chunk in shard.chunks():
        centred = shard.logits(models["student"], chunk) - merged["student_m"][chunk, None]
        yield chunk, centred.exp() / merged["student_s"][chunk, None], centred


def _toward_token(shard: Shard, p: Tensor, toward: Tensor, chunk: slice) -> Tensor:
    """Gradient of -toward log p(y): toward (p - onehot), [n, valid]."""
    g = p * toward[:, None]
    if shard.valid:
        g.scatter_add_(-1, shard.index[chunk], -(toward * shard.owned[chunk])[:, None])
    return g


def _zero_gradient(models: Models) -> Tensor:
    rows = models["student"]
    assert isinstance(rows, Tensor), "the student's rows are logits by now"
    return rows.new_zeros(rows.shape[0], num_local_rows(rows))


def _write(shard: Shard, grad: Tensor, chunk: slice, g: Tensor) -> None:
    rows = (g / shard.temperature).to(grad.dtype)
    grad[:, : shard.valid].index_copy_(0, shard.active[chunk], rows)
