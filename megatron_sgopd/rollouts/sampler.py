"""Makes labelled rollouts: asks an engine for completions and the verifier for their labels.

What asks an engine runs as a job (`engine_jobs`). With an embedded engine every rank of the replica
runs it with the same prompts (the replica's share), its first rank verifies, and the labelled
rollouts are handed to the others; with engines behind HTTP the first rank runs the job alone.

Shapes: P prompts of the replica, G = n rollouts per prompt.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sgopd.config.schema import Config
from megatron_sgopd.distributed.groups import Groups, broadcast_object
from megatron_sgopd.metrics import Clock
from megatron_sgopd.types import Completion, Engine, Prompt, Request, Rollout, RolloutSource
from megatron_sgopd.verifier import VerifierPool

Decode = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Sampler:
    """Makes rollouts on this replica; `verifier` is used by its first rank only."""

    config: Config
    groups: Groups
    verifier: VerifierPool | None
    decode: Decode
    stop_token_ids: tuple[int, ...]
    every_rank: bool = True  # of the replica runs the jobs; else its first rank alone
    clock: Clock = field(default_factory=Clock)  # of a job's parts

    def rollouts(
        self,
        engine: Engine,
        prompts: Sequence[Prompt],
        seeds: Sequence[int],
        source: RolloutSource = "student",
    ) -> list[Rollout]:
        """One labelled rollout for each (prompt, seed); repeat a prompt for more."""
        rollout = self.config.rollout
        requests = [
            Request(
                prompt_token_ids=prompt.token_ids,
                seed=seed,
                max_new_tokens=rollout.max_new_tokens,
                temperature=rollout.temperature,
                stop_token_ids=self.stop_token_ids,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        return self.label(prompts, engine.stream(requests), source)

    def label(
        self,
        prompts: Sequence[Prompt],
        arriving: Iterable[tuple[int, Completion]],
        source: RolloutSource,
    ) -> list[Rollout]:
        """The labelled rollouts in the order of the prompts, on every rank that runs the job."""
        done = dict(self.labelled(prompts, arriving, source))
        first = self.groups.is_replica_first_rank
        rollouts = [done[i] for i in range(len(prompts))] if first else []
        return broadcast_object(rollouts, self.groups) if self.every_rank else rollouts

    def labelled(
        self,
        prompts: Sequence[Prompt],
        arriving: Iterable[tuple[int, Completion]],
        source: RolloutSource,
    ) -> Iterator[tuple[int, Rollout]]:
        """(index, rollout) as verdicts come, while others are still being made.

        On the replica's first rank; nothing on the others. A completion cut off by the length limit
        is wrong, whatever it says.
        """
        if not self.groups.is_replica_first_rank:
            for _ in arriving:  # this rank decodes its part
                pass
            return
        assert self.verifier is not None, "the replica's first rank owns the verifier"
        waiting: dict[int, tuple[int, Completion]] = {}  # for a verdict, by their order
        begun = arrived = time.perf_counter()

        def answers() -> Iterator[tuple[str, str]]:
            nonlocal arrived
            for place, (index, completion) in enumerate(arriving):
                waiting[place] = (index, completion)
                yield self.decode(completion.token_ids), prompts[index].answer
            arrived = time.perf_counter()

        for place, verdict in self.verifier.verify_iter(answers()):
            index, completion = waiting.pop(place)
            is_correct = verdict.is_correct and completion.finish_reason == "stop"
            yield index, Rollout(prompts[index], completion, source, is_correct)
        self.clock.add(f"generate_{source}", arrived - begun)
        self.clock.add("label", time.perf_counter() - arrived)  # what generation did not hide


def make_sampler(
    config: Config,
    groups: Groups,
    tokenizer: Any,
    stop_token_ids: Sequence[int],
    engine: Engine | None,
) -> Sampler:
    """Makes the recipe's sampler on this rank, with a verifier on the replica's first.

    `engine` is the one that it will ask.
    """
    v = config.verifier
    verifier = None
    if groups.is_replica_first_rank:
        verifier = VerifierPool(
            v.name, timeout_s=v.timeout_s, num_workers=v.num_workers, memory_mb=v.memory_mb
        )
    return Sampler(
        config,
        groups,
        verifier,
        lambda ids: tokenizer.decode(list(ids), skip_special_tokens=True),
        tuple(stop_token_ids),
        every_rank=engine is None or engine.every_rank_asks,
    )


def request_seed(*parts: object) -> int:
    """A 62-bit seed from anything printable; the same on every machine and Python."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
