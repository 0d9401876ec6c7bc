"""Local reductions of a vocabulary shard, and their merge into exact statistics.

A shard of a softmax is (m, s, y): its maximum, sum of exponentials and the sampled token's logit.
Maximum and sum stay apart until a log-prob is formed as (y - m) - log s.

Shapes: N active tokens, n those of a chunk, W ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sgopd.vocab_parallel.shard import Rows, Shard, concatenate, is_logprobs

Lambda = float | Tensor  # a number, or one per token [T]
Models = dict[str, Rows]  # "student", and "teacher", "reference" where given


def is_one(lam: Lambda) -> bool:
    return not isinstance(lam, Tensor) and lam == 1.0


def target_name(i: int, lam: Lambda) -> str:
    """Whose softmax is the target of lambda i: for lambda 1 it is the teacher's own."""
    return "teacher" if is_one(lam) else f"target{i}"


def target_logits(shard: Shard, models: Models, lam: Lambda, chunk: slice) -> Tensor:
    """The extrapolated teacher lambda t + (1 - lambda) r of a chunk, [n, valid]. lam: 1 or [n]."""
    t = shard.logits(models["teacher"], chunk)
    if is_one(lam):
        return t
    rows = lam[:, None].to(t.dtype) if isinstance(lam, Tensor) else lam
    return t + (rows - 1.0) * (t - shard.logits(models["reference"], chunk))


def merged_statistics(
    shard: Shard, models: Models, lambdas: Sequence[Lambda] = ()
) -> dict[str, Tensor]:
    """Statistics of every active token over the whole vocabulary, [N] each; one all-gather.

    Keys, for each model NAME: `NAME` the sampled token's log-prob; `NAME_m`, `NAME_s` of its
    softmax (not for models given as log-probs); `entropy` of the student; for lambda i `kl{i}` =
    KL(student || target i) and the target's `_m` and `_s`.
    """
    softmaxes = {k: rows for k, rows in models.items() if not is_logprobs(rows)}
    chunks = [_local(shard, softmaxes, lambdas, chunk) for chunk in shard.chunks()]
    merged = {
        name: rows[shard.active].to(shard.dtype)
        for name, rows in models.items()
        if isinstance(rows, Tensor) and is_logprobs(rows)
    }
    if not chunks:  # nothing is trained on here; the group's other ranks have the same mask
        empty = torch.empty(0, dtype=shard.dtype, device=shard.active.device)
        keys = [*softmaxes, "entropy", *(f"kl{i}" for i in range(len(lambdas)))]
        softs = [*softmaxes, *(target_name(i, lam) for i, lam in enumerate(lambdas))]
        return merged | dict.fromkeys([*keys, *(f"{k}_{x}" for k in softs for x in "ms")], empty)
    names = list(chunks[0])
    shards = shard.all_gather(concatenate(chunks, names, chunks[0][names[0]][:0]))
    for name in [k[:-2] for k in names if k.endswith("_m")]:
        m, s = shards[f"{name}_m"], shards[f"{name}_s"]
        merged[f"{name}_m"] = m.amax(0)
        merged[f"{name}_s"] = (s * (m - merged[f"{name}_m"]).exp()).sum(0)
    for name in softmaxes:
        y = shards[f"{name}_y"].amax(0)
        merged[name] = (y - merged[f"{name}_m"]) - merged[f"{name}_s"].log()
    merged["entropy"] = (
        -_student_mean(shards, merged, shards["entropy"], shards["student_m"] - merged["student_m"])
        + merged["student_s"].log()
    )
    for i, lam in enumerate(lambdas):
        target = target_name(i, lam)
        gap = merged["student_s"].log() - merged[f"{target}_s"].log()
        shift = (shards["student_m"] - merged["student_m"]) - (
            shards[f"{target}_m"] - merged[f"{target}_m"]
        )
        merged[f"kl{i}"] = _student_mean(shards, merged, shards[f"kl{i}"], shift - gap)
    return merged


def _student_mean(
    shards: dict[str, Tensor], merged: dict[str, Tensor], partial: Tensor, shift: Tensor
) -> Tensor:
    """E_student of a quantity summed per shard about that shard's own centre, [N].

    sum_r w_r (partial_r + shift_r s_r) / S. A rank of padding only has s = 0 and an infinite shift.
    """
    s = shards["student_s"]
    w = (shards["student_m"] - merged["student_m"]).exp()
    moved = torch.where(s > 0, partial + shift * s, torch.zeros_like(s))
    return (w * moved).sum(0) / merged["student_s"]


def _local(
    shard: Shard, softmaxes: Models, lambdas: Sequence[Lambda], chunk: slice
) -> dict[str, Tensor]:
    """This shard's numbers for a chunk: {column: [n]}."""
    columns: dict[str, Tensor] = {}
    centred = {}
    for name, rows in softmaxes.items():
        logits = shard.logits(rows, chunk)
        columns[f"{name}_y"] = shard.pick(logits, chunk)
        centred[name] = _softmax_shard(columns, name, logits)
    x = centred["student"]
    e = x.exp()
    columns["entropy"] = (e * x).sum(-1)
    for i, lam in enumerate(lambdas):
        here = lam[shard.active[chunk]] if isinstance(lam, Tensor) else lam
        name = target_name(i, lam)
        h = centred.get(name)
        if h is None:
            h = _softmax_shard(columns, name, target_logits(shard, softmaxes, here, chunk))
        columns[f"kl{i}"] = (e * (x - h)).sum(-1)
    return columns


def _softmax_shard(columns: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Adds NAME_m and NAME_s of x [n, valid]; gives x - m. An empty shard has m = -inf, s = 0."""
    m = x.amax(-1) if x.shape[-1] else x.new_full((x.shape[0],), -torch.inf)
    centred = x - m[:, None]
    columns[f"{name}_m"], columns[f"{name}_s"] = m, centred.exp().sum(-1)
    return centred
