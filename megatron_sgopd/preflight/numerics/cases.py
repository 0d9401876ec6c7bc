"""Lists every case by name, with the capability it needs and the rows it is tried on.

Shapes: T tokens, V vocabulary columns held by one rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
CHUNKS = 7  # tokens a chunk where a case wants several, the last one ragged


@dataclass(frozen=True)
class Rows:
    """Describes how the logits of a case are drawn (`inputs.draw`)."""

    tokens: int = 24  # T
    vocab: int = 512  # divides by 8: no padding unless a case asks for it
    padding: int = 0  # columns beyond the vocabulary, filled with large numbers
    empty_rank: bool = False  # the last rank holds padding only
    dtype: str = "float32"
    kl: float = 1.0  # KL(student || teacher) of every token, nats; 0: identical models
    shift: float = 0.0  # added to every other row of the student, taken from the teacher's
    minus_inf: str = ""  # "all", "student" or "teacher": whose columns are at -inf
    peaked: str = ""  # "teacher" or "student": one column of its rows 200 above the others
    masked: float = 0.3  # share of the tokens
    near_certain: bool = False  # the sampled token has nearly all mass in both models
    seed: int = 0


@dataclass(frozen=True)
class Case:
    name: str
    capability: str
    check: str = "exact"  # a key of `checks.CHECKS`
    rows: Rows = field(default_factory=Rows)
    beta: float = 0.5  # of `jsd`
    loss: Loss | None = None  # of `distillation_loss`

    @property
    def full_name(self) -> str:
        return f"{self.capability}: {self.name}"


@dataclass(frozen=True)
class Loss:
    """Options of a case of `distillation_loss`."""

    estimator: str = "full_vocab"
    method: str = "sg_opd"
    candidate: bool = False
    temperature: float = 1.0
    divergence: str = "reverse_kl"
    beta: float = 0.5
    top_k: int | None = None
    token_scale: bool = False
    hidden: bool = False  # all models as (hidden, head)
    main_grad: bool = False  # the head's gradient goes there
    logprobs: bool = False  # teacher and reference as log-probs [T]
    chunked: bool = False
    token_local: bool = False  # coefficients that may be asked about some tokens at a time
    overwrite: bool = False  # the gradient over the student's logits


# -- one divergence --------------------------------------------------------------------------------

ROWS = {
    "fp32": Rows(),
    "bf16": Rows(dtype="bfloat16"),
    "fp16": Rows(dtype="float16"),
    "KL 1e-3": Rows(kl=1e-3),
    "KL 1e-3, bf16": Rows(kl=1e-3, dtype="bfloat16"),
    "KL 0.1": Rows(kl=0.1),
    "KL 10": Rows(kl=10.0),
    "identical models": Rows(kl=0.0),
    "rows shifted by ±1000": Rows(shift=1000.0),
    "-inf columns in all models": Rows(minus_inf="all"),
    "-inf columns in the student": Rows(minus_inf="student"),
    "one-hot teacher": Rows(peaked="teacher"),
    "one-hot student": Rows(peaked="student"),
    "near-certain tokens": Rows(tokens=64, vocab=64, near_certain=True),
    "near-certain tokens, bf16": Rows(tokens=64, vocab=64, near_certain=True, dtype="bfloat16"),
    "vocabulary 32,768": Rows(tokens=4, vocab=32768),
    "vocabulary 509": Rows(vocab=509),  # odd: the last rank of 2 or 4 pads
    "padded vocabulary": Rows(vocab=500, padding=12),
    "padded vocabulary, bf16": Rows(vocab=500, padding=12, dtype="bfloat16"),
    "a rank of padding only": Rows(vocab=96, empty_rank=True),
    "vocabulary 3": Rows(vocab=3, padding=1),
    "one token": Rows(tokens=1, masked=0.0),
    "all masked": Rows(masked=1.0),
}
CHECKS = {
    "splits of the batch add up": "splits",
    "loss times 4, as scalers do": "scaled",
    "non-contiguous rows": "strided",
    "twice the same bits": "repeat",
    "the same bits on all ranks": "ranks",
    "inputs left as they were": "unchanged",
}
# With these the divergence is infinite: -inf where the other model has mass.
INFINITE = {"reverse_kl": "teacher", "forward_kl": "student"}


def _divergence_cases(capability: str) -> Iterator[Case]:
    for name, rows in ROWS.items():
        if rows.minus_inf and rows.minus_inf == INFINITE.get(capability):
            continue
        yield Case(name, capability, rows=rows)
    for name, check in CHECKS.items():
        yield Case(name, capability, check)
    if capability in INFINITE:
        rows = Rows(minus_inf=INFINITE[capability])
        yield Case("infinite: said or returned, never NaN", capability, "infinite", rows)
    if capability == "jsd":
        yield Case("beta 0.1", capability, beta=0.1)
        yield Case("beta 1e-3", capability, beta=1e-3)


# -- one sampled token, and the gate ---------------------------------------------------------------

NLL_ROWS = (
    "fp32",
    "bf16",
    "fp16",
    "rows shifted by ±1000",
    "one-hot student",
    "near-certain tokens",
    "near-certain tokens, bf16",
    "vocabulary 32,768",
    "vocabulary 509",
    "padded vocabulary",
    "a rank of padding only",
    "all masked",
)
GATE_ROWS = ("fp32", "bf16", "padded vocabulary", "a rank of padding only", "all masked")
SIGNS = Rows(tokens=2000, vocab=64, masked=0.0, near_certain=True)


def _sampled_cases() -> Iterator[Case]:
    for name in NLL_ROWS:
        yield Case(name, "nll", rows=ROWS[name])
    for name, check in CHECKS.items():
        yield Case(name, "nll", check)
    # What `nll` of teacher and student is used for: the sign of T - S.
    yield Case("sign of T - S, near-certain tokens", "nll", "signs", SIGNS)


def _gate_cases() -> Iterator[Case]:
    for name in GATE_ROWS:
        yield Case(name, "gated_reverse_kl", rows=ROWS[name])
    for name in ("twice the same bits", "the same bits on all ranks"):
        yield Case(name, "gated_reverse_kl", CHECKS[name])
    yield Case("gate, near-certain tokens", "gated_reverse_kl", "signs", SIGNS)


# -- the whole loss of this package ----------------------------------------------------------------

SMALL = Rows(vocab=61, tokens=19, padding=3)  # so small that no candidate's log-ratio is a tie
LOSSES = {
    "sampled, row gate": Loss("sampled"),
    "sampled, log-probs given": Loss("sampled", logprobs=True),
    "sampled, plain": Loss("sampled", "opd"),
    "sampled, temperature 0.7": Loss("sampled", temperature=0.7),
    "sampled, extrapolated": Loss("sampled", "exopd"),
    "sampled, scaled tokens": Loss("sampled", token_scale=True),
    "sampled, gradient over the logits": Loss("sampled", overwrite=True),
    "cross-entropy": Loss("sampled", "sft"),
    "verifier alone": Loss("sampled", "grpo"),
    "row gate": Loss(),
    "row gate, token by token": Loss(token_local=True),
    "row gate, scaled tokens": Loss(token_scale=True),
    "row gate, temperature 0.7": Loss(temperature=0.7),
    "row gate, gradient over the logits": Loss(overwrite=True, token_local=True),
    "plain": Loss(method="opd"),
    "plain, gradient over the logits": Loss(method="opd", overwrite=True),
    "extrapolated": Loss(method="exopd"),
    "candidate gate": Loss(candidate=True),
    "candidate gate, temperature 1.3": Loss(candidate=True, temperature=1.3),
    "forward KL, row gate": Loss(divergence="forward_kl"),
    "forward KL, temperature 0.7": Loss(divergence="forward_kl", temperature=0.7),
    "JSD, row gate": Loss(divergence="jsd"),
    "JSD, beta 0.1, extrapolated": Loss(method="exopd", divergence="jsd", beta=0.1),
    "JSD, temperature 0.7": Loss(divergence="jsd", temperature=0.7),
    "JSD, beta 0: forward KL": Loss(divergence="jsd", beta=0.0),
    "JSD, beta 1: reverse KL": Loss(divergence="jsd", beta=1.0),
    "top 5 and a tail": Loss(method="opd", top_k=5),
    "top 5 and a tail, forward KL": Loss(method="opd", top_k=5, divergence="forward_kl"),
    "top 5 and a tail, JSD": Loss(method="opd", top_k=5, divergence="jsd"),
    "hidden: plain": Loss(method="opd", hidden=True),
    "hidden: row gate": Loss(hidden=True),
    "hidden: row gate, token by token": Loss(hidden=True, chunked=True, token_local=True),
    "hidden: row gate, several chunks": Loss(hidden=True, chunked=True),
    "hidden: row gate, temperature 0.7": Loss(hidden=True, temperature=0.7),
    "hidden: candidate gate": Loss(candidate=True, hidden=True),
    "hidden: sampled": Loss("sampled", hidden=True),
    "hidden: sampled, token by token": Loss("sampled", hidden=True, chunked=True, token_local=True),
    "hidden: forward KL": Loss(divergence="forward_kl", hidden=True),
    "hidden: JSD": Loss(divergence="jsd", hidden=True),
    "hidden: head's gradient in main_grad": Loss(hidden=True, main_grad=True, token_local=True),
}
HALVES = {
    "sampled, row gate": Loss("sampled"),
    "row gate": Loss(),
    "candidate gate": Loss(candidate=True),
}
IMITATIONS = {  # whose gradient has a multiple of p - onehot
    "sampled": Loss("sampled", "opd"),
    "cross-entropy": Loss("sampled", "sft"),
    "verifier alone": Loss("sampled", "grpo"),
    "verifier, reverse KL": Loss(method="grpo"),
    "verifier, forward KL": Loss(method="grpo", divergence="forward_kl"),
    "verifier, JSD": Loss(method="grpo", divergence="jsd"),
    "verifier, top 5 and a tail": Loss(method="grpo", top_k=5),
    "verifier, candidate gate": Loss(method="grpo", candidate=True),
}
TAILS = {  # whose slopes are large where the student's tail is nearly empty
    "top 5 and a tail": Loss(method="opd", top_k=5),
    "top 5 and a tail, forward KL": Loss(method="opd", top_k=5, divergence="forward_kl"),
    "top 5 and a tail, JSD": Loss(method="opd", top_k=5, divergence="jsd"),
}
IN_ALL = replace(SMALL, minus_inf="all")


def _loss_cases() -> Iterator[Case]:
    def case(name: str, loss: Loss, rows: Rows) -> Case:
        return Case(name, "distillation_loss", "loss", rows, loss=loss)

    for name, loss in LOSSES.items():
        yield case(name, loss, SMALL)
    for name, loss in HALVES.items():
        yield case(f"{name}, bf16", loss, replace(SMALL, dtype="bfloat16"))
        yield case(f"{name}, fp16", loss, replace(SMALL, dtype="float16"))
        yield case(f"{name}, -inf columns in all models", loss, IN_ALL)
    for name, loss in TAILS.items():
        yield case(f"{name}, KL 10", loss, replace(SMALL, kl=10.0))
        yield case(f"{name}, one-hot student", loss, replace(SMALL, peaked="student"))
    shifted = Loss(method="opd", temperature=0.7, top_k=5)
    yield case(
        "top 5, temperature 0.7, rows shifted by ±1000", shifted, ROWS["rows shifted by ±1000"]
    )
    # Of p - onehot there hardly anything is left at the token: rounding p first would lose it.
    certain = replace(SMALL, tokens=64, near_certain=True, dtype="bfloat16")
    for name, loss in IMITATIONS.items():
        yield case(f"{name}, near-certain, bf16", loss, certain)
    yield case("plain, near-certain, bf16", Loss(method="opd"), certain)
    plain = Loss(method="opd", hidden=True)  # no gate: rounded logits would move it
    yield case("hidden: plain, bf16", plain, replace(SMALL, dtype="bfloat16"))


ALL = (
    *(case for capability in DIVERGENCES for case in _divergence_cases(capability)),
    *_sampled_cases(),
    *_gate_cases(),
    *_loss_cases(),
)


def cases_of(capabilities: Sequence[str], world: int) -> list[Case]:
    """The cases of these capabilities that mean something on so many ranks."""
    return [
        case
        for case in ALL
        if case.capability in capabilities
        and not (world == 1 and (case.rows.empty_rank or case.check == "ranks"))
    ]
