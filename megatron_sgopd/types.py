"""The nouns of the data flow, standard library only.

A `Prompt` becomes a `Request`, an engine answers it with a `Completion`, the verifier's label turns
that into a `Rollout`, and rollouts are what the trainer learns from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

FinishReason = Literal["stop", "length"]
RolloutSource = Literal["student", "teacher", "dataset"]


@dataclass(frozen=True)
class Prompt:
    """One problem, rendered by the chat template and tokenized.

    Example: Prompt("train-17", (2, 10, 13, 7, 23), "1", (4, 14, 9), "3+8=")
    """

    id: str
    token_ids: tuple[int, ...]
    answer: str  # the reference answer, as the verifier takes it
    solution_token_ids: tuple[int, ...] | None = None  # the worked solution with EOS, for `sft`
    text: str = ""  # the problem as the user wrote it, for logs and reports


@dataclass(frozen=True)
class Request:
    """A question to an engine: one completion of one prompt."""

    prompt_token_ids: tuple[int, ...]
    seed: int
    max_new_tokens: int
    temperature: float = 1.0  # 0 is greedy
    stop_token_ids: tuple[int, ...] = ()
    top_p: float = 1.0  # 1 is off; log-probs are renormalised over what these three keep
    top_k: int = 0  # 0 is off
    min_p: float = 0.0  # 0 is off


@dataclass(frozen=True)
class Completion:
    """An engine's answer. The stop token, when one was sampled, is the last of `token_ids`.

    `logprobs[t]` is the engine's log-probability of `token_ids[t]` at the sampling temperature
    (at temperature 0: of the unscaled distribution).
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    policy_version: int
    seed: int


@dataclass(frozen=True)
class Rollout:
    """A labelled completion, as the trainer takes it.

    `verifier_advantage` is the gate's a1 (docs/method.md, "The gate"): computed over all G
    student rollouts of the prompt, before any of them is displaced by a teacher rollout.
    """

    prompt: Prompt
    completion: Completion
    source: RolloutSource
    is_correct: bool
    verifier_advantage: float = 0.0


WeightStream = Iterable[tuple[str, Any]]  # (Hugging Face name, full tensor)


class EngineLost(ConnectionError):
    """No engine is left to answer."""


class Engine(Protocol):
    """Makes completions; all that calls `stream` runs as a job (`engine_jobs`).

    Every rank calls the other methods, at the same points; they may be collective.

    Attributes:
        name, version: of the software that decodes, for the records.
        policy_version: of the weights that it holds; -1 before the first push.
        every_rank_asks: it decodes in the trainer's ranks. Then all ranks of a replica pass the
            same requests and the completions come on its first rank; else that rank asks alone.
        awaits_weights: it answers only after `push_weights`.
    """

    name: str
    version: str
    policy_version: int
    every_rank_asks: bool
    awaits_weights: bool

    @property
    def answered(self) -> int:
        """Counts the requests answered so far; one that a repeated job asks again counts once."""
        ...

    def stream(self, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
        """Yields (index of the request, completion) as they finish. Raises EngineLost."""
        ...

    def push_weights(self, weights: Callable[[], WeightStream], policy_version: int) -> None:
        """Takes the weights; each call of `weights` begins the (collective) stream anew."""
        ...

    def recover(self) -> None:
        """Brings back what an EngineLost was about."""
        ...

    def sleep(self) -> None:
        """Makes room on devices that it shares with the trainer, which is about to train."""
        ...

    def wake_up(self) -> None:
        """Gets ready for a job after `sleep`."""
        ...

    def forget(self) -> None:
        """Drops the answers that were kept in case their job had to be done again."""
        ...

    def probe(self, ask: Callable[[Any], Any]) -> list[tuple[str, Any]]:
        """Asks each server of this rank by itself: (URL, answer). [] where there is no server."""
        ...

    def incidents(self) -> dict[str, float]:
        """Returns metrics of servers lost and brought back so far; {} where there are none."""
        ...

    def close(self) -> None:
        """Frees what it holds; it cannot be used afterwards."""
        ...
